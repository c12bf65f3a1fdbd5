"""The laboratory: what is measured about a trained dictionary beyond its loss. Comparison, probing, controls, planted
truths. The room of scipy, scikit-learn and pyarrow."""

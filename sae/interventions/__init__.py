"""Changing a model's run with features (steering, ablation) and explaining it by them (attribution)."""

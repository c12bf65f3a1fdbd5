"""Changing a model's run with features, or asking what they did: steering, ablation, attribution."""

"""Training a dictionary: settings, recipes, objectives, the step and the loop."""

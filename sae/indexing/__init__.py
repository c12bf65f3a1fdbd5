"""The feature index that the browser reads."""

"""Harvesting: from text to shards of activations."""

"""From text to shards of activations."""

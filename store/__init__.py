"""Arrays on disk: activation stores, shuffled batches, the feature index (numpy and zarr)."""

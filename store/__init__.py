"""Arrays on disk: activation stores, shuffled batches, the feature index, notes of features (numpy and zarr)."""

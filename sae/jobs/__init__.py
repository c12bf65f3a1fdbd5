"""What every long job needs: checkpoints, its directory, progress, trackers, a memory budget."""

"""What every long job needs: checkpoints, a directory of its own, progress, trackers, a memory budget."""

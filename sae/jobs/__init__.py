"""What any long job needs: whole files, a directory of its own, progress, trackers, reading ahead, a memory budget."""

"""Other tools' dictionaries: one file per peer, read and written by file, never through the peer's package."""

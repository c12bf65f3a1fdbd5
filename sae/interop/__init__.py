"""Other tools' dictionaries: one module per peer, reading and writing its files without its package."""

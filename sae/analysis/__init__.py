"""Studies across dictionaries, with their controls."""

"""The dictionary: its parameters, its files, running it, its directions."""

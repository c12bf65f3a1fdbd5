"""How good a dictionary is: metrics, statistics of its features, domains, geometry of the decoder."""

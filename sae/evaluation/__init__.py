"""What a dictionary is worth: metrics, statistics of features, domains, geometry."""

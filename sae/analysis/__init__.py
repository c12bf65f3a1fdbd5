"""Studies across dictionaries: comparison, controls, probes, absorption, planted rows, pictures of sweeps."""

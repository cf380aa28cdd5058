"""What a problem is: labels, losses, decisions, metrics, baselines, calibration. On numpy arrays."""

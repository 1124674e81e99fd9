"""Floor 2: where a run's numbers and pictures go: files, W&B, a report."""

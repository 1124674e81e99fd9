"""Floor 6: what a user starts."""

"""Floor 1: what every other floor stands on. Imports nothing of ours."""

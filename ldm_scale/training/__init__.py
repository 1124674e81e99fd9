"""Floor 5: engines, EMA, checkpoints, steps and the loop."""

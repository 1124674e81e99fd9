"""Floor 5: weights of other projects, in and out."""

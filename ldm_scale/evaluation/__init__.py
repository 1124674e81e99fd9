"""Floor 3: scores of images; takes images or features, never a model."""

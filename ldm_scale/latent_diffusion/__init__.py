"""Floor 4: the U-Net with its conditioner, trained as one, and images from it."""

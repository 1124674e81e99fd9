"""Floor 3: from noise to a latent, by one paper a file."""

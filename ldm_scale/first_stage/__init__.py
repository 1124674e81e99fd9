"""Floor 3: autoencoders between pixels and latents (Rombach et al. 2022, section 3.1)."""

"""Floor 3: what the U-Net is told besides the noisy latent (Rombach et al. 2022, section 3.3)."""

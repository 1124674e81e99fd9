"""ldm_scale: latent diffusion models (Rombach et al. 2022) trained at scale.

The floors of the house, and who may import whom, are drawn in README.md and kept true by import-linter.
"""

"""Encode image shards into a latent cache, once: `accelerate launch precompute_latents.py +experiment=NAME`."""

from ldm_scale.jobs import config, precompute

if __name__ == "__main__":
    config.main("precompute_latents", precompute.run)

"""Train a first stage or a latent diffusion model: `accelerate launch train.py +experiment=NAME`."""

from ldm_scale.core import runtime
from ldm_scale.jobs import config, train

if __name__ == "__main__":
    config.main("train", train.run)
    runtime.leave()

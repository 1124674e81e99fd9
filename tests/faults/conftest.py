"""A tiny world with latents, made once."""

import sys
from pathlib import Path

import pytest
import torch

from data_tools.make_toy_world import Recipe, write_world
from ldm_scale.core import weights
from ldm_scale.jobs import config

sys.path.insert(0, str(Path(__file__).parent))

from fault_runs import Launch, Toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Ready to train on."""
    found = Toy(tmp_path_factory.mktemp("toy"))
    write_world(found.path / "toy", Recipe(train=96, val=8, objects=1, size=32, shard_size=48, seed=0))
    encoding = found.overrides("precompute.min_psnr=0")
    torch.manual_seed(0)
    network = config.compose("precompute_latents", encoding).first_stage.build()
    weights.save(found.path / "kl", {"first_stage": {}}, network.state_dict())
    Launch("precompute_latents", encoding, world=1, log=found.path / "log.txt").finish()
    return found

"""Shared by all tests: one thread each, since pytest-xdist runs as many tests as there are cores; and a tiny world."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
# DeepSpeed's collectives are built once for all tests, those of launchers too, whose own default is on the host's disk.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_extensions/ldm_scale"))

sys.path.insert(0, str(Path(__file__).parent / "faults"))

if TYPE_CHECKING:
    from fault_runs import Toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> "Toy":
    """A tiny world with latents, ready to train on; made once for faults and launchers."""
    from fault_runs import make_toy  # it imports every job

    return make_toy(tmp_path_factory.mktemp("toy"))

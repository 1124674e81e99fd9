"""The Inception of FID with seeded random weights: the real code, never the real metric."""

from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ldm_scale.evaluation.features import INCEPTION_FILE


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FeatureExtractorInceptionV3]:
    """A folder with random weights under the published name, and torch-fidelity's own network with them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save({}, folder / "empty.pth")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], str(folder / "empty.pth")
        )
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, generator=torch.Generator().manual_seed(0))
    torch.save(network.state_dict(), folder / INCEPTION_FILE)
    return folder, network

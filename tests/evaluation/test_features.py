import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cleanfid.resize import build_resizer

from ldm_scale.core import tensors
from ldm_scale.evaluation.distribution import FeatureMoments, Gaussian, frechet_distance
from ldm_scale.evaluation.features import (
    INCEPTION_FILE,
    INCEPTION_SHA256,
    Features,
    InceptionFeatures,
    RandomFeatures,
    Resizing,
)

COLOURS = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1.0]])
GREYS = torch.tensor([-0.8, 0.0, 0.8])


def scenes(n: int, seed: int, *, colours: int = 4, shapes: int = 2, size: int = 32) -> torch.Tensor:
    """Pictures of one square or disc of about equal areas, anywhere, on a grey ground."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (n, 1, 1), generator=generator)

    colour, grey = draw(0, colours).flatten(), draw(0, len(GREYS)).flatten()
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    dy, dx = y - draw(8, size - 8), x - draw(8, size - 8)
    square, disc = (dy.abs() <= 5) & (dx.abs() <= 5), dy**2 + dx**2 <= 38
    inside = torch.where(draw(0, shapes) == 0, square, disc)[:, None]
    return torch.where(inside, COLOURS[colour][:, :, None, None], GREYS[grey][:, None, None, None])


def moments(network: Features, images: torch.Tensor) -> Gaussian:
    sums = FeatureMoments(network.dim)
    for batch in images.split(250):
        sums.add(network(batch))
    return sums.finish()


@pytest.fixture(scope="module")
def network() -> RandomFeatures:
    return RandomFeatures()


@pytest.fixture(scope="module")
def distance(network: RandomFeatures):
    reference = moments(network, scenes(1000, 1))
    return lambda images: frechet_distance(reference, moments(network, images))


def test_random_features_are_the_same_everywhere(network: RandomFeatures):
    """Scores logged as fd_random compare only while this digest stands."""
    assert network.digest == "4b3573d183f670b7e3e938411199d0545718d4c875466a191eb83d2e6ce9eef0"
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = RandomFeatures()
    assert again.digest == network.digest and torch.equal(state, torch.get_rng_state())
    images = scenes(4, 0)
    assert torch.equal(network(images), again(images))


def test_random_features_are_one_finite_float32_vector_per_image(network: RandomFeatures):
    images = scenes(8, 0)
    features = network(images)
    assert features.shape == (8, network.dim) and features.dtype == torch.float32
    assert 64 <= network.dim <= 128 and network.name == "fd_random"
    assert features.isfinite().all() and not features.requires_grad
    torch.testing.assert_close(torch.cat([network(image[None]) for image in images]), features)
    assert network(torch.zeros(1, 3, 16, 48)).isfinite().all()


def test_every_random_feature_varies(network: RandomFeatures):
    assert float(network(scenes(500, 0)).std(0).min()) > 1e-3


def test_random_features_need_room():
    with pytest.raises(ValueError, match="16 x 16"):
        RandomFeatures()(torch.zeros(1, 3, 8, 32))


def test_random_distance_falls_as_noise_leaves(distance):
    images, noise = scenes(1000, 2), torch.randn(1000, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    scores = [distance(images + share * noise) for share in (1.0, 0.3, 0.1, 0.05, 0.02, 0.0)]
    assert all(worse > 1.5 * better for worse, better in pairwise(scores)), scores


def test_random_distance_falls_as_blur_leaves(distance):
    images = scenes(1000, 2)
    blurred = [F.interpolate(F.avg_pool2d(images, k), scale_factor=k, mode="bilinear") for k in (8, 4, 2)]
    scores = [distance(x) for x in (*blurred, images)]
    assert all(worse > 1.5 * better for worse, better in pairwise(scores)), scores


def test_random_distance_sees_what_is_missing_or_wrong(distance):
    fair = distance(scenes(1000, 2))
    wrong = {
        "a colour is missing": scenes(1000, 2, colours=3),
        "all but one colour are missing": scenes(1000, 2, colours=1),
        "a shape is missing": scenes(1000, 2, shapes=1),
        "contrast is low": 0.9 * scenes(1000, 2),
        "red and blue are swapped": scenes(1000, 2, colours=2).flip(1),
        "always the same image": scenes(1, 2).expand(1000, -1, -1, -1),
    }
    for name, images in wrong.items():
        assert distance(images) > 1.5 * fair, name


def test_inception_features_are_those_of_torch_fidelity(inception):
    folder, theirs = inception
    images = scenes(3, 0, size=64)
    ours = InceptionFeatures(folder)
    features = ours(images)
    assert features.shape == (3, ours.dim) == (3, 2048) and features.dtype == torch.float32
    assert float(features.std(0).max()) > 0.01
    torch.testing.assert_close(features, theirs(tensors.to_uint8(images))[0])
    torch.testing.assert_close(ours.logits(features), theirs(tensors.to_uint8(images))[1])
    assert ours.logits(features).shape == (3, ours.classes) == (3, 1008)


def test_clean_resizing_is_that_of_clean_fid(inception):
    """Images that need no resizing are looked at alike; others as clean-fid resizes them, to the last bit."""
    reference, clean = (InceptionFeatures(inception[0], resizing) for resizing in Resizing)
    images = scenes(2, 0, size=299)
    torch.testing.assert_close(clean(images), reference(images))
    larger = tensors.to_uint8(scenes(1, 1, size=400))
    resized = build_resizer("clean")(larger[0].permute(1, 2, 0).numpy()).transpose(2, 0, 1)
    seen = []
    clean.network.Conv2d_1a_3x3.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    features = clean(tensors.from_uint8(larger))
    torch.testing.assert_close(seen[0][0], (torch.from_numpy(resized) - 128) / 128, rtol=0, atol=0)
    assert float((features - reference(tensors.from_uint8(larger))).abs().max()) > 1e-4
    assert clean.name == "fd_inception_clean" and clean.digest != reference.digest


def test_only_the_published_weights_give_fid(inception, monkeypatch: pytest.MonkeyPatch):
    network = InceptionFeatures(inception[0])
    assert network.name == "fd_inception"
    assert network.digest == hashlib.sha256((inception[0] / INCEPTION_FILE).read_bytes()).hexdigest()
    monkeypatch.setattr("ldm_scale.evaluation.features.INCEPTION_SHA256", network.digest)
    assert InceptionFeatures(inception[0]).name == "fid"


def test_the_published_weights_are_those_torch_fidelity_names():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert URL_INCEPTION_V3.rpartition("/")[2] == INCEPTION_FILE
    assert len(INCEPTION_SHA256) == 64 and INCEPTION_FILE.endswith(f"-{INCEPTION_SHA256[:8]}.pth")


def test_missing_weights_are_named_with_the_remedy(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/{INCEPTION_FILE}.*make fetch-weights"):
        InceptionFeatures(tmp_path)


class RunsCode:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_weights_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save(RunsCode(), tmp_path / INCEPTION_FILE)
    with pytest.raises(Exception, match=r"(?i)weights"):
        InceptionFeatures(tmp_path)
    assert not (tmp_path / "ran").exists()

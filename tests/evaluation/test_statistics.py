"""Statistics of sets of images, over one, two and three processes: against torch-fidelity, torchmetrics and ADM."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from collect_scores import images
from torch import nn
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ldm_scale.core import tensors
from ldm_scale.core.shares import ranges
from ldm_scale.evaluation.features import RandomFeatures, VggFeatures
from ldm_scale.evaluation.statistics import Collector, Score, Statistics, compare, load_reference, save_reference
from ldm_scale.first_stage.loss import VGG16_FILE

pytestmark = pytest.mark.filterwarnings("ignore:40 images for 120 features")

SCRIPT = Path(__file__).parent / "collect_scores.py"
COUNT, BATCH = 23, 4  # divided by no world times batch


def collected(tmp_path: Path, world: int, weights: Path | str = "") -> dict[str, float]:
    out = tmp_path / f"{world}.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), str(out), str(weights), str(COUNT), str(BATCH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads(out.read_text())
    return found


def taken(scores: list[Score], of: str = "real", count: int = 40) -> Statistics:
    collector = Collector(RandomFeatures(), count, scores)
    for start in range(0, count, 16):
        collector.add(start, collector.look(images(of, range(start, min(start + 16, count)))))
    return collector.finish()


@pytest.mark.slow
def test_scores_are_torch_fidelitys_and_do_not_depend_on_the_world(tmp_path: Path, inception):
    folder, theirs = inception
    alone = collected(tmp_path, 1, folder)
    for world in (2, 3):
        found = collected(tmp_path, world, folder)
        assert found.keys() == alone.keys()
        assert found == pytest.approx(alone, rel=1e-9, abs=1e-12)
    with torch.no_grad():
        sets = [theirs(tensors.to_uint8(images(of, range(COUNT)))) for of in ("generated", "real")]
    (generated, logits), (real, _) = sets
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, (generated.double(), real.double())), verbose=False)
    kid = kid_features_to_metric(generated, real, kid_subset_size=COUNT, kid_subsets=100, verbose=False)
    shares = prc_features_to_metric(generated, real, verbose=False)
    score = isc_features_to_metric(logits)
    expected = {
        "fd_inception": fid["frechet_inception_distance"],
        "kd_inception": kid["kernel_inception_distance_mean"],
        "precision_inception": shares["precision"],
        "recall_inception": shares["recall"],
        "inception_score_inception": score["inception_score_mean"],
        "inception_score_inception_std": score["inception_score_std"],
    }
    assert {name: alone[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    expected = torchmetrics_of(generated.double(), real.double())
    expected |= {"precision_inception": adm_share(generated, real), "recall_inception": adm_share(real, generated)}
    assert {name: alone[name] for name in expected} == pytest.approx(expected, rel=1e-4)


class Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """For torch-fidelity: bytes, one picture at a time."""

    def __init__(self, images_BCHW: torch.Tensor) -> None:
        self._pixels_BCHW = tensors.to_uint8(images_BCHW)

    def __len__(self) -> int:
        return len(self._pixels_BCHW)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self._pixels_BCHW[i]


class Seen(nn.Identity):
    """For torchmetrics: what it is given as images are the features of the network already."""

    num_features = 2048


def torchmetrics_of(generated: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    distance, kernel = FrechetInceptionDistance(Seen()), KernelInceptionDistance(Seen(), subsets=1, subset_size=COUNT)
    for metric in (distance.set_dtype(torch.float64), kernel.set_dtype(torch.float64)):
        metric.update(real, real=True)
        metric.update(generated, real=False)
    return {"fd_inception": float(distance.compute()), "kd_inception": float(kernel.compute()[0])}


def adm_share(these: torch.Tensor, by: torch.Tensor) -> float:
    """ADM's protocol: 3 neighbours on pooled Inception features, closed balls. Theirs is in half precision."""
    squared = [((by[:, None] - of[None]).double() ** 2).sum(-1).numpy() for of in (by, these)]
    radii = np.partition(squared[0], 3, axis=1)[:, 3]
    return float((squared[1] <= radii[:, None]).any(axis=0).mean())


@pytest.mark.slow
def test_precision_and_recall_on_vgg16_are_torch_fidelitys(tmp_path: Path):
    """Kynkaanniemi et al. 2019, from pictures to shares; seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(torchvision.models.vgg16().state_dict(), tmp_path / VGG16_FILE)
    file, count, scores = tmp_path / VGG16_FILE, 14, [Score.precision_recall]
    features, sets = VggFeatures(file), []
    for of in ("generated", "real"):
        collector = Collector(features, count, scores)
        for indices in ranges(count, BATCH):
            collector.add(indices.start, collector.look(images(of, indices)))
        sets.append(collector.finish())
    theirs = calculate_metrics(
        input1=Pictures(images("generated", range(count))), input2=Pictures(images("real", range(count))), prc=True,
        feature_extractor="vgg16", feature_extractor_weights_path=str(file), cuda=False, cache=False, verbose=False,
    )  # fmt: skip
    found = compare(*sets, scores, features.name)
    assert found == pytest.approx({f"{name}_vgg16": theirs[name] for name in ("precision", "recall")}, rel=1e-4)
    assert 0 < found["precision_vgg16"] < 1 or 0 < found["recall_vgg16"] < 1


def test_published_scores_have_the_names_of_papers():
    scores = [Score.frechet, Score.kernel, Score.precision_recall]
    one, other = taken(scores, "generated"), taken(scores)
    assert set(compare(one, other, scores, "fid")) == {"fid", "kid", "precision", "recall"}
    for suffix in ("_clean", "_random", "_inception"):
        first, second = ("fid", "kid") if suffix == "_clean" else ("fd", "kd")
        expected = {f"{name}{suffix}" for name in (first, second, "precision", "recall")}
        assert set(compare(one, other, scores, f"{first}{suffix}")) == expected
    assert set(compare(one, other, [Score.frechet], "fid")) == {"fid"}


def test_features_are_kept_only_where_a_score_needs_them():
    assert taken([Score.frechet]).features_ND is None and taken([Score.precision_recall]).gaussian is None
    kept = taken([Score.frechet, Score.kernel]).features_ND
    assert kept is not None
    torch.testing.assert_close(kept, RandomFeatures()(images("real", range(40))))


def test_a_network_that_does_not_classify_has_no_inception_score():
    with pytest.raises(ValueError, match=r"evaluation\.scores.*inception_score.*fd_random"):
        Collector(RandomFeatures(), 20, [Score.inception_score])


ORIGIN = {"features": "abc", "transform": {"size": 32}}


def test_a_reference_comes_back_as_it_was_written(tmp_path: Path):
    scores, path = [Score.frechet, Score.kernel], tmp_path / "reference.safetensors"
    written = taken(scores)
    save_reference(path, written, {**ORIGIN, "images": "toy"})
    read = load_reference(path, ORIGIN, scores)
    generated = taken(scores, "generated")
    assert compare(generated, read.statistics, scores, "x") == compare(generated, written, scores, "x")
    assert read.origin == {**ORIGIN, "images": "toy", "count": 40} and len(read.digest) == 64


def test_a_reference_that_does_not_fit_is_refused(tmp_path: Path):
    path = tmp_path / "reference.safetensors"
    with pytest.raises(FileNotFoundError, match=r"evaluation\.reference=.*write_reference="):
        load_reference(path, ORIGIN, [])
    save_reference(path, taken([Score.frechet]), ORIGIN)
    other = {"features": "abc", "transform": {"size": 64}}
    with pytest.raises(ValueError, match=r"transform: \{'size': 32\} there, \{'size': 64\} here"):
        load_reference(path, other, [Score.frechet])
    with pytest.raises(ValueError, match=r"written without what kernel of evaluation\.scores need"):
        load_reference(path, ORIGIN, [Score.frechet, Score.kernel])
    save_reference(path, taken([Score.kernel]), ORIGIN)
    with pytest.raises(ValueError, match=r"written without what frechet of evaluation\.scores need"):
        load_reference(path, ORIGIN, [Score.frechet, Score.kernel])

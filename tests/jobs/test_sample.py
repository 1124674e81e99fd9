"""Drawing with models of every kind, from little model directories; going on after a stop; one process against two."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.conditioning.tokenizer import train_wordpiece
from ldm_scale.diffusion.objective import ObjectiveConfig
from ldm_scale.diffusion.schedule import ScheduleConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.interop import bundle
from ldm_scale.jobs import config, sample
from ldm_scale.latent_diffusion.model import DiffusionConfig
from ldm_scale.nn.unet import UNetConfig

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a red circle", "a blue square"]
LATENT_CHANNELS = 4
WIDTH = 8
QUICK = ["size=[8,16]", "sampler.steps=2", "batch=2"]
Draw = Callable[..., list[Path]]


def conditioners(path: Path) -> dict[str, ConditionerConfig | None]:
    train_wordpiece(CAPTIONS, 60, path / "words.json")
    shape: dict[str, Any] = {"width": WIDTH, "layers": 1, "heads": 2, "head_dim": 4}
    return {
        "text": TextTransformerConfig(**shape, vocab_size=60, max_length=8, tokenizer=str(path / "words.json")),
        "class": ClassLabelConfig(classes=10, width=WIDTH),
        "layout": LayoutConfig(**shape, max_objects=2, vocab_size=64),
        "label_map": LabelMapConfig(classes=5, halvings=1),
        "low_resolution": ConcatConfig(channels=3),
        "masked_image": ConcatConfig(channels=LATENT_CHANNELS + 1),
        "unconditional": None,
    }


def shaken(module: nn.Module) -> nn.Module:
    """Parameters moved away from their start, so that zero-initialised branches count."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 25
            parameter += torch.randn_like(parameter) / fan**0.5
    return module


def little(told: ConditionerConfig | None) -> bundle.Bundle:
    """A model of random weights with f = 2, as `ldm_scale.interop` would import one."""
    torch.manual_seed(0)
    conditioner = None if told is None else told.build()
    widths = (0, 0, 0) if conditioner is None else (conditioner.context_dim, conditioner.concat_channels, 0)
    stage = AutoencoderKLConfig(channels=8, channel_mult=[1, 1], num_res_blocks=1, norm_groups=4, scale=0.5)
    unet = UNetConfig(
        in_channels=LATENT_CHANNELS + widths[1], out_channels=LATENT_CHANNELS, context_dim=widths[0], model_channels=8,
        channel_mult=[1, 2], attention_factors=[2], head_channels=8, norm_groups=4, num_res_blocks=1,
    )  # fmt: skip
    return bundle.Bundle(
        first_stage=shaken(stage.build()),
        unet=shaken(unet.build()),
        conditioner=None if conditioner is None else shaken(conditioner),
        diffusion=DiffusionConfig(schedule=ScheduleConfig(), objective=ObjectiveConfig()),
        latent_scale=0.5,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of model directories, by kind, and of pictures to draw from."""
    path = tmp_path_factory.mktemp("models")
    for kind, told in conditioners(path).items():
        bundle.save(little(told), path / kind)
    rng = np.random.default_rng(0)
    for name, shape in (("one/a", (8, 16, 3)), ("two/a", (8, 16, 3)), ("two/b", (10, 16, 3)), ("small", (4, 8, 3))):
        file = path / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file)
    mask = np.zeros((8, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(path / "mask.png")
    Image.fromarray(rng.integers(0, 5, (8, 16), dtype=np.uint8)).save(path / "map.png")
    boxes = [{"class_id": 3, "box": [0.1, 0.2, 0.5, 0.6]}]
    (path / "boxes.json").write_text(json.dumps([boxes, {"objects": boxes, "crop": [0, 0, 0.5, 1]}]))
    return path


@pytest.fixture
def draw(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """`draw(kind, override ...)` runs the job in this process; returns the pictures of `out` (`tmp_path/out`)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.chdir(models)

    def run(kind: str, *overrides: str, out: str = "out", expect: int = 0) -> list[Path]:
        job = config.compose("sample", [f"model={models / kind}", f"out={tmp_path / out}", *QUICK, *overrides])
        with pytest.raises(SystemExit) as left:
            sample.run(job)
        assert left.value.code == expect
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return numbered(tmp_path / out)

    return run


def numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if path.stem.isdigit())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")}


ASKED = {
    "text": (["prompts=[a red circle,a blue square]"], ["prompts=[a blue square,a red circle]"]),
    "class": (["classes=[1,2]"], ["classes=[2,1]"]),
    "layout": (["boxes=boxes.json"], None),
    "label_map": (["label_maps=map.png", "images_per_prompt=2"], None),
    "low_resolution": (["low_resolution=small.png", "images_per_prompt=2"], None),
    "masked_image": (["images=two", "masks=mask.png"], None),
    "unconditional": (["count=2"], None),
}


@pytest.mark.parametrize("kind", ASKED)
def test_every_kind_of_model_draws(draw: Draw, kind: str) -> None:
    first, swapped = ASKED[kind]
    drawn = [pixels(path) for path in draw(kind, *first)]
    assert [image.shape for image in drawn] == [(8, 16, 3)] * 2
    assert not np.array_equal(*drawn) and all(image.std() > 1 for image in drawn)
    if swapped is not None:
        others = draw(kind, *swapped, out="other")
        assert all((image != pixels(other)).any() for image, other in zip(drawn, others, strict=True))


@pytest.mark.parametrize("kind", ["text", "masked_image", "unconditional"])
def test_inpainting_keeps_what_is_known(draw: Draw, models: Path, kind: str) -> None:
    prompts = ["prompts=[a red circle]"] if kind == "text" else []
    (path,) = draw(kind, "images=one", "masks=mask.png", *prompts)
    given = pixels(models / "one" / "a.png")
    assert np.array_equal(pixels(path)[:, :8], given[:, :8])
    assert (pixels(path)[:, 8:] != given[:, 8:]).mean() > 0.5


def test_start_guide_and_tiles_each_change_the_picture(draw: Draw) -> None:
    def drawn(out: str, *overrides: str) -> np.ndarray:
        (path,) = draw("unconditional", *overrides, out=out)
        return pixels(path)

    wide = ["size=[16,32]", "count=1"]
    ways = [
        drawn("plain", *wide),
        drawn("start", *wide, "start=one/a.png", "strength=0.5"),
        drawn("guided", *wide, "guide.images=small.png", "guide.scale=0.1"),
        drawn("tiles", *wide, "tiles.size=8"),
    ]
    assert all(way.shape == (16, 32, 3) for way in ways)
    assert len({way.tobytes() for way in ways}) == len(ways)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms", "dpm_solver"])
def test_every_sampler_is_there_by_name(draw: Draw, sampler: str) -> None:
    (path,) = draw("unconditional", "count=1", f"sampler={sampler}", "sampler.steps=3")
    with Image.open(path) as image:
        assert json.loads(image.info["sampler"])["schema"] == sampler


def test_a_picture_says_how_it_was_made(draw: Draw, models: Path) -> None:
    paths = draw("text", "prompts=[a red circle,a blue square]", "seed=5", "sampler.guidance=3")
    with Image.open(paths[1]) as image:
        said = dict(image.info)
    assert (said["prompt"], said["seed"], said["index"], said["size"]) == ("a blue square", "5", "1", "[8, 16]")
    assert (said["steps"], said["guidance"]) == ("2", "3.0")
    assert json.loads(said["sampler"]).items() >= {"schema": "ddim", "steps": 2, "guidance": 3.0, "eta": 0.0}.items()
    held = bundle.load(models / "text")
    assert said["first_stage_sha256"] == held.first_stage.digest()
    assert len(said["weights_sha256"]) == len(said["request"]) == 64
    assert Image.open(paths[0].parent / "grid.png").width > 2 * 128


def test_the_default_directory_is_the_request_s_own(models: Path, draw: Draw, capsys: pytest.CaptureFixture) -> None:
    for seed in (0, 1):
        draw("unconditional", "count=1", "out=null", f"seed={seed}")
    folders = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("samples")]
    assert len(set(folders)) == 2
    assert all(Path(folder).parent == models / "unconditional" / "samples" for folder in folders)


def test_what_is_there_is_not_drawn_again(draw: Draw) -> None:
    paths = draw("unconditional", "count=5")
    before, times = digests(paths[0].parent), [path.stat().st_mtime_ns for path in paths]
    paths[2].unlink()
    paths[4].unlink()
    draw("unconditional", "count=5")
    assert digests(paths[0].parent) == before
    kept = [path.stat().st_mtime_ns == then for path, then in zip(paths, times, strict=True)]
    assert kept == [True, True, False, True, False]


def test_more_of_the_same_goes_on_and_another_request_is_refused(draw: Draw) -> None:
    times = [path.stat().st_mtime_ns for path in draw("unconditional", "count=2")]
    paths = draw("unconditional", "count=3")
    assert len(paths) == 3 and [path.stat().st_mtime_ns for path in paths[:2]] == times
    for other in (["count=3", "seed=1"], ["count=3", "sampler.steps=3"], ["count=2"]):
        with pytest.raises(ValueError, match=r"0000\d\.png is of another request .* Choose another out="):
            draw("unconditional", *other)


@pytest.mark.parametrize(
    ("kind", "overrides", "said"),
    [
        ("unconditional", ["count=1", "size=null"], "give size="),
        ("unconditional", ["count=1", "size=[8,15]"], "multiple"),
        ("unconditional", ["count=1", "size=[8,14]"], "multiples of 4"),
        ("low_resolution", ["low_resolution=two", "size=null"], "several sizes"),
        ("unconditional", ["count=1", "guide.images=two", "guide.scale=1", "batch=2"], "guide.images= has pictures"),
        ("label_map", ["label_maps=one/a.png"], "no label map"),
        ("absent", ["count=1"], "has no first_stage"),
        ("unconditional", ["count=1", "guide.images=small.png", "guide.scale=1", "guide.distance=lpips"], "lpips"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Draw, kind: str, overrides: list[str], said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        draw(kind, *overrides)


def test_super_resolution_is_as_large_as_its_picture_says(draw: Draw, models: Path) -> None:
    assert pixels(draw("low_resolution", "low_resolution=small.png", "size=null")[0]).shape == (8, 16, 3)
    assert pixels(draw("low_resolution", "low_resolution=small.png", "size=[16,16]", out="o")[0]).shape == (16, 16, 3)


def command(models: Path, out: Path, *, processes: int = 1) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        accelerate = str(Path(sys.executable).parent / "accelerate")
        flags = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
        launch = [accelerate, "launch", "--num_processes", str(processes), *flags]
    model = [f"model={models}/text", "prompts=[a red circle]", "images_per_prompt=11", f"out={out}"]
    return [*launch, str(ROOT / "sample.py"), *model, *QUICK, "sampler.steps=20"]


def launched(*words: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment = {**kept, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(*words: str) -> str:
    process = launched(*words)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def undisturbed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    said = finished(*command(models, out))
    assert f"samples  {out} (PNG: 11;" in said and str(out / "grid.png") in said
    return out


@pytest.mark.slow
def test_two_processes_write_the_same_files(models: Path, undisturbed: Path, tmp_path: Path) -> None:
    said = finished(*command(models, tmp_path, processes=2))
    assert said.count("samples  ") == 1
    assert len(digests(tmp_path)) == 12
    assert digests(tmp_path) == digests(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_a_stopped_job_goes_on(
    models: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = launched(*command(models, tmp_path))
    while len(numbered(tmp_path)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status, said
    there = {path: path.stat().st_mtime_ns for path in numbered(tmp_path)}
    assert 3 <= len(there) < 11
    finished(*command(models, tmp_path))
    assert digests(tmp_path) == digests(undisturbed)
    assert all(path.stat().st_mtime_ns == then for path, then in there.items())

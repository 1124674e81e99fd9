"""What a frozen text encoder says of captions, cached with the latents: as if it ran now; another one is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from test_precompute import SIZE, write_images
from tiny_clip import write_clip

from data_tools import remove, verify
from ldm_scale.conditioning.clip_text import CachedTextConditioner
from ldm_scale.core import weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.data.cache import NPY_HEADER_BYTES, TEXT, CacheManifest, LatentCache, require_text
from ldm_scale.data.loader import Loader
from ldm_scale.data.order import Order
from ldm_scale.data.shards import CorruptSample
from ldm_scale.data.sources import LatentSource
from ldm_scale.interop import bundle
from ldm_scale.jobs import config, export, loading, precompute
from ldm_scale.jobs.image_tars import ImageTars
from ldm_scale.jobs.stages import DiffusionStage
from ldm_scale.latent_diffusion.model import LatentDiffusion
from ldm_scale.training.checkpoint_files import read_consolidated

CAPTIONS = [f"caption {i}" for i in range(12)]
Encode = Callable[..., LatentCache]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a little CLIP."""
    return write_clip(tmp_path_factory.mktemp("clip") / "one")


@pytest.fixture
def job(tmp_path: Path, clip: list[str]) -> Callable[..., Any]:
    """Latents are the pixels; captions are those of a little CLIP."""
    weights.save(tmp_path / "identity", {"first_stage": {}}, {})
    write_images(tmp_path / "images", (5, 7))

    def compose(*overrides: str) -> Any:
        return config.compose(
            "precompute_latents",
            [
                "+experiment=stable_diffusion_v1", "scale=toy", *clip, "first_stage=identity", "unet.in_channels=3",
                "unet.out_channels=3", "unet.context_dim=16", f"first_stage.checkpoint={tmp_path}/identity",
                f"data.images={tmp_path}/images", f"data.latents={tmp_path}/latents", f"data.transform.size={SIZE}",
                "data.threads=1", "precompute.batch=4", "precompute.text_embeddings=true", *overrides,
            ],
        )  # fmt: skip

    return compose


def test_the_cache_holds_what_the_encoder_says_to_float16_rounding(job: Callable[..., Any], encode: Encode) -> None:
    cache = encode()
    encoder = loading.text_encoder(job().conditioning)
    assert encoder is not None and cache.n == 12 and cache.holds_text
    wanted = encoder.encode(CAPTIONS).numpy()
    held = np.empty((12, 24, 16), np.float16)
    _, captions, _ = cache.read(np.arange(12), text=held)
    assert captions == CAPTIONS and wanted.std(axis=0).max() > 0.1, "captions differ"
    np.testing.assert_allclose(held, wanted, rtol=2**-10, atol=1e-6)
    plain = list(webdataset.WebDataset(f"{cache.folder}/00001.tar", shardshuffle=False).decode())
    np.testing.assert_array_equal(plain[3][TEXT], held[8])
    text = cache.manifest.text
    assert text is not None and text["shape"] == [24, 16] and text["sha256"] == encoder.digest()


def test_batches_hold_them_as_inputs_in_reused_buffers(encode: Encode) -> None:
    cache = encode()
    held = np.empty((12, 24, 16), np.float16)
    cache.read(np.arange(12), text=held)
    order = Order(n=12, seed=3)
    with Loader(LatentSource(cache, order, text=True), global_batch=4, micro_batch=4) as loader:
        batches, places = loader.batches(0), set()
        for step in range(12):
            batch = next(batches)
            assert batch.inputs is not None and batch.inputs.dtype == torch.float16
            np.testing.assert_array_equal(batch.inputs, held[order(np.arange(4 * step, 4 * step + 4))])
            places.add(batch.inputs.data_ptr())
    assert len(places) <= 5


@torch.no_grad()
def test_the_loss_is_that_of_the_encoder_run_in_the_step(job: Callable[..., Any], encode: Encode) -> None:
    """To 1e-4 of each loss, since tokens are rounded to float16 (9e-6 was measured); with dropped captions too."""
    cache, encoder = encode(), loading.text_encoder(job().conditioning)
    assert encoder is not None
    torch.manual_seed(0)
    trained = job().latent_diffusion.build_trained()
    stand_in = trained.conditioner
    assert isinstance(stand_in, CachedTextConditioner) and not list(stand_in.parameters())
    for parameter in trained.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    stand_in.use(encoder)
    whole = LatentDiffusion(trained.config, encoder)
    whole.unet = trained.unet
    drop_B, t_B = torch.arange(12) % 3 == 0, torch.arange(12) * 80
    moments, text = np.empty((12, 3, SIZE, SIZE), np.float16), np.empty((12, 24, 16), np.float16)
    cache.read(np.arange(12), moments, text=text)
    z_BCHW, noise_BCHW = torch.from_numpy(moments).float(), torch.randn(12, 3, SIZE, SIZE)
    cached = trained(z_BCHW, noise_BCHW, t_B, stand_in.dropped(torch.from_numpy(text), drop_B))
    run_now = whole(z_BCHW, noise_BCHW, t_B, encoder.dropped(encoder.prepare(CAPTIONS), drop_B))
    undropped = whole(z_BCHW, noise_BCHW, t_B, encoder.prepare(CAPTIONS))
    torch.testing.assert_close(cached, run_now, rtol=1e-4, atol=0)
    assert ((undropped - run_now).abs() > 1e-2 * run_now)[drop_B].any(), "the model hears its captions"


def test_the_estimate_counts_them(job: Callable[..., Any], tmp_path: Path) -> None:
    tars = ImageTars(f"{tmp_path}/images", None, ("image",))
    sizes = [
        precompute.Estimate.of(job(f"precompute.text_embeddings={wanted}"), tars, tmp_path / "latents")
        for wanted in (False, True)
    ]
    assert sizes[1].bytes - sizes[0].bytes == sizes[0].images * (512 + 1024)  # a header, and 24 x 16 x 2 + 128 bytes


def test_another_encoder_and_a_cache_without_one_are_refused(
    job: Callable[..., Any], encode: Encode, tmp_path: Path
) -> None:
    encode("precompute.text_embeddings=false")
    with pytest.raises(ValueError, match=r"precompute\.text_embeddings=None \(now clip_text \w{12}\)"):
        encode()
    wanted = identity(job())
    with pytest.raises(ValueError, match=r"holds no embeddings .*precompute\.text_embeddings=true"):
        require_text(LatentCache.open(f"{tmp_path}/latents"), wanted)
    cache = encode("precompute.overwrite=true")
    require_text(cache, wanted)
    write_clip(tmp_path / "two", seed=2)
    other = job(f"conditioning.model={tmp_path}/two")
    with pytest.raises(ValueError, match=r"another text encoder: sha256=\w{12} \(this run: \w{12}\)\. Point"):
        require_text(cache, identity(other))
    with pytest.raises(ValueError, match=r"precompute\.text_embeddings=clip_text \w{12} \(now clip_text \w{12}\)"):
        encode(f"conditioning.model={tmp_path}/two")
    longer = {**wanted, "config": {**wanted["config"], "max_length": 12}, "shape": [12, 16]}
    with pytest.raises(ValueError, match=r"shape=\[24, 16\] \(this run: \[12, 16\]\), max_length=24 \(this run: 12\)"):
        require_text(cache, longer)


def identity(one: Any) -> dict[str, Any]:
    found = precompute.identity(one, one.first_stage.build(), loading.text_encoder(one.conditioning)).text
    assert found is not None
    return found


def test_damaged_and_removed_embeddings_are_not_read(encode: Encode) -> None:
    cache = encode()
    assert remove.main([cache.folder, "--key", "000001", "--reason", "asked"]) == 0
    assert verify.main([cache.folder, "--level", "decode"]) == 0
    shard = Path(cache.folder) / "00001.tar"
    data = bytearray(shard.read_bytes())
    place = data.index(b"000007.text.npy") + 512 + NPY_HEADER_BYTES
    data[place] ^= 1
    shard.write_bytes(data)
    moments, text = np.empty((1, 3, SIZE, SIZE), np.float16), np.empty((1, 24, 16), np.float16)
    LatentCache.open(cache.folder).read(np.array([7]), moments)
    with pytest.raises(CorruptSample, match=f"checksum_{TEXT}"):
        LatentCache.open(cache.folder).read(np.array([7]), moments, text=text)
    assert verify.main([cache.folder, "--level", "hash"]) == 1


@pytest.mark.slow
def test_a_training_reads_them_and_holds_no_encoder(world: Any, clip: list[str], monkeypatch: Any) -> None:
    """Precomputed, trained for 3 steps, drawn from, exported, branched from, by the commands a user types."""
    tiny = [
        "scale=toy", *clip, f"data.images={world.path}/toy/train", f"data.validation={world.path}/toy/val",
        "first_stage.channels=8", f"first_stage.checkpoint={world.path}/runs/autoencoder_kl_f4/toy",
        f"data.latents={world.path}/clip_latents", "unet.model_channels=16", "unet.norm_groups=8",
        "unet.num_heads=2", "unet.context_dim=16", "evaluation.images=4", "evaluation.batch=4", "evaluation.grid=4",
        "sampler.steps=2",
    ]  # fmt: skip
    experiment = "+experiment=stable_diffusion_v1"
    steps = ["global_batch=8", "micro_batch=8", "total_images=24", "optimizer.warmup_images=8", "every.save=24",
             "every.evaluate=24", "every.sample=24", "every.log=8", "ema_half_lives=[8]"]  # fmt: skip
    without = [*tiny, f"data.latents={world.path}/latents"]
    job = config.compose("train", [experiment, *without, *steps])
    with pytest.raises(ValueError, match="holds no embeddings of its captions"):
        DiffusionStage(job, torch.device("cpu"), lambda *bad: None, lambda: None)
    encode_all = world.job("precompute_latents.py", experiment, *tiny, "precompute.min_psnr=0")
    assert "24 x 16 float16 each" in world.run([*encode_all, "precompute.text_embeddings=true"])
    train = world.job("train.py", experiment, *tiny, *steps)
    world.run(train)
    run = RunDir(world.path / "runs" / "stable_diffusion_v1" / "toy")
    assert all(np.isfinite(line["train/loss"]) for line in run.read_lines(run.metrics) if "train/loss" in line)
    state, tensors = read_consolidated(run.checkpoints / "images_000000000024", "weight")
    text = CacheManifest.read_from(f"{world.path}/clip_latents").text
    assert text is not None and state["text_encoder_sha256"] == text["sha256"]
    assert not [name for name in tensors if not name.startswith("unet.")]
    drawing = world.job("sample.py", f"run_dir={run.path}", "prompts=[a small red circle]", f"out={world.path}/drawn")
    world.run([*drawing, "size=[32,32]"])
    assert len(list((world.path / "drawn").glob("0*.png"))) == 1
    monkeypatch.chdir(world.path)
    assert export.main([str(run.path), str(world.path / "exported")]) == 0
    loaded = loading.TrainingRun(run, name="latest", which="ema").load(torch.device("cpu")).model.state_dict()
    assert "conditioner.transformer.final_layer_norm.weight" in loaded
    for whole in (bundle.load(world.path / "exported"), bundle.load(run.path)):
        held = whole.latent_diffusion().state_dict()
        assert held.keys() == loaded.keys() and all(torch.equal(held[name], loaded[name]) for name in loaded)
    world.run([*train, "name=branch", "total_images=16", f"init={world.path}/exported", "every.evaluate=0"])
    write_clip(Path(clip[0].partition("=")[2]), seed=3)
    with pytest.raises(ValueError, match=f"was trained on text encoder {text['sha256'][:12]}, but .* now holds"):
        loading.TrainingRun(run, name="latest", which="ema").load(torch.device("cpu"))

"""The main job, end to end and small, by the commands a user types: from shards to samples, scores and W&B."""

import fnmatch
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.core import rng, storage, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.tensors import to_uint8
from ldm_scale.first_stage.base import Moments, MomentsKind
from ldm_scale.jobs import config, dashboard, loading
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.stages import Stage, stage_of
from ldm_scale.jobs.summary import closing
from ldm_scale.tracking.panels import OTHERS, PANELS, layout, section
from ldm_scale.training.checkpoint_files import find, read_consolidated, read_state

PARTS = ("down", "mid", "up", "cross_attention", "ends", "text")
NAMES = (  # design.md section 7
    {"train/loss", "train/lr", "train/grad_norm", "train/images_seen", "train/clipped", "train/global_batch"}
    | {f"train/loss_t{bucket}00" for bucket in range(10)}
    | {name for part in PARTS for name in (f"train/{part}_grad_norm", f"train/update_{part}")}
    | {"train/ema_distance_32"}
    | {f"data/latent_{what}" for what in ("mean", "std", "mean_expected", "std_expected")}
    | {f"data/caption_{what}" for what in ("tokens", "truncated", "empty")}
    | {f"perf/{what}" for what in ("save_s", "disk_free_gb", "unsaved_images", "unsaved_minutes")}
    | {f"perf/{name}" for name in ("images_per_s", "images_per_s_per_gpu", "mfu", "data_wait", "step_ms", "memory_gb")}
    | {"val/loss", "val/loss_raw"}
    | {f"val/loss{weights}_t{bucket}00" for weights in ("", "_raw") for bucket in range(10)}
    | {"eval/fd_random", "eval/caption_accuracy"}
)

OWN_MS = ("own_ms", "own_ms_min", "own_ms_median", "own_ms_max")
ELSEWHERE = (  # what panels say of trainings that are none of these
    "several processes", "several sources", "caption files", "VQ first stages", "first stages with a discriminator",
    "with Inception's weights", "with CLIP's weights", "with LPIPS's weights", "GPUs", "GPUs with ECC",
    "remote shards",
    "with `kernel` in evaluation.scores", "once there are some; events `unread` have keys",
)  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(world: Any) -> RunDir:
    """A whole tiny training."""
    world.run(world.tiny_training("name=undisturbed", "tracker.artifacts=references"))
    return RunDir(world.path / "runs" / "txt2img_laion" / "undisturbed")


def everything(run_dir: RunDir) -> dict[str, torch.Tensor]:
    """Weights, moments and averages at the end of a run, by kind and name."""
    newest = find(run_dir.checkpoints)
    kinds = ("weight", "exp_avg", "exp_avg_sq", "ema/32")
    return {f"{kind}:{name}": t for kind in kinds for name, t in read_consolidated(newest, kind)[1].items()}


def assert_same(one: RunDir, other: RunDir) -> None:
    ours, theirs = everything(one), everything(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def curve(run_dir: RunDir, name: str) -> list[tuple[int, float]]:
    return [(line["images_seen"], line[name]) for line in run_dir.read_lines(run_dir.metrics) if name in line]


def recorded(run_dir: RunDir, *options: str) -> str:
    """What W&B's own tool reads in its files of a run, as JSON."""
    (offline,) = run_dir.wandb.glob("offline-run-*")
    leet = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", *options, str(offline)]
    return subprocess.run(leet, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_run_directory_tells_the_whole_story(undisturbed: RunDir) -> None:
    logged = {name for line in undisturbed.read_lines(undisturbed.metrics) for name in line}
    assert logged >= NAMES
    assert storage.read_json(undisturbed.status)["state"] == "finished"
    assert [images for images, _ in curve(undisturbed, "train/loss")] == [16, 32, 48, 64, 80, 96]
    assert [images for images, _ in curve(undisturbed, "eval/fd_random")] == [0, 48, 96]
    dropped = [share * 8 for _, share in curve(undisturbed, "train/caption_dropout")]
    assert len(dropped) == 6 and set(dropped) <= set(range(8))  # of a batch of 8, a tenth on average
    assert undisturbed.report.read_text().lower().startswith("<!doctype html>")
    pictures = sorted(undisturbed.media.glob("samples__grid/*.png"))
    assert [picture.stem for picture in pictures] == ["000000000000", "000000000096"]
    scored = [line for line in undisturbed.read_lines(undisturbed.events) if line["event"] == "evaluation"]
    assert {"n", "reference", "features", "sampler", "steps", "guidance", "weights"} <= scored[-1].keys()
    assert [line["weights"] for line in scored] == ["ema/32", "raw"] * 3
    (averaged, raw) = (curve(undisturbed, name) for name in ("val/loss", "val/loss_raw"))
    assert averaged[0] == raw[0] and averaged[-1] != raw[-1]


@pytest.mark.slow
def test_the_newest_batches_are_shown_as_the_unet_was_given_them(world: Any, undisturbed: RunDir) -> None:
    """The first of the last batch: drawn from its posterior and scaled as in its step, decoded, to a grey value."""
    overrides = world.tiny_training("name=undisturbed")[2:]
    job: TrainJob = config.compose("train", overrides)
    source = job.data.latent_source(job.data.open_latents(), job.seed)
    at = torch.tensor([88])
    moments = Moments.unpack(source.read(at.numpy()).moments, MomentsKind.GAUSSIAN)
    noise = rng.normal(job.seed, "diffusion/posterior", at, tuple(moments.mean.shape[1:]))
    image = loading.first_stage(job.first_stage).decode(moments.sample(noise)).clamp(-1, 1)
    expected = to_uint8(image[0]).permute(1, 2, 0).detach().numpy().astype(int).repeat(4, 0).repeat(4, 1)
    (file,) = undisturbed.media.glob("samples__eaten/*.png")  # none at image 0: nothing had been given
    assert file.stem == "000000000096"
    page = np.asarray(Image.open(file)).astype(int)
    apart = [np.abs(page[top : top + 128, 16:144] - expected).max() for top in range(16, 80)]
    assert min(apart) <= 1


@pytest.mark.slow
def test_the_closing_words_say_what_to_type(undisturbed: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    closing(undisturbed)
    said = capsys.readouterr().out
    assert f"python sample.py run_dir={undisturbed.path} 'prompts=[a caption]'" in said
    assert f"wandb leet inspect --summary {undisturbed.wandb}" in said


@pytest.mark.slow
def test_what_a_training_leaves_to_wandb(undisturbed: RunDir) -> None:
    """The artifacts that were asked for, and a row of the table for each sample."""
    records = [json.loads(line) for line in recorded(undisturbed).splitlines()]
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    files = {one["type"]: {file["path"]: file for file in one["manifest"]["contents"]} for one in artifacts}
    (weights_file,) = (file for name, file in files["weights"].items() if name.endswith(".safetensors"))
    assert Path(weights_file["ref"].removeprefix("file://")).stat().st_size == int(weights_file["size"])
    told, manifests = storage.read_json(undisturbed.config), files["manifests"]
    assert manifests.keys() == {"config.json", "repro.json", "latents.json", "evaluation.json"}
    cache = storage.read_json(Path(told["data"]["latents"]) / "manifest.json")
    assert storage.read_json(manifests["latents.json"]["local_path"]) == cache
    assert storage.read_json(manifests["evaluation.json"]["local_path"])["reference"]
    table = storage.read_json(files["run_table"]["samples/table.table.json"]["local_path"])["data"]
    assert len(table) == told["evaluation"]["grid"] and all("background" in row[1] for row in table)
    assert {(row[0], row[3]) for row in table} == {("samples/grid", "ema/32")}


@pytest.mark.slow
def test_every_panel_has_its_data_and_the_workspace_names_nothing_else(world: Any, undisturbed: RunDir) -> None:
    logged, first_stage = dashboard.logged(undisturbed), RunDir(world.path / "runs" / "autoencoder_kl_f4" / "toy")
    for panel in PANELS:
        of_both = logged | (dashboard.logged(first_stage) if panel.note == "first stages" else set())
        missing = [name for name in panel.names if not fnmatch.filter(of_both, name)]
        if panel.note not in ELSEWHERE and panel.names:
            assert len(missing) < len(panel.names), f"{panel.title} has no data"
    assert [own for panel, own in layout(logged - {"train/images_seen"}) if section(panel) == OTHERS] == []
    made = dashboard.workspace(logged, entity="someone", project="ldm_scale")
    plots = [plot for part in made.sections for plot in part.panels]
    shown = {name for plot in plots for name in (getattr(plot, "y", None) or getattr(plot, "media_keys", None) or [])}
    assert shown == logged - {"train/images_seen"}


@pytest.mark.slow
def test_wandb_shows_the_same_names(undisturbed: RunDir) -> None:
    said = json.dumps(json.loads(recorded(undisturbed, "--summary")))
    assert [name for name in sorted(NAMES | {"samples/grid", "samples/progressive"}) if f'"{name}"' not in said] == []


@pytest.mark.slow
def test_sigkill_and_the_same_command_again_end_with_the_same_weights(world: Any, undisturbed: RunDir) -> None:
    killed = RunDir(world.path / "runs" / "txt2img_laion" / "killed")
    command = world.tiny_training("name=killed")
    saved = killed.checkpoints / "images_000000000032" / "complete.json"
    assert world.interrupted(command, saved.exists, signal.SIGKILL) == -signal.SIGKILL
    assert storage.read_json(killed.status)["state"] == "running"
    world.run(command)
    assert [line["event"] for line in killed.read_lines(killed.events)].count("resume") == 1
    assert_same(undisturbed, killed)
    for name in ("train/loss", "eval/fd_random", "val/loss"):
        assert curve(killed, name) == curve(undisturbed, name)


@pytest.mark.slow
def test_sigterm_saves_exits_75_and_resumes(world: Any, undisturbed: RunDir) -> None:
    stopped = RunDir(world.path / "runs" / "txt2img_laion" / "stopped")
    command = world.tiny_training("name=stopped")
    assert world.interrupted(command, lambda: len(curve(stopped, "train/loss")) > 0, signal.SIGTERM) == 75
    status = storage.read_json(stopped.status)
    assert (status["state"], find(stopped.checkpoints).name) == ("preempted", f"images_{status['images']:012d}")
    world.run(command)
    assert_same(undisturbed, stopped)
    for name in ("train/loss", "train/loss_t500", "train/clipped", "train/update_text", "eval/fd_random"):
        assert curve(stopped, name) == curve(undisturbed, name)


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_a_changed_one_is_refused(world: Any, undisturbed: RunDir) -> None:
    before = undisturbed.metrics.read_bytes()
    assert "is finished" in world.run(world.tiny_training("name=undisturbed"))
    assert undisturbed.metrics.read_bytes() == before
    said = world.refusal(world.tiny_training("name=undisturbed", "seed=1"))
    assert "seed=0 (now 1)" in said
    assert "name=ANOTHER_NAME" in said
    said = world.refusal(world.tiny_training("name=undisturbed", "optimizer.learning_rate=1e-5"))
    assert "amend=true" in said


def assembled_s(run_dir: RunDir) -> float:
    """Seconds of the phase of starting that has W&B in it."""
    return next(event["assembly"] for event in run_dir.read_lines(run_dir.events) if event["event"] == "startup")


@pytest.mark.slow
def test_with_a_key_and_no_network_training_starts_within_15_s_and_is_recorded_offline_without_secrets(
    world: Any,
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        where = f"http://127.0.0.1:{closed.getsockname()[1]}"
        out = world.run(
            world.autoencoder("name=keyed", "tracker.alert_command='cat # https://me:hunter2@hooks?token=t0ken'"),
            WANDB_MODE="online", WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL=where,
        )  # fmt: skip
    run_dir = RunDir(world.path / "runs" / "autoencoder_kl_f4" / "keyed")
    assert "is unreachable; this run is recorded offline" in out
    assert assembled_s(run_dir) < 15 + assembled_s(RunDir(run_dir.path.with_name("toy")))  # which had no key to try
    assert [images for images, _ in curve(run_dir, "train/loss")] == [64]
    (folder,) = run_dir.wandb.glob("offline-run-*")
    assert f"wandb sync runs/autoencoder_kl_f4/keyed/wandb/{folder.name}" in out
    written = {file: file.read_bytes() for file in run_dir.path.rglob("*") if file.is_file() and file.suffix != ".diff"}
    assert any(b"alert_command=***" in held for file, held in written.items() if file.suffix == ".wandb")
    secrets = (b"0123456789" * 4, b"hunter2", b"t0ken")
    assert [file for file, held in written.items() if any(secret in held for secret in secrets)] == []


@pytest.mark.slow
def test_two_processes_with_deepspeed_zero1(world: Any, undisturbed: RunDir) -> None:
    """The same run on two real processes: another engine, the same curve."""
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    flags = ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
    command = world.tiny_training("name=zero1", "engine=zero1", "engine.precision=fp32", "micro_batch=4")
    said = world.run([*launch, *flags, *command[1:]])
    assert "zero1 fp32 on 2 process(es)" in said
    run_dir = RunDir(world.path / "runs" / "txt2img_laion" / "zero1")
    assert len(list((find(run_dir.checkpoints)).glob("rank*-of-00002.safetensors"))) == 2
    of_training = sorted(name for name in dashboard.logged(undisturbed) if name.startswith("train/"))
    assert set(of_training) >= {name for name in NAMES if name.startswith("train/")}
    for name in of_training:
        ours, theirs = curve(run_dir, name), curve(undisturbed, name)
        assert [images for images, _ in ours] == [images for images, _ in theirs]
        np.testing.assert_allclose([y for _, y in ours], [y for _, y in theirs], rtol=1e-3, err_msg=name)
    names = {name for panel, own in layout(dashboard.logged(run_dir)) for name in own if panel.code == "E21"}
    assert names == {f"perf/{name}" for name in ("step_ms", *OWN_MS, "slowest_rank")}


@pytest.mark.slow
def test_samples_have_one_seed_each_and_a_labelled_grid(world: Any, undisturbed: RunDir, tmp_path: Path) -> None:
    def sample(name: str, *overrides: str) -> list[np.ndarray]:
        prompts = "prompts=[a small red circle at the top on a white background,a large blue square]"
        command = world.job("sample.py", f"run_dir={undisturbed.path}", prompts, f"out={tmp_path / name}", *overrides)
        world.run(command)
        return [np.asarray(Image.open(file)) for file in sorted((tmp_path / name).glob("0*.png"))]

    together, alone = sample("together", "images_per_prompt=2"), sample("alone", "images_per_prompt=2", "batch=1")
    assert len(together) == 4
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(together, alone, strict=True))
    assert not np.array_equal(together[0], together[1])
    assert Image.open(tmp_path / "together" / "grid.png").width > 64
    said = Image.open(tmp_path / "together" / "00003.png").info
    assert (said["index"], json.loads(said["sampler"])["steps"]) == ("3", 2)  # the run's own sampler


@pytest.mark.slow
def test_the_latent_scale_is_what_the_first_stage_left_beside_its_weights(world: Any, undisturbed: RunDir) -> None:
    latents = storage.read_json(world.path / "runs/autoencoder_kl_f4/toy/weights/config.json")["latents"]
    assert read_state(find(undisturbed.checkpoints))["latent_scale"] == 1 / latents["std"]


@pytest.mark.slow
def test_a_vq_first_stage_goes_from_its_training_to_samples_with_no_number_carried_over(world: Any) -> None:
    world.run(world.autoencoder(kind="vq"))
    world.run(world.unconditional("precompute.min_psnr=0", script="precompute_latents.py"))
    brief = ["total_images=16", "global_batch=8", "micro_batch=8", "ema_half_lives=[32]", "optimizer.warmup_images=0"]
    world.run(world.unconditional(*brief))
    run_dir = RunDir(world.path / "runs/uncond_celebahq/toy")
    latents = storage.read_json(world.path / "runs/autoencoder_vq_f4/toy/weights/config.json")["latents"]
    assert read_state(find(run_dir.checkpoints))["latent_scale"] == 1 / latents["std"] != 1
    world.run(world.job("sample.py", f"run_dir={run_dir.path}", "count=2", "sampler.steps=2", "out=drawn_vq"))
    assert len(list((world.path / "drawn_vq").glob("0*.png"))) == 2


@pytest.mark.slow
def test_evaluate_repeats_the_score_of_training(world: Any, undisturbed: RunDir) -> None:
    world.run(world.job("evaluate.py", f"run_dir={undisturbed.path}"))
    (written,) = (undisturbed.path / "evaluation").glob("*.json")
    assert storage.read_json(written)["scores"]["eval/fd_random"] == curve(undisturbed, "eval/fd_random")[-1][1]


@pytest.mark.slow
def test_precompute_is_restartable_by_shard(world: Any, tmp_path: Path) -> None:
    def encode(*overrides: str) -> str:
        return world.run(
            world.text_to_image(
                f"data.latents={tmp_path}/latents", "precompute.min_psnr=0", *overrides, script="precompute_latents.py"
            )
        )

    encode()
    first = {file.name: file.read_bytes() for file in (tmp_path / "latents").glob("*.tar")}
    manifest = (tmp_path / "latents" / "manifest.json").read_bytes()
    assert first == {file.name: file.read_bytes() for file in (world.path / "latents").glob("*.tar")}
    (tmp_path / "latents" / "manifest.json").unlink()
    (tmp_path / "latents" / "00001.tar").unlink()
    assert "1 of 2 shards are done already" in encode()
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "latents").glob("*.tar")}
    assert manifest == (tmp_path / "latents" / "manifest.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.latents=nowhere"], "nowhere"),
        (["data.validation=null"], "data.validation is not set"),
        (["first_stage.checkpoint=nowhere"], "first_stage.checkpoint=nowhere"),
        (["first_stage.channels=16"], "another architecture"),
        (["data.transform.border=keep"], "transform"),
        (["data.transform.size=64"], "transform"),
        (["global_batch=10"], "does not divide"),
        (["unet.context_dim=32"], "context_dim=32"),
        (["data.latents=pipe:cat x.tar"], "pipe:"),
        (["conditioning.vocab_size=99"], "vocab_size=99"),
    ],
)
def test_wrong_input_is_refused_with_its_name(world: Any, overrides: list[str], said: str) -> None:
    name = f"name=refused_{abs(hash(tuple(overrides)))}"
    assert said in world.refusal(world.tiny_training(name, *overrides))


@pytest.mark.slow
def test_a_refusal_is_a_plain_sentence(world: Any) -> None:
    said = world.run(world.tiny_training("name=refused", "data.latents=nowhere"), expect=2)
    assert "error: " in said and "nowhere" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_resume_keeps_the_latent_scale_and_refuses_another_first_stage(world: Any, tmp_path: Path) -> None:
    def a_stage(*overrides: str) -> Stage:
        job = config.compose("train", [*world.tiny_training(*overrides)[2:], "data.source=images"])
        return stage_of(job, torch.device("cpu"), lambda key, reason, position: None)

    stage = a_stage("name=resumed")
    state = stage.state()
    stage.resume(state | {"latent_scale": 1.25 * state["latent_scale"]})
    assert stage.state()["latent_scale"] == 1.25 * state["latent_scale"]
    source = RunDir(world.path / "runs" / "autoencoder_kl_f4" / "toy").weights
    held = weights.load(source)
    held.tensors["decoder.conv_out.bias"] += 1
    weights.save(tmp_path / "other", held.config, held.tensors)
    with pytest.raises(ValueError, match=r"was trained on first stage .* first_stage\.checkpoint=.*other now holds"):
        a_stage("name=resumed", f"first_stage.checkpoint={tmp_path / 'other'}").resume(state)


@pytest.mark.slow
def test_a_first_stage_other_than_the_cache_s_is_refused(world: Any, tmp_path: Path) -> None:
    source = RunDir(world.path / "runs" / "autoencoder_kl_f4" / "toy").weights
    held = weights.load(source)
    held.tensors["decoder.conv_out.bias"] += 1
    weights.save(tmp_path / "other", held.config, held.tensors)
    said = world.refusal(world.tiny_training("name=other", f"first_stage.checkpoint={tmp_path / 'other'}"))
    assert "encoded by first stage" in said

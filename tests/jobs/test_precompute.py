"""Images to a latent cache: what is written, what is refused, how a cache grows. Small real tars, in this process."""

import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from damages import DAMAGES, FOUND, at, flipped
from PIL import Image

from ldm_scale.core import runtime, weights
from ldm_scale.data.cache import LatentCache, require_match
from ldm_scale.data.shards import CorruptSample, ShardSet, ShardWriter
from ldm_scale.data.sources import TooManyBadSamples
from ldm_scale.data.tar import BLOCK
from ldm_scale.data.views import write_selection
from ldm_scale.first_stage.base import FirstStage, Moments, MomentsKind
from ldm_scale.first_stage.identity import Identity
from ldm_scale.jobs import config, decoded, image_encoder, precompute
from ldm_scale.jobs.image_encoder import AuditFailed, has_white_bars
from ldm_scale.jobs.image_tars import ImageTars

SIZE = 16
Encode = Callable[..., LatentCache]


def picture(number: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Coarse noise of full contrast, its own for every number."""
    blocks = np.random.default_rng(number).integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    return blocks.repeat(4, 0).repeat(4, 1)[:height, :width]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def padded(number: int) -> np.ndarray:
    """A wide picture with white bars above and below, as img2dataset pads it."""
    pixels = np.full((SIZE, SIZE, 3), 255, np.uint8)
    pixels[4:12] = picture(number, 8, SIZE) // 2
    return pixels


def write_images(folder: Path, counts: tuple[int, ...], make: Callable[[int], np.ndarray] = picture) -> None:
    number = 0
    for shard, count in enumerate(counts):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for _ in range(count):
                writer.add(f"{number:06d}", {"png": png(make(number)), "txt": b"caption %d" % number})
                number += 1


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", (9, 12, 5))
    return tmp_path / "images"


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Any]:
    """A job of the identity first stage: its latents are the pixels, so that what is right is known."""
    weights.save(tmp_path / "identity", {"first_stage": {}}, {})

    def compose(*overrides: str) -> Any:
        return config.compose(
            "precompute_latents",
            [
                "+experiment=autoencoder_kl_f4", "scale=toy", "first_stage=identity",
                f"first_stage.checkpoint={tmp_path}/identity", f"data.images={tmp_path}/images",
                f"data.latents={tmp_path}/latents", f"data.transform.size={SIZE}", "data.threads=2",
                "precompute.batch=4", *overrides,
            ],
        )  # fmt: skip

    return compose


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_latents_are_those_of_the_images_and_plain_webdataset_reads_them(images: Path, encode: Encode) -> None:
    cache = encode()
    assert (cache.n, cache.shape) == (26, (3, SIZE, SIZE))
    moments, captions, keys = cache.read(np.arange(26))
    wanted = np.stack([picture(i) for i in range(26)]).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(moments.transpose(0, 2, 3, 1), wanted, atol=1e-3)
    assert captions == [f"caption {i}" for i in range(26)] and keys == [f"{i:06d}" for i in range(26)]
    read = list(webdataset.WebDataset(f"{cache.folder}/00001.tar", shardshuffle=False).decode())
    np.testing.assert_array_equal(read[3]["npy"], moments[12])
    manifest = cache.manifest
    assert (manifest.kind, manifest.first_stage["precision"], manifest.first_stage["float32_error"]) == (
        "point", "float32", 0.0
    )  # fmt: skip
    assert all(record.audit is not None and record.audit.psnr > 60 for record in manifest.shards)
    first = manifest.shards[0].statistics
    assert (first["lowest"], first["highest"]) == (moments[:9].min(), moments[:9].max())
    names = {name for name in files(Path(cache.folder)) if not name.startswith((".ldm", "0000"))}
    assert names == {"manifest.json", "rejected.jsonl"}


def test_the_mirror_image_is_a_member_of_its_own(images: Path, encode: Encode) -> None:
    cache = encode("precompute.flip=true")
    assert cache.n == 26
    for sample in webdataset.WebDataset(f"{cache.folder}/00000.tar", shardshuffle=False).decode():
        np.testing.assert_array_equal(sample["flip.npy"], sample["npy"][..., ::-1])
    with pytest.raises(ValueError, match=r"precompute\.flip=True \(now False\).*precompute\.overwrite=true"):
        encode()
    encode("precompute.overwrite=true")
    assert b"flip.npy" not in (Path(cache.folder) / "00000.tar").read_bytes()


def test_a_cache_from_before_a_choice_is_one_in_which_nothing_was_chosen(images: Path, encode: Encode) -> None:
    note = Path(encode().folder) / ".ldm" / "precompute.json"
    said = json.loads(note.read_text())
    note.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    encode()
    with pytest.raises(ValueError, match=r"made with data\.transform\.resize=None \(now 24\):"):
        encode("data.transform.resize=24")


def test_bfloat16_says_how_far_it_is_from_float32(images: Path, encode: Encode, monkeypatch: Any) -> None:
    def convolve(self: Identity, images_BCHW: torch.Tensor) -> Moments:
        return Moments(torch.nn.functional.conv2d(images_BCHW, torch.eye(3)[:, :, None, None] / 3), None)

    monkeypatch.setattr(Identity, "encode", convolve)
    exact = encode("precompute.min_psnr=0").read(np.arange(26))[0].astype(np.float32)
    rough = encode("precompute.min_psnr=0", "precompute.precision=bfloat16", "precompute.overwrite=true")
    measured = rough.manifest.first_stage["float32_error"]
    off = rough.read(np.arange(26))[0].astype(np.float32) - exact
    assert measured == pytest.approx(np.sqrt((off**2).mean() / (exact**2).mean()), rel=0.1)
    assert 5e-4 < measured < 1e-2


def test_some_shards_make_a_smaller_cache_that_a_later_run_extends(images: Path, encode: Encode) -> None:
    small = encode("precompute.limit_shards=1")
    assert small.n == 9
    before = files(Path(small.folder))
    whole = encode()
    assert whole.n == 26
    after = files(Path(whole.folder))
    assert {name: data for name, data in after.items() if "00000" in name} == {
        name: data for name, data in before.items() if "00000" in name
    }
    assert encode("precompute.limit_shards=1").n == 26, "a cache does not shrink"


def test_a_source_without_indexes_is_opened_once(images: Path, encode: Encode) -> None:
    opened: list[str] = []
    watching = [True]

    def hook(event: str, details: Any) -> None:  # cannot be taken away again, so it is told to look away
        if watching[0] and event == "open" and str(details[0]).startswith(str(images)):
            opened.append(str(details[0]))

    sys.addaudithook(hook)
    encode()
    watching[0] = False
    first, *others = sorted(str(file) for file in images.glob("*.tar"))
    assert opened.count(first) == 2, "a glance at the beginning of one, for the estimate; then each once"
    assert [opened.count(tar) for tar in others] == [1, 1]
    assert ShardSet.open(str(images)).n == 26 and (images / ".ldm" / "manifest.json").exists()


def test_samples_are_estimated_from_the_beginning_of_a_tar(tmp_path: Path) -> None:
    write_images(tmp_path, (200, 100), lambda number: picture(number, 40, 40))
    assert ImageTars(str(tmp_path), None, ("image",)).samples([0, 1]) == pytest.approx(300, rel=0.2)


def test_what_cannot_fit_is_refused_before_the_model_is_built(images: Path, encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "identity" / "weights.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"latents of 3 shards need about .* GB, but its disk has .*limit_shards to 0"):
        encode("data.transform.size=131072")
    assert not (tmp_path / "latents").exists()


def test_a_selection_is_encoded_and_another_one_is_another_cache(images: Path, encode: Encode, tmp_path: Path) -> None:
    keys = ["000003", "000010", "000020"]
    write_selection(tmp_path / "some.parquet", ["00000.tar", "00001.tar", "00001.tar"], keys, how={})
    cache = encode(f"data.selection=[{tmp_path}/some.parquet]")
    assert cache.keys(np.arange(cache.n)) == keys
    assert cache.manifest.read == 3
    with pytest.raises(ValueError, match=r"data\.selection=\['.*'\] \(now \[\]\)"):
        encode()


def test_a_removed_sample_is_not_encoded_and_keeps_its_place_in_a_cache_that_had_it(
    images: Path, encode: Encode, tmp_path: Path
) -> None:
    def remove(folder: Path, shard: str, key: str) -> None:
        with open(folder / ".ldm" / "removed.jsonl", "a") as file:
            file.write(json.dumps({"shard": shard, "key": key, "reason": "asked for", "time": "now"}) + "\n")

    encode("precompute.limit_shards=1")
    remove(images, "00001.tar", "000010")
    cache = encode()
    assert cache.n == 25 and cache.manifest.rejected == {"removed": 1}
    remove(images, "00000.tar", "000003")
    remove(Path(cache.folder), "00000.tar", "000003")
    (Path(cache.folder) / ".ldm" / "00000.done.json").unlink()
    again = encode()
    assert again.order_id == cache.order_id and again.content_id != cache.content_id
    assert not again.read(np.array([3]))[0].any() and again.read(np.array([3]))[1] == [""]
    np.testing.assert_array_equal(again.read(np.array([4]))[0], cache.read(np.array([4]))[0])


def test_a_page_shows_latents_decoded_beside_their_images(
    job: Callable[..., Any], images: Path, encode: Encode
) -> None:
    cache = encode()
    page = decoded.sheet(job(), 3).astype(int)
    left, right = page[::8, 16 : 16 + 8 * SIZE : 8], page[::8, 32 + 8 * SIZE : 32 + 16 * SIZE : 8]
    tops = [y for y in range(len(left) - SIZE) if any((left[y : y + SIZE] == picture(i)).all() for i in range(cache.n))]
    assert len(tops) == 1, "three pairs stand in one row"
    assert abs(left[tops[0] :][:SIZE] - right[tops[0] :][:SIZE]).max() <= 1
    with pytest.raises(ValueError, match=r"its image transform is .*\"size\": 16"):
        decoded.sheet(job("data.transform.size=8"), 3)


def test_two_shards_of_one_name_are_refused(images: Path, encode: Encode, tmp_path: Path) -> None:
    write_images(tmp_path / "more", (3,))
    with pytest.raises(ValueError, match=r"several shards called 00000\.tar"):
        encode(f"data.images={images}::{tmp_path}/more")


def test_remote_latents_are_refused(images: Path, encode: Encode) -> None:
    with pytest.raises(ValueError, match=r"data\.latents=s3://bucket/latents: name a local directory"):
        encode("data.latents=s3://bucket/latents")


def test_everything_read_is_written_or_rejected(tmp_path: Path, encode: Encode) -> None:
    with ShardWriter(tmp_path / "images" / "00000.tar") as writer:
        for i in range(10):
            data = [png(picture(i)), png(picture(i))[:-40], b"no image"][0 if i > 1 else i + 1]
            writer.add(f"{i:02d}", {"png": data, "txt": b""})
        writer.add("11", {"txt": b"an orphan"})
    whole = (tmp_path / "images" / "00000.tar").read_bytes()
    (tmp_path / "images" / "00001.tar").write_bytes(whole.replace(b"/0", b"/1")[: 15 * BLOCK])
    cache = encode("data.transform.min_side=1")
    assert cache.n == 8 + cache.manifest.shards[1].written
    for record in cache.manifest.shards:
        assert record.read == record.written + sum(record.rejected.values())
        assert len(record.rejected_keys) == sum(record.rejected.values())
    assert cache.manifest.shards[0].rejected == {"truncated": 1, "unreadable": 1, "orphan_member": 1}
    lines = [json.loads(line) for line in (Path(cache.folder) / "rejected.jsonl").read_text().splitlines()]
    assert {"shard": "00000.tar", "reason": "truncated", "key": "00"} in lines
    assert len(lines) == sum(cache.manifest.rejected.values())


@pytest.mark.parametrize("name", DAMAGES)
def test_no_damage_is_silent(tmp_path: Path, encode: Encode, name: str) -> None:
    reason, whole = FOUND[name]
    write_images(tmp_path / "images", (10,))
    tar = tmp_path / "images" / "00000.tar"
    tar.write_bytes(DAMAGES[name](tar.read_bytes(), "000005.png"))
    cache = encode()
    assert cache.n == whole and reason in cache.manifest.rejected
    assert cache.manifest.read == cache.n + sum(cache.manifest.rejected.values())


def test_a_bit_that_flipped_after_indexing_costs_one_sample(images: Path, encode: Encode) -> None:
    ShardSet.open(str(images))
    tar = images / "00000.tar"
    data = tar.read_bytes()
    tar.write_bytes(flipped(data, at(data, "000005.txt") + BLOCK))
    assert encode().manifest.rejected == {"checksum": 1}


def test_a_remote_source_gives_the_same_cache(images: Path, encode: Encode, tmp_path: Path) -> None:
    files_there = fsspec.filesystem("memory")
    files_there.put(str(images), "/precompute/images", recursive=True)
    source = "memory://precompute/images/{00000..00002}.tar"
    with pytest.raises(ValueError, match=r"set data\.index_dir"):
        encode(f"data.images='{source}'")
    far = files(Path(encode(f"data.images='{source}'", f"data.index_dir={tmp_path}/index").folder))
    shutil.rmtree(tmp_path / "latents")
    assert files(Path(encode().folder)) == far


def test_passwords_in_urls_are_written_nowhere(
    images: Path, encode: Encode, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fsspec.filesystem("memory").put(str(images), "/me:hunter2@secret", recursive=True)
    index = f"data.index_dir={tmp_path}/index"
    cache = encode("data.images='memory://me:hunter2@secret/{00000..00002}.tar'", index)
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server, pytest.raises(SystemExit):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        config.or_exit(lambda: encode(f"data.images='http://me:hunter2@{host}/none.tar'", index))
    runtime.logger(__name__).warning("https://me:hunter2@host/a.tar?sig=hunter2 is gone")
    said = capfd.readouterr()
    assert f"http://***@{host}/none.tar" in said.err and "https://***@host/a.tar?sig=*** is gone" in said.err
    assert "hunter2" not in said.out + said.err
    written = [file for file in (*Path(cache.folder).rglob("*"), *(tmp_path / "index").rglob("*")) if file.is_file()]
    assert len(written) > 8 and [file for file in written if b"hunter2" in file.read_bytes()] == []


def test_moments_that_are_no_numbers_are_rejected(images: Path, encode: Encode, monkeypatch: Any) -> None:
    def divide(self: Identity, images_BCHW: torch.Tensor) -> Moments:
        return Moments(torch.where(images_BCHW.mean((1, 2, 3), keepdim=True) > 0.1, torch.nan, images_BCHW), None)

    monkeypatch.setattr(Identity, "encode", divide)
    cache = encode("precompute.min_psnr=0")
    assert cache.manifest.rejected == {"not_finite": 26 - cache.n} and cache.n < 26
    assert np.isfinite(cache.read(np.arange(cache.n))[0]).all()


def test_too_many_bad_samples_stop_the_job(tmp_path: Path, encode: Encode) -> None:
    with ShardWriter(tmp_path / "images" / "00000.tar") as writer:
        for i in range(12):
            writer.add(f"{i:02d}", {"png": b"no image", "txt": b""})
        writer.add("99", {"png": png(picture(0)), "txt": b""})
    with pytest.raises(TooManyBadSamples, match=r"12 of 13 samples.*unreadable.*data\.max_bad_share=0\.01"):
        encode()


def test_a_wrong_normalisation_is_refused(images: Path, encode: Encode, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(image_encoder, "from_uint8", lambda pixels: pixels.float() / 255)
    with pytest.raises(AuditFailed, match=r"00000\.tar: 9 images .* dB, below precompute\.min_psnr=15"):
        encode()
    assert [path.name for path in (tmp_path / "latents").rglob("*")] == [".ldm", "precompute.json"]


def test_a_wrong_scale_is_refused(images: Path, encode: Encode, monkeypatch: Any) -> None:
    right = Identity.encode
    monkeypatch.setattr(Identity, "encode", lambda self, images: Moments(0.18215 * right(self, images).mean, None))
    with pytest.raises(AuditFailed, match="wrong first stage, normalisation, scale"):
        encode()
    with pytest.raises(AuditFailed, match=r"standard deviation 0\.1.*outside precompute\.latent_std=\[0\.5, 2"):
        encode("precompute.min_psnr=0", "precompute.latent_std=[0.5, 2.0]")


def test_latents_far_from_zero_are_refused(images: Path, encode: Encode, monkeypatch: Any) -> None:
    monkeypatch.setattr(Identity, "encode", lambda self, images: Moments(images + 2, None))
    with pytest.raises(AuditFailed, match=r"mean 2.* more than precompute\.max_latent_mean=3"):
        encode("precompute.min_psnr=0")


def test_another_encoder_is_refused(job: Callable[..., Any], images: Path, encode: Encode, tmp_path: Path) -> None:
    cache = encode()
    other = job("first_stage=kl_f4/toy", "first_stage.channels=8")
    network = other.first_stage.build()
    weights.save(tmp_path / "other", {"first_stage": {}}, network.state_dict())
    wanted = precompute.identity(other, network)
    assert wanted.kind is MomentsKind.GAUSSIAN
    with pytest.raises(ValueError, match="it was encoded by first stage"):
        require_match(cache.manifest, wanted.fingerprint, wanted_first_stage=wanted.first_stage["sha256"])
    with pytest.raises(ValueError, match=r"holds latents made with first_stage=identity .*\(now .*kl"):
        encode("first_stage=kl_f4/toy", "first_stage.channels=8", f"first_stage.checkpoint={tmp_path}/other")
    assert files(Path(cache.folder)) == files(Path(encode().folder)), "a refused run changes nothing"


def test_white_borders_kept_by_accident_are_refused(job: Callable[..., Any], tmp_path: Path, encode: Encode) -> None:
    write_images(tmp_path / "images", (40,), padded)
    with pytest.raises(AuditFailed, match=r"40 of 40 images still have white bars.*max_white_bars=0\.2"):
        encode()
    cache = encode("data.transform.border=keep", "precompute.overwrite=true")
    wanted = precompute.identity(job(), cache_first_stage(job()))
    with pytest.raises(ValueError, match='"border": "keep"'):
        require_match(cache.manifest, wanted.fingerprint, wanted_first_stage=wanted.first_stage["sha256"])


def test_edited_bytes_are_refused_and_only_their_shard_is_encoded_again(
    job: Callable[..., Any], images: Path, encode: Encode
) -> None:
    cache = encode()
    right = files(Path(cache.folder))
    shard = Path(cache.folder) / "00001.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptSample, match="checksum_npy"):
        LatentCache.open(cache.folder).read(np.arange(26))
    (Path(cache.folder) / ".ldm" / "00001.done.json").unlink()  # as data_tools.verify --repair does
    left = precompute.Estimate.of(job(), ImageTars(str(images), None, ("image",)), Path(cache.folder))
    assert (left.shards, left.images) == (1, 12)
    changed = {name: os.stat(Path(cache.folder) / name).st_mtime_ns for name in ("00000.tar", "00002.tar")}
    encode()
    assert files(Path(cache.folder)) == right
    assert changed == {name: os.stat(Path(cache.folder) / name).st_mtime_ns for name in changed}


def test_a_changed_source_is_encoded_again(images: Path, encode: Encode) -> None:
    before = encode().manifest
    write_images(images, (40, 50), lambda number: picture(100 + number))
    after = encode().manifest
    assert [record.written for record in after.shards] == [40, 50, 5]
    assert after.shards[0].sha256 != before.shards[0].sha256 and after.shards[2] == before.shards[2]


def test_an_edited_source_of_the_same_size_is_noticed_and_a_copied_one_is_only_read(
    images: Path, encode: Encode
) -> None:
    cache = encode()
    latents = Path(cache.folder)
    right = files(latents)
    for tar in images.glob("*.tar"):
        os.utime(tar)
    edited = images / "00001.tar"
    edited.write_bytes(edited.read_bytes().replace(b"caption 12", b"caption XX"))
    again = encode()
    assert again.read(np.array([12]))[1] == ["caption XX"]
    changed = {name for name, data in files(latents).items() if data != right[name]}
    assert changed == {
        "manifest.json", "00001.tar", "00001.parquet", ".ldm/00001.idx", ".ldm/00001.done.json"
    }  # fmt: skip
    stamps = {path: path.stat().st_mtime_ns for path in images.rglob("*.idx")}
    encode()
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "looked at once"


def test_bars_are_told_from_white_backgrounds() -> None:
    assert has_white_bars(padded(0)) and has_white_bars(padded(0).swapaxes(0, 1))
    on_white = np.full((SIZE, SIZE, 3), 255, np.uint8)
    on_white[5:11, 3:] = 90  # touches one edge
    assert not has_white_bars(on_white)
    assert not has_white_bars(picture(0) // 2) and not has_white_bars(np.full((SIZE, SIZE, 3), 255, np.uint8))


def cache_first_stage(job: Any) -> FirstStage:
    network: FirstStage = job.first_stage.build()
    return network


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_latents(images: Path, encode: Encode, tmp_path: Path, job: Any) -> None:
    torch.manual_seed(0)
    overrides = ["first_stage=kl_f4/toy", "first_stage.channels=8", f"first_stage.checkpoint={tmp_path}/kl"]
    network = job(*overrides).first_stage.build()
    weights.save(tmp_path / "kl", {"first_stage": {}}, network.state_dict())
    overrides += ["precompute.min_psnr=0", "precompute.latent_std=[0,100]"]
    eager = encode(*overrides).read(np.arange(26))[0].astype(np.float32)
    for record in (tmp_path / "latents" / ".ldm").glob("*.done.json"):
        record.unlink()
    compiled = encode(*overrides, "precompute.compile=true").read(np.arange(26))[0].astype(np.float32)
    assert not np.array_equal(eager, 0 * eager)
    np.testing.assert_allclose(compiled, eager, atol=2e-3)

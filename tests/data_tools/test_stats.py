import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data_tools.stats import main
from ldm_scale.data.cache import CacheShardWriter, fingerprint, finish_cache
from ldm_scale.data.views import write_selection

SHA = "ab" * 32


def bordered(number):
    """A 24 x 12 original padded to a white square of 24."""
    pixels = np.full((24, 24, 3), 255, np.uint8)
    pixels[6:18] = np.random.default_rng(number).integers(0, 200, (12, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path, dataset, picture):
    sizes = {"original_width": 24, "original_height": 12}
    rows = [{"image": bordered(i), **sizes, "text": f"<b>bars & {i}</b>"} for i in range(3)]
    rows += [{"image": picture(i, (48, 96)), "original_width": 480, "original_height": 960} for i in range(3)]
    return dataset(tmp_path / "in", [rows, [{"text": "", "original_width": 16, "original_height": 12}]])


class Tags(HTMLParser):
    """Counts what a browser would see, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.count, self.fetched, self.text = {}, [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]

    def handle_data(self, data):
        self.text += data


def run(tmp_path, *arguments):
    code = main([*map(str, arguments[:1]), str(tmp_path / "page.html"), *map(str, arguments[1:])])
    return code, json.loads((tmp_path / "page.json").read_text()), Tags((tmp_path / "page.html").read_text())


def test_numbers_of_shards(tmp_path, shards, capsys):
    code, report, _ = run(tmp_path, shards, "--size", "32")
    assert (code, report["samples"], report["shards"]) == (0, 7, 2)
    assert report["white_borders"] == {"share": 3 / 7, "of": 7}
    assert report["below_size"] == 4 and report["without_caption"] == 1
    histograms = report["histograms"]
    upscale, aspect = (
        dict(zip(histograms[name]["edges"], histograms[name]["counts"], strict=False))
        for name in ("Upscale to 32 pixels", "Width / height of the original")
    )
    assert {edge: count for edge, count in upscale.items() if count} == {0: 3, 2: 4}
    assert {edge: count for edge, count in aspect.items() if count} == {0.5: 3, 1.33: 1, 2: 3}
    stored = histograms["Shorter side as stored, pixels"]
    assert stored["counts"][0] == 7
    assert "white borders              42.9% of 7" in capsys.readouterr().out


def test_the_page_needs_nothing_else_and_shows_text_as_text(tmp_path, shards):
    _, _, page = run(tmp_path, shards)
    assert page.fetched == [] and page.count["img"] == 7 and page.count["figure"] == 7 and "script" not in page.count
    assert "<b>bars & 2</b>" in page.text and "b" in page.count and page.text.count("white border") == 3 + 1
    assert "no caption" in page.text and "48 x 96 of 480 x 960" in page.text


def test_fewer_pictures_and_a_selection(tmp_path, shards):
    write_selection(tmp_path / "s.parquet", ["00000.tar"] * 4, [f"00000000{i}" for i in range(2, 6)], {})
    _, report, page = run(tmp_path, shards, "--selection", tmp_path / "s.parquet", "--thumbnails", "2")
    assert report["samples"] == 4 and page.count["figure"] == 2
    assert report["white_borders"] == {"share": 0.25, "of": 4}
    _, report, page = run(tmp_path, shards, "--sample", "3", "--thumbnails", "0")
    assert report["sampled"] == 3 and "figure" not in page.count


def test_shards_of_which_nothing_is_known(tmp_path, dataset, picture):
    shards = dataset(tmp_path / "in", [[{}, {"image": b"junk"}]], parquet=False)
    code, report, page = run(tmp_path, shards)
    assert code == 1 and report["unreadable"] == {"unreadable": 1}
    assert report["white_borders"] == {"share": None, "of": 0}
    assert "unknown for 2" in report["histograms"]["Shorter side of the original, pixels"]["note"]
    assert page.count["figure"] == 1


@pytest.mark.parametrize("kind, channels", [("gaussian", 8), ("point", 4)])
def test_a_cache_beside_its_images(tmp_path, shards, kind, channels):
    transform = {"size": 32, "crop": "center", "flip": False}
    stage = {"kind": "kl", "config": {}, "sha256": SHA}
    made_by = fingerprint(first_stage_kind="kl", first_stage_sha256=SHA, transform=transform, kind=kind)
    with CacheShardWriter(tmp_path / "latents/00000.tar", fingerprint=made_by, kind=kind) as writer:
        for i in range(5):
            moments = np.random.default_rng(i).normal(i, 1, (channels, 4, 4))
            writer.add(f"00000{i:04d}", moments, f"caption {i}")
        record = writer.finish(source="00000.tar", source_sha256=SHA)
    finish_cache(tmp_path / "latents", [record], first_stage=stage, transform=transform, kind=kind)
    code, report, page = run(tmp_path, tmp_path / "latents", "--images", shards)
    assert (code, report["latents"], report["without_image"]) == (0, 5, 0)
    assert page.count["img"] == 5 * (1 + 4) and page.count["figure"] == 5 and page.fetched == []
    assert len(report["histograms"]) == 8
    mean = report["histograms"]["Channel 0: mean of a latent"]
    assert sum(mean["counts"]) == 5
    _, report, page = run(tmp_path, tmp_path / "latents", "--thumbnails", "2")
    assert report["without_image"] is None and page.count["img"] == 2 * 4
    path = tmp_path / "latents/00000.tar"
    data = path.read_bytes()
    at = data.index(b"000000003.npy") + 512 + 140
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    code, report, _ = run(tmp_path, tmp_path / "latents")
    assert code == 1 and report["unreadable"] == {"checksum_npy": 1}


def test_mistakes(tmp_path, shards):
    assert main([str(shards), str(tmp_path / "x.html"), "--sample", "0"]) == 2
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "x.html")]) == 2

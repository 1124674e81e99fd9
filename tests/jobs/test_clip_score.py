import shutil
from pathlib import Path

import pytest
import torch
from tiny_clip import write_clip, write_whole_clip
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPModel, CLIPProcessor

from ldm_scale.core.tensors import from_uint8
from ldm_scale.evaluation.alignment import ClipScore


class PlainFeatures(CLIPModel):
    """As transformers 4 had it and torchmetrics 1.9 wants it: features without anything around them."""

    def get_image_features(self, *args: torch.Tensor) -> torch.Tensor:
        return super().get_image_features(*args).pooler_output

    def get_text_features(self, *args: torch.Tensor) -> torch.Tensor:
        return super().get_text_features(*args).pooler_output


CAPTIONS = ["a fox", "snow on a hill", "", "two red birds"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_clip(tmp_path_factory.mktemp("clip") / "whole")


def pictures(count: int, sides: tuple[int, int] = (48, 40)) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *sides), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_scores_are_those_of_torchmetrics(clip: Path) -> None:
    pixels_BCHW = pictures(len(CAPTIONS))
    ours_B = ClipScore(str(clip))(CAPTIONS, from_uint8(pixels_BCHW))
    theirs = [
        clip_score(image, text, lambda: (PlainFeatures.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)))
        for image, text in zip(pixels_BCHW, CAPTIONS, strict=True)
    ]
    torch.testing.assert_close(ours_B, torch.stack(theirs).detach(), rtol=1e-5, atol=1e-4)
    assert ours_B.std() > 1  # a comparison of numbers that differ


def test_a_caption_that_is_too_long_is_cut_and_keeps_its_end(clip: Path) -> None:
    score, image = ClipScore(str(clip)), from_uint8(pictures(1))
    assert torch.equal(score(["a " * 22], image), score(["a " * 99], image))


def test_what_is_no_whole_clip_is_refused_with_the_way_out(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaluation\.clip=.*/nowhere does not hold CLIP.*make fetch-weights"):
        ClipScore(str(tmp_path / "nowhere"))
    write_clip(tmp_path / "text")
    shutil.copy(clip / "processor_config.json", tmp_path / "text")
    with pytest.raises(ValueError, match=r"is not CLIP for images and text: it lacks .*make fetch-weights"):
        ClipScore(str(tmp_path / "text"))

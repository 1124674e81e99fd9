import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_clip import write_whole_clip

from ldm_scale.core import storage
from ldm_scale.jobs import config
from ldm_scale.jobs.guidance_sweep import Point, draw


@pytest.mark.parametrize("aligned, words", [("clip_score", "CLIP score"), ("caption_accuracy", "caption accuracy")])
def test_the_curve_goes_from_weak_to_strong_guidance(aligned: str, words: str) -> None:
    values = {3.0: (0.9, 14.0), 1.0: (0.2, 23.0), 1.5: (0.6, 12.0)}
    points = [Point(g, {"eval/fid": y, "eval/kid": 0.0, f"eval/{aligned}": x}) for g, (x, y) in values.items()]
    axes = draw(points, {f"eval/{aligned}_real": 0.95}, "title").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0.2, 23.0], [0.6, 12.0], [0.9, 14.0]]
    assert [text.get_text() for text in axes.texts] == ["1", "1.5", "3"]
    assert axes.get_xlabel().startswith(words) and axes.get_ylabel().startswith("FID")
    assert axes.lines[1].get_xdata() == [0.95, 0.95]


@pytest.mark.parametrize("lacking", ["evaluation.caption_accuracy=false", "evaluation.scores=[kernel]"])
def test_a_sweep_without_both_axes_is_refused(lacking: str) -> None:
    with pytest.raises(ValueError, match=r"guidances=\[1.0, 2.0\] draws a distance .*evaluation\.clip=DIRECTORY"):
        config.compose("evaluate", ["run_dir=r", "guidances=[1,2]", "evaluation.caption_accuracy=true", lacking])


@pytest.mark.slow
def test_one_process_and_two_give_the_same_sweep(world: Any, tmp_path: Path) -> None:
    clip = write_whole_clip(tmp_path / "clip")
    world.run(world.tiny_training("name=swept", "total_images=32", "every.evaluate=0", "every.sample=0"))
    run = world.path / "runs/txt2img_laion/swept"
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    found = []
    for start in ([sys.executable], [*launch, "--main_process_port", "0"]):
        _, *evaluate = world.job(
            "evaluate.py", f"run_dir={run}", "guidances=[1,3]", f"evaluation.clip={clip}", "evaluation.images=11",
            "evaluation.batch=4", "evaluation.scores=[frechet]",
        )  # fmt: skip
        world.run([*start, *evaluate])
        (out,) = run.glob("evaluation/000000000032_ema_guidance_????????.json")
        found.append(storage.read_json(out))
        with Image.open(out.with_suffix(".png")) as picture:
            assert picture.width > 500
        out.unlink()
    alone, together = found
    assert [point["guidance"] for point in alone["points"]] == [1, 3]
    for one, other in zip(alone["points"], together["points"], strict=True):
        assert one["scores"].keys() >= {"eval/fd_random", "eval/clip_score", "eval/caption_accuracy"}
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-6)
    assert alone["points"][0]["scores"] != alone["points"][1]["scores"]
    assert alone["conditions"] == together["conditions"] and alone["conditions"]["clip"] is not None
    assert alone["real"]["eval/clip_score_real"] == pytest.approx(together["real"]["eval/clip_score_real"], rel=1e-6)

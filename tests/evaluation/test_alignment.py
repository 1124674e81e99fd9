import numpy as np
import pytest
from scipy import ndimage

from ldm_scale.evaluation.alignment import caption_accuracy, caption_holds, judge, read_scene
from ldm_scale.images.scenes import JITTER_NUMBERS, Scene, all_scenes, parse_caption

PARTS = ("overall", "colour", "shape", "position", "size", "background")


def pictures(scenes: list[Scene], size: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.stack([scene.render(size, generator.random(JITTER_NUMBERS)) for scene in scenes])


def reconstructed(images_BHWC: np.ndarray, *, blur: float, noise: float) -> np.ndarray:
    """Blurred by a Gaussian (pixels), then noisy (levels): about what a first stage gives back."""
    soft = ndimage.gaussian_filter(images_BHWC.astype(float), (0, blur, blur, 0))
    noisy = soft + noise * np.random.default_rng(1).normal(size=soft.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


def sample(things: int, count: int, seed: int = 0) -> list[Scene]:
    scenes = all_scenes(things)
    return [scenes[i] for i in np.random.default_rng(seed).permutation(len(scenes))[:count]]


@pytest.mark.parametrize("things", [1, 2])
@pytest.mark.parametrize("size", [32, 64])
def test_true_pictures_hold_without_exception(things, size):
    scenes = sample(things, 648 if things == 1 else 300)
    accuracy = caption_accuracy([scene.caption() for scene in scenes], pictures(scenes, size))
    assert accuracy.n == len(scenes)
    for part in PARTS:
        assert getattr(accuracy, part) == 1, part


@pytest.mark.slow
def test_every_scene_of_two_holds():
    scenes = all_scenes(2)
    assert caption_accuracy([scene.caption() for scene in scenes], pictures(scenes, 32, seed=7)).overall == 1


@pytest.mark.parametrize(("things", "size"), [(1, 32), (2, 32), (1, 64), (2, 64)])
@pytest.mark.parametrize(("blur", "noise"), [(0.0, 13.0), (0.5, 11.0), (0.8, 8.0)])
def test_reconstructions_at_25_to_31_db_hold(things, size, blur, noise):
    scenes = sample(things, 200 if size == 32 else 100, seed=3)
    true = pictures(scenes, size)
    seen = reconstructed(true, blur=blur * size / 32, noise=noise)
    assert 25 < psnr(true, seen) < 31
    assert caption_accuracy([scene.caption() for scene in scenes], seen).overall >= 0.99


@pytest.mark.parametrize("size", [32, 64])
def test_noise_and_blanks_show_nothing(size):
    generator = np.random.default_rng(0)
    captions = [scene.caption() for scene in sample(1, 200)]
    noise = generator.integers(0, 256, (200, size, size, 3), dtype=np.uint8)
    chance = 1 / (4 * 3 * 9)
    assert caption_accuracy(captions, noise).overall <= 2 * chance
    for level in (0, 12, 144, 248, 255):
        blank = np.full((200, size, size, 3), level, np.uint8)
        accuracy = caption_accuracy(captions, blank)
        assert accuracy.overall == accuracy.colour == accuracy.shape == accuracy.position == 0


def test_true_pictures_of_other_captions_score_chance():
    scenes, others = sample(1, 600, seed=1), sample(1, 600, seed=2)
    accuracy = caption_accuracy([scene.caption() for scene in others], pictures(scenes, 32))
    assert accuracy.overall < 0.03
    assert accuracy.colour == pytest.approx(1 / 4, abs=0.07)
    assert accuracy.shape == pytest.approx(1 / 3, abs=0.07)
    assert accuracy.position == pytest.approx(1 / 9, abs=0.05)
    assert accuracy.size == pytest.approx(1 / 2, abs=0.07)
    assert accuracy.background == pytest.approx(1 / 3, abs=0.07)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"red": "blue"}, {"colour"}),
        ({"circle": "square"}, {"shape"}),
        ({"at the top left": "at the top"}, {"position"}),
        ({"small": "large"}, {"size"}),
        ({"white": "grey"}, {"background"}),
    ],
)
def test_each_part_is_judged_for_itself(change, wrong):
    caption = "a small red circle at the top left on a white background"
    image = parse_caption(caption).render(32)
    ((old, new),) = change.items()
    judged = judge(caption.replace(old, new), image)
    parts = {part: getattr(judged, part) for part in PARTS[1:]}
    assert {part for part, right in parts.items() if not right} == wrong
    assert judged.holds == (not wrong & {"colour", "shape", "position"})


def test_relations_bind_attributes_to_things():
    """Right words on the wrong things are wrong; a paraphrase is right."""
    image = parse_caption("a small red circle left of a large blue square on a grey background").render(32)
    assert caption_holds("a large blue square right of a small red circle on a grey background", image)
    for wrong in (
        "a small red circle right of a large blue square on a grey background",
        "a small red circle above a large blue square on a grey background",
        "a small red square left of a large blue circle on a grey background",
        "a small blue circle left of a large red square on a grey background",
        "a small red circle at the left on a grey background",
    ):
        assert not caption_holds(wrong, image), wrong


def test_one_thing_too_many_is_wrong():
    scene = parse_caption("a small red circle at the top left on a white background")
    image = scene.render(32)
    image[20:30, 20:30] = (20, 160, 70)
    assert len(read_scene(image).things) == 2
    assert not caption_holds(scene.caption(), image)


def test_a_thing_of_no_shape_is_read_so():
    image = np.full((64, 64, 3), 248, np.uint8)
    image[10:16, 4:60] = image[10:60, 4:10] = (216, 34, 40)  # an angle
    assert [thing.shape for thing in read_scene(image).things] == [None]


def test_mistakes_are_refused():
    image = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="2 captions for 1 images"):
        caption_accuracy(["a", "b"], image[None])
    with pytest.raises(ValueError, match="no caption"):
        caption_accuracy(["a dog"], image[None])
    with pytest.raises(ValueError, match="uint8"):
        read_scene(image.astype(np.float32))

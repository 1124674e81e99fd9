"""Sizes beyond training, and images that a walk is held to: with text and without, by every sampler."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.spatial import ConcatConfig
from ldm_scale.diffusion.objective import ObjectiveConfig
from ldm_scale.diffusion.schedule import End, ScheduleConfig, Spacing
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.first_stage.loss import AutoencoderLossConfig, PerceptualKind, perceptual_network
from ldm_scale.latent_diffusion.generate import Generator, ImageGuide, Steering, l2
from ldm_scale.latent_diffusion.model import DiffusionConfig, LatentDiffusionConfig
from ldm_scale.latent_diffusion.tiles import Tiles
from ldm_scale.nn.unet import UNetConfig
from ldm_scale.samplers.base import Frame, SamplerConfig
from ldm_scale.samplers.ddim import DDIMConfig
from ldm_scale.samplers.ddpm import DDPMConfig
from ldm_scale.samplers.dpm_solver import DPMSolverConfig
from ldm_scale.samplers.plms import PLMSConfig

SAMPLERS = {
    "ddim": DDIMConfig(steps=6),
    "ddim_ancestral": DDIMConfig(steps=6, eta=1.0),
    "ddpm": DDPMConfig(steps=6),
    "plms": PLMSConfig(steps=6),
    "dpm_solver": DPMSolverConfig(steps=6, spacing=Spacing.leading),
}
KINDS: dict[str, tuple[ConditionerConfig | None, dict[str, int], Any]] = {
    "unconditional": (None, {}, None),
    "classes": (ClassLabelConfig(classes=4, width=16), {"context_dim": 16}, 2),
    "maps": (ConcatConfig(channels=3), {"in_channels": 7}, None),
}


def generator(kind: str = "unconditional", **changes: Any) -> Generator:
    """A model of 16 x 16 images with seeded weights: f = 2, and a U-Net of two levels."""
    conditioning, unet, _ = KINDS[kind]
    torch.manual_seed(0)
    model = LatentDiffusionConfig(
        unet=UNetConfig(
            **{"in_channels": 4, "out_channels": 4, "model_channels": 16, "channel_mult": [1, 1], "num_res_blocks": 1,
               "head_channels": 8, "norm_groups": 8, **unet}
        ),
        conditioning=conditioning,
        diffusion=DiffusionConfig(schedule=ScheduleConfig(end=End.clean), objective=ObjectiveConfig()),
    ).build()  # fmt: skip
    for parameter in model.unet.parameters():  # layers that start at zero would hide what lies before them
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    stage = AutoencoderKLConfig(channels=8, channel_mult=[1, 1], num_res_blocks=1, norm_groups=4).build()
    parts = {"sampler": DDIMConfig(steps=6, guidance=1.0), "size": (16, 16), "latent_scale": 0.7, "seed": 7, **changes}
    return Generator(model=model.requires_grad_(False), first_stage=stage.requires_grad_(False), **parts)


def conditions(kind: str, count: int, size: tuple[int, int] = (16, 16)) -> list[Any]:
    if kind == "maps":
        noise = torch.Generator().manual_seed(1)
        return [torch.randn(3, size[0] // 2, size[1] // 2, generator=noise) for _ in range(count)]
    return [KINDS[kind][2]] * count


def pictures(count: int, *size: int, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(4)) * 2 - 1


def left_half(height: int = 16, width: int = 16) -> Tensor:
    paint = torch.ones(1, 1, height, width)
    paint[..., : width // 2] = 0
    return paint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (64, 64), (32, 20)])
def test_any_size_that_the_strides_allow(kind: str, size: tuple[int, int]):
    images = generator(kind, size=size).images(conditions(kind, 2, size), [0, 1])
    assert images.shape == (2, 3, *size)
    assert images.std() > 0.01


@pytest.mark.parametrize("size, fits", [((16, 18), "16 x 16 or 20 x 20"), ((30, 16), "28 x 16"), ((0, 16), "4 x 16")])
def test_another_size_is_refused_with_those_that_fit(size: tuple[int, int], fits: str):
    with pytest.raises(ValueError, match=rf"size={size[0]} x {size[1]}; .* multiples of 4 .*{fits}"):
        generator(size=size)
    with pytest.raises(ValueError, match=r"tiles.size=3; .*multiple of .* 2"):
        generator(tiles=Tiles(size=3, overlap=1))


def test_maps_of_another_size_are_refused():
    with pytest.raises(ValueError, match="maps of 8 x 8 latent cells, the images of 16 x 8"):
        generator("maps", size=(32, 16)).images(conditions("maps", 1), [0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times, tolerance", [(2, 0.3), (4, 0.15)])
def test_tiles_agree_with_the_whole(kind: str, times: int, tolerance: float):
    """Root mean square after six steps, in units of the latents' own spread (two seeds: 1.4). What differs is the
    attention in the middle and the statistics of norms."""
    size, sampler = (16 * times, 16 * times), DDIMConfig(steps=6, guidance=1.0 if kind == "unconditional" else 2.0)
    ends: list[Frame] = []
    for tiles in (None, Tiles(size=4 * times, overlap=2 * times)):
        one = generator(kind, size=size, sampler=sampler, tiles=tiles)
        one.images(conditions(kind, 2, size), [0, 1], watch=ends.append)
    whole, in_tiles = ends[5].z, ends[11].z
    assert not torch.equal(in_tiles, whole)
    assert (in_tiles - whole).square().mean().sqrt() < tolerance * whole.std()


@pytest.mark.parametrize("kind", KINDS)
def test_one_tile_is_bit_for_bit_the_whole(kind: str):
    whole, in_tiles = (generator(kind, tiles=tiles) for tiles in (None, Tiles(size=8, overlap=4)))
    told = conditions(kind, 1)
    assert torch.equal(whole.images(told, [0]), in_tiles.images(told, [0]))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["unconditional", "classes"])
def test_inpainting_keeps_what_is_known(kind: str, name: str):
    drawing = generator(kind, sampler=replace(SAMPLERS[name], guidance=2.0 if kind == "classes" else 1.0))
    known, frames = pictures(2, 16, 16), []
    steering = Steering(known_BCHW=known, paint_B1HW=left_half())
    images = drawing.images(conditions(kind, 2), [0, 1], steering=steering, watch=frames.append)
    assert torch.equal(images[..., :8], known[..., :8])
    assert not torch.equal(images[..., 8:], known[..., 8:])
    z_known = drawing.first_stage.encode(known).mean * drawing.latent_scale
    torch.testing.assert_close(frames[-1].z[..., :4], z_known[..., :4], rtol=0, atol=1e-5)
    other = drawing.images(conditions(kind, 2), [2, 3], steering=steering)
    assert not torch.equal(images, other)


def test_a_cell_with_any_pixel_to_paint_is_painted_and_masks_may_be_soft():
    known, paint = pictures(1, 16, 16), torch.zeros(1, 1, 16, 16)
    paint[..., 5, 5], paint[..., 10, 10] = 1, 0.5
    frames: list[Frame] = []
    drawing = generator()
    images = drawing.images([None], [0], steering=Steering(known_BCHW=known, paint_B1HW=paint), watch=frames.append)
    z_known = drawing.first_stage.encode(known).mean * drawing.latent_scale
    changed = (frames[-1].z - z_known).abs().amax((0, 1)) > 1e-4
    assert changed.nonzero().tolist() == [[2, 2], [5, 5]]
    drawn = drawing.decode(frames[-1].z)
    assert torch.equal(images[..., 5, 5], drawn[..., 5, 5])
    torch.testing.assert_close(images[..., 10, 10], (drawn + known)[..., 10, 10] / 2)
    assert torch.equal(images[..., 0:5, :], known[..., 0:5, :])


def test_a_start_is_noised_to_the_level_that_the_strength_says():
    """The stronger, the more steps, and the nearer to the picture that comes from noise alone."""
    start, drawing = pictures(2, 16, 16), generator(sampler=DDIMConfig(steps=10))
    distances = []
    for strength in (0.1, 0.5, 1.0):
        frames: list[Frame] = []
        steering = Steering(start_BCHW=start, strength=strength)
        images = drawing.images([None] * 2, [0, 1], steering=steering, watch=frames.append)
        assert len(frames) == round(10 * strength)
        distances.append(float((images - drawing.images([None] * 2, [0, 1])).abs().mean()))
    assert distances[0] > distances[1] > distances[2] > 0
    kept = Steering(start_BCHW=start, strength=0.5, known_BCHW=start, paint_B1HW=torch.zeros(1, 1, 16, 16))
    assert torch.equal(drawing.images([None] * 2, [0, 1], steering=kept), start)


def test_one_image_steers_all_as_one_each_would():
    drawing, one = generator(), pictures(1, 16, 16)
    steering = Steering(start_BCHW=one, strength=0.5, known_BCHW=one, paint_B1HW=left_half(),
                        guide=ImageGuide(images_BCHW=pictures(1, 4, 4), scale=1.0))  # fmt: skip
    each = Steering(start_BCHW=one.expand(3, -1, -1, -1), strength=0.5, known_BCHW=one.expand(3, -1, -1, -1),
                    paint_B1HW=left_half().expand(3, -1, -1, -1),
                    guide=ImageGuide(images_BCHW=pictures(1, 4, 4).expand(3, -1, -1, -1), scale=1.0))  # fmt: skip
    together = drawing.images([None] * 3, [0, 1, 2], steering=steering)
    torch.testing.assert_close(drawing.images([None] * 3, [0, 1, 2], steering=each), together, rtol=0, atol=1e-5)
    alone = torch.cat([drawing.images([None], [i], steering=steering) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize("tiles", [None, Tiles(size=6, overlap=2)])
def test_guided_images_resemble_the_guide(side: int, tiles: Tiles | None):
    drawing = generator("classes", sampler=DDIMConfig(steps=20, guidance=2.0), tiles=tiles)
    free = drawing.images([1, 2], [0, 1])
    goal = functional.interpolate(drawing.images([3, 0], [8, 9]), size=(side, side), mode="bicubic", antialias=True)
    held = drawing.images(
        [1, 2], [0, 1], steering=Steering(guide=ImageGuide(images_BCHW=goal, scale=400.0 / side**2 * 16))
    )
    before, after = (
        l2(functional.interpolate(images, size=(side, side), mode="bicubic", antialias=True), goal)
        for images in (free, held)
    )
    assert (after < 0.5 * before).all()
    same = drawing.images([1, 2], [0, 1], steering=Steering(guide=ImageGuide(images_BCHW=goal, scale=0.0)))
    assert torch.equal(same, free)


def test_a_perceptual_network_guides_too():
    network = perceptual_network(AutoencoderLossConfig(perceptual=PerceptualKind.random), None)
    assert network is not None
    drawing, goal = generator(sampler=DDIMConfig(steps=20)), generator().images([None], [5])
    free = drawing.images([None], [0])
    guide = ImageGuide(images_BCHW=goal, scale=300.0, distance=network)
    held = drawing.images([None], [0], steering=Steering(guide=guide))
    assert network(held, goal) < 0.7 * network(free, goal)


@pytest.mark.parametrize(
    "steering, message",
    [
        ({"known_BCHW": pictures(1, 16, 16)}, "both the known image and where to paint"),
        ({"strength": 0.5}, "strength=0.5 is of a start image"),
        ({"start_BCHW": pictures(1, 16, 16), "strength": 0.0}, "strength=0.0"),
        ({"start_BCHW": pictures(1, 16, 8)}, r"start_BCHW: 1 of 16 x 8, to draw 2 of 16 x 16; give one or 2"),
        ({"start_BCHW": pictures(3, 16, 16)}, r"start_BCHW: 3 of 16 x 16, to draw 2"),
        ({"guide": ImageGuide(images_BCHW=pictures(1, 4, 32), scale=1.0)}, r"images_BCHW: 1 of 4 x 32.*no larger"),
    ],
)  # fmt: skip
def test_steering_that_cannot_be_is_refused(steering: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        generator().images([None] * 2, [0, 1], steering=Steering(**steering))


def test_every_sampler_is_watched_step_by_step():
    for config in SAMPLERS.values():
        frames: list[Frame] = []
        sampler: SamplerConfig = config
        generator(sampler=sampler).images([None], [0], watch=frames.append)
        assert [(frame.done, frame.steps) for frame in frames] == [(done, 6) for done in range(1, 7)]

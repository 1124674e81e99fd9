from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from ldm_scale.diffusion.schedule import (
    End,
    NoiseSchedule,
    ScheduleConfig,
    ScheduleKind,
    Spacing,
    TimestepTable,
)

# beta_start, beta_end: alpha_bar at 0, 249, 499, 749, 999, measured on the reference's own code
GOLDEN = {
    (0.00085, 0.012): (0.99915, 0.67543241, 0.27766965, 0.056623492, 0.0046600985),
    (0.0015, 0.0195): (0.9985, 0.5105143, 0.11584449, 0.0084448305, 1.4230398e-4),
    (0.0015, 0.0155): (0.9985, 0.53742323, 0.15107742, 0.017581434, 6.6866517e-4),
    (0.0015, 0.0205): (0.9985, 0.50425344, 0.108576, 0.0070483938, 9.6910867e-5),
    (0.0015, 0.015): (0.9985, 0.54102808, 0.15630709, 0.019295404, 8.1251847e-4),
}
SCHEDULE = ScheduleConfig().build()


def reference_timesteps(steps: int) -> list[int]:
    """What the reference visits: an integer stride, shifted up by one."""
    return [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]


@pytest.mark.parametrize("betas", GOLDEN)
def test_golden_values(betas: tuple[float, float]):
    schedule = ScheduleConfig(beta_start=betas[0], beta_end=betas[1]).build()
    assert schedule.alphas_cumprod.dtype == torch.float64 and schedule.steps == 1000
    np.testing.assert_allclose(schedule.alphas_cumprod[[0, 249, 499, 749, 999]], GOLDEN[betas], rtol=1e-7)


def test_scaled_linear_is_that_of_diffusers():
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    np.testing.assert_allclose(SCHEDULE.alphas_cumprod, theirs, rtol=1e-4, atol=5e-7)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("kind", ScheduleKind)
def test_every_kind_is_that_of_diffusers(kind: ScheduleKind, zero_terminal_snr: bool):
    names = {ScheduleKind.scaled_linear: "scaled_linear", ScheduleKind.linear: "linear"}
    theirs = DDPMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule=names.get(kind, "squaredcos_cap_v2"),
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    ours = ScheduleConfig(kind=kind, beta_start=0.0015, beta_end=0.0195, zero_terminal_snr=zero_terminal_snr).build()
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=3e-4, atol=1e-6)


def test_linear_is_ho_s():
    betas = np.linspace(1e-4, 0.02, 1000)
    schedule = ScheduleConfig(kind=ScheduleKind.linear, beta_start=1e-4, beta_end=0.02).build()
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12)


def test_cosine_is_a_squared_cosine_until_beta_is_clipped():
    """Nichol & Dhariwal 2021, eq. 17; the betas of a schedule do not matter to it."""
    schedule = ScheduleConfig(kind=ScheduleKind.cosine, beta_start=0.1, beta_end=0.2).build()
    cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], cosine[1:-1] / cosine[0], rtol=1e-10)
    np.testing.assert_allclose(schedule.alphas_cumprod[-1] / schedule.alphas_cumprod[-2], 0.001, rtol=1e-12)


@pytest.mark.parametrize("kind", ScheduleKind)
def test_zero_terminal_snr_moves_the_end_and_keeps_the_beginning(kind: ScheduleKind):
    """Lin et al. 2024, algorithm 1; the end is exact, since samplers and losses divide by what is left there."""
    plain, rescaled = (ScheduleConfig(kind=kind, zero_terminal_snr=zero).build() for zero in (False, True))
    assert rescaled.at(999) == (0.0, 1.0) and rescaled.snr[999] == 0
    np.testing.assert_allclose(rescaled.at(0), plain.at(0), rtol=1e-11)
    alphas = plain.alphas_cumprod.sqrt()
    shifted = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    np.testing.assert_allclose(rescaled.alphas_cumprod.sqrt(), shifted, rtol=1e-12, atol=1e-15)
    noise = torch.ones(1, 4, dtype=torch.float64)
    assert torch.equal(rescaled.noised(5 * noise, noise, torch.tensor([999])), noise)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [2, 10, 1000])
@pytest.mark.parametrize("kind", ScheduleKind)
def test_levels_preserve_variance_and_fall(kind: ScheduleKind, steps: int, zero_terminal_snr: bool):
    schedule = ScheduleConfig(kind=kind, steps=steps, zero_terminal_snr=zero_terminal_snr).build()
    levels = np.array([schedule.at(t) for t in range(steps)])
    np.testing.assert_allclose((levels**2).sum(1), 1, rtol=1e-14)
    np.testing.assert_allclose(levels[:, 0] ** 2, schedule.alphas_cumprod, rtol=1e-14)
    np.testing.assert_allclose((levels[:, 0] / levels[:, 1]) ** 2, schedule.snr, rtol=1e-12)
    assert (np.diff(levels[:, 0]) < 0).all() and (np.diff(schedule.snr) < 0).all()


@pytest.mark.parametrize(
    "given_dtype, dtype", [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2]
)
def test_a_timestep_table_answers_for_each_sample(given_dtype: torch.dtype, dtype: torch.dtype):
    values = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table, t_B = TimestepTable(values), torch.tensor([2, 0, 2, 1])
    for _ in range(2):  # the second time from its copy
        found = table(t_B, torch.empty(4, 5, dtype=given_dtype))
        assert found.dtype == dtype and torch.equal(found, values[:, [2, 0, 2, 1]].to(dtype))


def test_sampling_ends_on_the_first_level_as_in_the_reference():
    assert SCHEDULE.at(None) == SCHEDULE.at(0) == pytest.approx((0.99915**0.5, 0.00085**0.5), rel=1e-12)
    assert ScheduleConfig(end=End.clean).build().at(None) == (1.0, 0.0)


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(t: int):
    with pytest.raises(ValueError, match=rf"{t} is outside"):
        SCHEDULE.at(t)


def test_noised_mixes_each_sample_at_its_own_level():
    t_B = torch.tensor([0, 499, 999])
    z_0, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_t = SCHEDULE.noised(z_0, noise, t_B)
    for i, t in enumerate(t_B.tolist()):
        alpha, sigma = SCHEDULE.at(t)
        torch.testing.assert_close(z_t[i], alpha * z_0[i] + sigma * noise[i], rtol=1e-14, atol=0)


def test_noised_equals_diffusers():
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t_B = torch.arange(0, 1000, 37)
    z_0, noise = torch.randn(2, len(t_B), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        SCHEDULE.noised(z_0, noise, t_B), theirs.add_noise(z_0, noise, t_B), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "given_dtype, dtype", [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2]
)
def test_noised_computes_in_float32_or_better(given_dtype: torch.dtype, dtype: torch.dtype):
    z_0 = torch.ones(2, 1, 1, 1, dtype=given_dtype)
    z_t = ScheduleConfig().build().noised(z_0, torch.zeros_like(z_0), torch.tensor([3, 700]))
    assert z_t.dtype == dtype
    expected = torch.tensor([SCHEDULE.at(3)[0], SCHEDULE.at(700)[0]], dtype=torch.float64)
    torch.testing.assert_close(z_t.flatten().double(), expected, rtol=1e-7 if dtype == torch.float32 else 1e-15, atol=0)


def test_noised_latents_have_the_variance_of_the_level():
    generator = torch.Generator().manual_seed(0)
    z_0, noise = torch.randn(2, 4, 100_000, generator=generator) * torch.tensor([0.5, 1.0])[:, None, None]
    t_B = torch.tensor([0, 200, 600, 999])
    measured = SCHEDULE.noised(z_0, noise, t_B).var(1)
    expected = [SCHEDULE.at(int(t))[0] ** 2 * 0.25 + SCHEDULE.at(int(t))[1] ** 2 for t in t_B]
    torch.testing.assert_close(measured, torch.tensor(expected), rtol=0.03, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500])
def test_leading_is_the_reference_wherever_that_works(steps: int):
    assert SCHEDULE.timesteps(steps) == reference_timesteps(steps)


def test_leading_at_the_papers_step_counts():
    fifty = SCHEDULE.timesteps(50)
    assert fifty[:2] == [981, 961] and fifty[-2:] == [21, 1]
    assert SCHEDULE.timesteps(200)[0] == 996 and SCHEDULE.timesteps(250)[0] == 997
    assert SCHEDULE.timesteps(1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [300, 400, 600])
def test_leading_works_where_the_reference_breaks(steps: int):
    broken = reference_timesteps(steps)
    assert len(broken) != steps or broken[0] > 999
    timesteps = SCHEDULE.timesteps(steps)
    assert len(timesteps) == steps and timesteps[-1] == 1 and 990 < timesteps[0] < 1000


@pytest.mark.parametrize("spacing", [Spacing.trailing, Spacing.linspace])
@pytest.mark.parametrize("steps", [2, 7, 10, 25, 50, 200, 999, 1000])
def test_trailing_and_linspace_are_those_of_diffusers(spacing: Spacing, steps: int):
    theirs = DDIMScheduler(timestep_spacing=spacing.value)
    theirs.set_timesteps(steps)
    ours, expected = SCHEDULE.timesteps(steps, spacing), theirs.timesteps.tolist()
    assert len(ours) == steps
    if len(expected) == steps:  # 999 trailing steps: float rounding gives diffusers another count
        assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) <= (1 if 1000 % steps else 0)


@given(
    total=st.integers(2, 1500),
    share=st.floats(0, 1),
    spacing=st.sampled_from(list(Spacing)),
)
def test_every_count_gives_that_many_different_descending_even_timesteps(total: int, share: float, spacing: Spacing):
    steps = max(1, round(share * total))
    timesteps = NoiseSchedule(torch.linspace(0.99, 0.01, total)).timesteps(steps, spacing)
    assert len(timesteps) == steps
    assert all(0 <= t < total for t in timesteps)
    strides = [t - s for t, s in pairwise(timesteps)]
    assert all(stride >= 1 for stride in strides)
    assert not strides or max(strides) - min(strides) <= 2
    if spacing is not Spacing.leading:
        assert timesteps[0] == total - 1
    if spacing is Spacing.linspace and steps > 1:
        assert timesteps[-1] == 0


@pytest.mark.parametrize("spacing", Spacing)
def test_every_count_works_on_the_papers_schedule(spacing: Spacing):
    for steps in range(1, 1001):
        timesteps = SCHEDULE.timesteps(steps, spacing)
        assert len(timesteps) == steps and timesteps[0] <= 999 and timesteps[-1] >= 0
        assert all(t > s for t, s in pairwise(timesteps))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps: int):
    with pytest.raises(ValueError, match=r"allows 1 \.\.\. 1000"):
        SCHEDULE.timesteps(steps)


@pytest.mark.parametrize(
    "values, key",
    [
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_start": 0.02}, "beta_start=0.02"),
        ({"beta_end": 1.0}, "beta_end=1.0"),
        ({"steps": 1}, "steps=1"),
    ],
)
def test_impossible_configs_are_refused(values: dict, key: str):
    with pytest.raises(ValueError, match=rf"diffusion\.schedule\.{key}"):
        ScheduleConfig(**values)

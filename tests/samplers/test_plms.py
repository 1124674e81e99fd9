import torch

from ldm_scale.diffusion.schedule import NoiseSchedule, ScheduleConfig, Spacing
from ldm_scale.samplers import ddim, plms

SCHEDULE = ScheduleConfig().build()
Z_T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def shrink(z: torch.Tensor, t: int) -> torch.Tensor:
    return torch.tanh(z / 2)


def test_the_network_is_evaluated_once_more_than_there_are_steps():
    visited = []

    def denoise(z, t):
        visited.append(t)
        return shrink(z, t)

    timesteps = SCHEDULE.timesteps(10)
    plms.sample(denoise, Z_T, timesteps, SCHEDULE)
    assert visited == [timesteps[0], timesteps[1], *timesteps[1:]]


def test_one_step_is_one_of_ddim():
    visited = []

    def denoise(z, t):
        visited.append(t)
        return shrink(z, t)

    z = plms.sample(denoise, Z_T, [801], SCHEDULE)
    torch.testing.assert_close(z, ddim.sample(shrink, Z_T, [801], SCHEDULE))
    assert visited == [801]


def test_eps_that_is_a_cubic_of_the_step_is_integrated_exactly():
    """On levels even in sigma / alpha, where the walk is the integral of eps over it, four slopes fit any cubic. After
    the first three steps, which fit less, the sum over a step is the integral of the cubic."""
    ratios = torch.linspace(0.1, 4.1, 9, dtype=torch.float64)
    schedule = NoiseSchedule(1 / (1 + ratios.square()))

    def cubic(ratio: float) -> float:
        return ratio**3 - 2 * ratio**2 + ratio / 2 + 1

    def integral(ratio: float) -> float:
        return ratio**4 / 4 - 2 * ratio**3 / 3 + ratio**2 / 4 + ratio

    def denoise(z, t):
        alpha, sigma = schedule.at(t)
        return (z - sigma * cubic(float(ratios[t]))) / alpha

    frames = []
    plms.sample(denoise, Z_T, list(range(8, 0, -1)), schedule, watch=frames.append)
    places = [frame.z / schedule.at(7 - i if i < 7 else None)[0] for i, frame in enumerate(frames)]
    for i in range(3, 8):
        expected = integral(float(ratios[7 - i])) - integral(float(ratios[8 - i]))
        torch.testing.assert_close(places[i] - places[i - 1], torch.full_like(Z_T, expected))


def test_from_pure_noise_the_first_step_is_one_of_ddim():
    schedule = ScheduleConfig(zero_terminal_snr=True).build()
    timesteps = schedule.timesteps(10, Spacing.trailing)
    assert schedule.at(timesteps[0])[0] == 0
    walks = []
    for sampler in (plms, ddim):
        frames = []
        z = sampler.sample(shrink, Z_T, timesteps, schedule, watch=frames.append)
        assert z.isfinite().all()
        walks.append(frames)
    assert torch.equal(walks[0][0].z, walks[1][0].z) and torch.equal(walks[0][0].z_0, shrink(Z_T, 0))
    assert not torch.equal(walks[0][1].z, walks[1][1].z)

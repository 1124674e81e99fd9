import pytest
import torch

from ldm_scale.diffusion.objective import ObjectiveConfig, Prediction
from ldm_scale.diffusion.schedule import End, ScheduleConfig, Spacing
from ldm_scale.samplers.base import Frame, SamplerConfig, guided_denoiser
from ldm_scale.samplers.ddim import DDIMConfig
from ldm_scale.samplers.ddpm import DDPMConfig
from ldm_scale.samplers.dpm_solver import DPMSolverConfig
from ldm_scale.samplers.plms import PLMSConfig

SCHEDULE = ScheduleConfig().build()
T = 600
DETERMINISTIC = [DDIMConfig(), PLMSConfig(), DPMSolverConfig()]
SAMPLERS = [*DETERMINISTIC, DDIMConfig(eta=1.0), DDPMConfig()]
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
each_deterministic_sampler = pytest.mark.parametrize(
    "sampler", DETERMINISTIC, ids=lambda sampler: type(sampler).__name__
)


def no_noise(step, like):
    raise AssertionError("drew noise")


def shrink(z: torch.Tensor, t: int) -> torch.Tensor:
    return torch.tanh(z / 2)


@each_sampler
def test_every_step_is_watched(sampler: SamplerConfig):
    frames: list[Frame] = []
    visited = []

    def denoise(z, t):
        visited.append(t)
        assert not torch.is_grad_enabled()
        return shrink(z, t)

    z = sampler.build(SCHEDULE, [900, 500, 3])(denoise, torch.randn(2, 4), watch=frames.append)
    assert visited == ([900, 500, 500, 3] if isinstance(sampler, PLMSConfig) else [900, 500, 3])
    assert [(frame.done, frame.steps) for frame in frames] == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(frames[-1].z, z)
    assert all(frame.z_0.shape == z.shape and not torch.equal(frame.z_0, frame.z) for frame in frames[:-1])


@each_sampler
def test_half_precision_starts_are_walked_in_float32(sampler: SamplerConfig):
    assert sampler.build(SCHEDULE, [10, 1])(shrink, torch.randn(1, 4).bfloat16()).dtype == torch.float32


@each_sampler
@pytest.mark.parametrize("timesteps", [[], [1, 500], [500, 500], [1000, 1], [7, 5, -1]])
def test_impossible_timesteps_are_refused_before_the_first_step(sampler: SamplerConfig, timesteps: list[int]):
    def denoise(z, t):
        raise AssertionError("began to walk")

    with pytest.raises(ValueError, match="timestep"):
        sampler.build(SCHEDULE, timesteps)(denoise, torch.randn(1, 4))


@each_deterministic_sampler
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("end", End)
def test_deterministic_walks_keep_the_noise_where_the_estimate_is_sure(
    sampler: SamplerConfig, zero_terminal_snr: bool, end: End
):
    """With one possible z_0 the walk is a straight line, alpha z_0 + sigma noise, however z_0 and eps are extrapolated.
    So the part that inpainting keeps is at the level of the rest after every step."""
    schedule = ScheduleConfig(zero_terminal_snr=zero_terminal_snr, end=end).build()
    timesteps = schedule.timesteps(20, Spacing.trailing)
    point, noise = torch.full((2, 3), 0.8, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    frames: list[Frame] = []
    alpha, sigma = schedule.at(timesteps[0])
    walk = sampler.build(schedule, timesteps)
    walk(lambda z, t: point, alpha * point + sigma * noise, noise=no_noise, watch=frames.append)
    for frame, t in zip(frames, [*timesteps[1:], None], strict=True):
        alpha, sigma = schedule.at(t)
        torch.testing.assert_close(frame.z, alpha * point + sigma * noise, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(frame.z_0, point, rtol=1e-9, atol=1e-9)


@each_deterministic_sampler
def test_deterministic_walks_draw_nothing_and_repeat_themselves(sampler: SamplerConfig):
    z_T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    walk = sampler.build(SCHEDULE, SCHEDULE.timesteps(20))
    first, second = (walk(shrink, z_T, noise=no_noise) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, z_T)


def test_strength_walks_the_last_of_the_steps():
    config = DPMSolverConfig(steps=10, spacing=Spacing.leading)
    whole = config.timesteps(SCHEDULE)
    assert whole == SCHEDULE.timesteps(10)
    assert config.timesteps(SCHEDULE, 0.3) == whole[-3:] == [201, 101, 1]
    assert config.timesteps(SCHEDULE, 1e-6) == [1]


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01])
def test_another_strength_is_refused(strength: float):
    with pytest.raises(ValueError, match=f"strength={strength}"):
        DDIMConfig().timesteps(SCHEDULE, strength)


@pytest.mark.parametrize(
    "values", [{"steps": 0}, {"guidance": -1.0}, {"guidance_rescale": -0.1}, {"guidance_rescale": 1.1}]
)
def test_impossible_configs_are_refused(values: dict[str, float]):
    ((key, value),) = values.items()
    for config in (DDIMConfig, DDPMConfig, PLMSConfig, DPMSolverConfig):
        with pytest.raises(ValueError, match=rf"sampler\.{key}={value}"):
            config(**values)


def test_more_steps_than_the_schedule_has_are_refused():
    with pytest.raises(ValueError, match="1001 sampling steps"):
        DDIMConfig(steps=1001).timesteps(SCHEDULE)


class Network(torch.nn.Module):
    """Answers with a different, known function of every input; remembers its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, z_BCHW, t_B, context_BLD=None, vector_BE=None):
        self.calls.append((z_BCHW, t_B))
        out = torch.sin(z_BCHW) + t_B[:, None, None, None] / 1000
        if context_BLD is not None:
            out = out * context_BLD.mean((1, 2))[:, None, None, None]
        if vector_BE is not None:
            out = out + vector_BE.sum(1)[:, None, None, None]
        return out


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 8, 8, generator=generator)
    conditional = {"context_BLD": torch.rand(3, 5, 6, generator=generator), "vector_BE": torch.rand(3, 2)}
    unconditional = {"vector_BE": torch.rand(3, 2), "context_BLD": torch.rand(3, 5, 6, generator=generator)}
    return z, conditional, unconditional


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 10.0])
def test_guidance_formula(prediction: Prediction, scale: float, inputs):
    """eps = e_u + s (e_c - e_u), whatever the network predicts."""
    z, conditional, unconditional = inputs
    objective, network, t_B = ObjectiveConfig(prediction=prediction).build(), Network(), torch.full((3,), T)
    alpha, sigma = SCHEDULE.at(T)
    e_c = objective.to_eps(network(z, t_B, **conditional), z, alpha, sigma)
    e_u = objective.to_eps(network(z, t_B, **unconditional), z, alpha, sigma)
    expected = (z - sigma * (e_u + scale * (e_c - e_u))) / alpha
    denoise = guided_denoiser(network, SCHEDULE, objective, conditional, unconditional, scale)
    torch.testing.assert_close(denoise(z, T), expected, rtol=1e-4, atol=1e-4)


def test_both_halves_go_in_one_call_the_unconditional_first(inputs):
    z, conditional, unconditional = inputs
    seen = {}

    def network(z_BCHW, t_B, **conditions):
        seen.update(conditions, z=z_BCHW, t=t_B)
        return z_BCHW

    guided_denoiser(network, SCHEDULE, ObjectiveConfig().build(), conditional, unconditional, 2.0)(z, T)
    assert torch.equal(seen["z"], torch.cat((z, z)))
    assert seen["t"].tolist() == [T] * 6 and seen["t"].dtype == torch.int64
    for name in conditional:
        assert torch.equal(seen[name], torch.cat((unconditional[name], conditional[name])))


def test_scale_one_skips_the_unconditional_half(inputs):
    z, conditional, unconditional = inputs
    network, objective = Network(), ObjectiveConfig().build()
    alone = guided_denoiser(network, SCHEDULE, objective, conditional)(z, T)
    assert [len(call[0]) for call in network.calls] == [3]
    assert torch.equal(alone, guided_denoiser(network, SCHEDULE, objective, conditional, unconditional, 1.0)(z, T))
    assert [len(call[0]) for call in network.calls] == [3, 3]
    nearly = guided_denoiser(network, SCHEDULE, objective, conditional, unconditional, 1 + 1e-6)(z, T)
    torch.testing.assert_close(alone, nearly, rtol=1e-4, atol=1e-4)


def test_scale_zero_is_the_unconditional_model(inputs):
    z, conditional, unconditional = inputs
    network, objective = Network(), ObjectiveConfig().build()
    torch.testing.assert_close(
        guided_denoiser(network, SCHEDULE, objective, conditional, unconditional, 0.0)(z, T),
        guided_denoiser(network, SCHEDULE, objective, unconditional)(z, T),
    )


def test_an_unconditional_network_takes_no_conditions(inputs):
    denoise = guided_denoiser(Network(), SCHEDULE, ObjectiveConfig().build(), {})
    alpha, sigma = SCHEDULE.at(T)
    z = inputs[0]
    torch.testing.assert_close(denoise(z, T), (z - sigma * (torch.sin(z) + T / 1000)) / alpha)


def test_half_precision_outputs_are_mixed_in_float32(inputs):
    z, conditional, unconditional = inputs

    def network(z_BCHW, t_B, **conditions):
        return Network()(z_BCHW, t_B, **conditions).bfloat16()

    objective = ObjectiveConfig(prediction=Prediction.z0).build()
    z_0 = guided_denoiser(network, SCHEDULE, objective, conditional, unconditional, 10.0)(z, T)
    e_u, e_c = (network(z, torch.full((3,), T), **c).float() for c in (unconditional, conditional))
    assert z_0.dtype == torch.float32
    assert torch.equal(z_0, e_u + 10.0 * (e_c - e_u))


def test_rescaling_leaves_a_network_that_answers_zero_alone(inputs):
    """As an untrained one does: 0 times 0 / 0 would be nan."""
    z, conditional, unconditional = inputs
    objective = ObjectiveConfig(prediction=Prediction.z0).build()
    denoise = guided_denoiser(
        lambda z_BCHW, t_B, **_: torch.zeros_like(z_BCHW), SCHEDULE, objective, conditional, unconditional, 5.0, 0.7
    )
    assert torch.equal(denoise(z, T), torch.zeros_like(z))


@pytest.mark.parametrize(
    "unconditional", [None, {}, {"context_BLD": torch.zeros(1, 5, 6), "vector_BE": torch.zeros(3, 2)}]
)
def test_halves_that_do_not_match_are_refused(unconditional, inputs):
    with pytest.raises(ValueError, match=r"must have the same inputs.*sampler\.guidance=1"):
        guided_denoiser(Network(), SCHEDULE, ObjectiveConfig().build(), inputs[1], unconditional, 2.0)


def test_guidance_without_conditions_is_refused():
    with pytest.raises(ValueError, match="must have the same inputs"):
        guided_denoiser(Network(), SCHEDULE, ObjectiveConfig().build(), {}, {}, 2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_the_gpu(inputs):
    z, conditional, unconditional = (
        {k: v.cuda() for k, v in x.items()} if isinstance(x, dict) else x.cuda() for x in inputs
    )
    denoise = guided_denoiser(Network(), SCHEDULE, ObjectiveConfig().build(), conditional, unconditional, 2.0, 0.7)
    denoise(z, T)
    torch.cuda.set_sync_debug_mode("error")
    try:
        denoise(z, T - 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_sampler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_walk_does_not_wait_for_the_gpu(sampler: SamplerConfig):
    walk, z_T = sampler.build(SCHEDULE, SCHEDULE.timesteps(20)), torch.randn(2, 4, device="cuda")
    walk(shrink, z_T)
    torch.cuda.set_sync_debug_mode("error")
    try:
        walk(shrink, z_T)
    finally:
        torch.cuda.set_sync_debug_mode("default")

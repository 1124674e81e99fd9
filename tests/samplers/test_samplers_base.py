import pytest
import torch

from ldm_scale.diffusion.objective import ObjectiveConfig, Prediction
from ldm_scale.diffusion.schedule import ScheduleConfig
from ldm_scale.samplers.base import guided_denoiser

SCHEDULE = ScheduleConfig().build()
T = 600


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
    denoise = guided_denoiser(Network(), SCHEDULE, ObjectiveConfig().build(), conditional, unconditional, 2.0)
    denoise(z, T)
    torch.cuda.set_sync_debug_mode("error")
    try:
        denoise(z, T - 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The KL autoencoder against diffusers' as an oracle, published sizes, refusals."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as TheirAutoencoderKL

from ldm_scale.first_stage.kl import AutoencoderKL, AutoencoderKLConfig

PUBLISHED: list[tuple[int, int, dict[str, Any]]] = [
    # parameters and tensors of facts.md 2.1; kl-f8 is the default
    (55_312_063, 204, {"channel_mult": [1, 2, 4], "z_channels": 3, "embed_dim": 3}),
    (83_653_863, 248, {}),
    (69_610_963, 342, {"channel_mult": [1, 1, 2, 2, 4], "z_channels": 16, "embed_dim": 16, "attention_factors": [16]}),
    (103_880_131, 436, {"channel_mult": [1, 1, 2, 2, 4, 4], "z_channels": 64, "embed_dim": 64,
                        "attention_factors": [16, 32]}),
]  # fmt: skip


def toy(**changes: Any) -> AutoencoderKL:
    fields = {"channels": 16, "channel_mult": [1, 2, 2], "num_res_blocks": 1, "norm_groups": 8}
    torch.manual_seed(0)
    return AutoencoderKLConfig(**(fields | changes)).build()


def randomise(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5


@pytest.mark.parametrize("parameters, tensors, fields", PUBLISHED)
def test_sizes_are_the_published_ones(parameters: int, tensors: int, fields: dict[str, Any]):
    with torch.device("meta"):
        state = AutoencoderKLConfig(**fields).build().state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert len(state) == tensors


@torch.no_grad()
def test_equals_diffusers_both_ways():
    theirs = TheirAutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    ours = toy().eval()
    images = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for source, target, seed in ((theirs, ours, 1), (ours, theirs, 2)):
        randomise(source, seed)
        target.load_state_dict(source.state_dict(), strict=True)
        moments, expected = ours.encode(images), theirs.encode(images).latent_dist
        for got, want in ((moments.mean, expected.mean), (moments.logvar, expected.logvar)):
            assert got is not None
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        decoded, expected_images = ours.decode(expected.mean), theirs.decode(expected.mean).sample
        assert expected_images.abs().max() > 0.1
        assert (decoded - expected_images).abs().max() <= 1e-5 * expected_images.abs().max()


@torch.no_grad()
def test_log_variance_is_clamped():
    model = toy()
    for bias, bound in ((-1e4, -30.0), (1e4, 20.0)):
        model.quant_conv.bias[4:] = bias
        logvar = model.encode(torch.zeros(1, 3, 8, 8)).logvar
        assert logvar is not None
        assert torch.equal(logvar, torch.full((1, 4, 2, 2), bound))


@torch.no_grad()
def test_forward_decodes_what_the_noise_draws():
    model = toy(embed_dim=3).eval()
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 4, 4)
    rebuilt = model(images, noise)
    out, moments = rebuilt.images, rebuilt.moments
    assert out.shape == images.shape
    assert moments.mean.shape == (2, *model.config.latent_shape(16))
    assert torch.equal(out, model.decode(moments.sample(noise)))
    assert not torch.equal(out, model(images, -noise).images)


@torch.no_grad()
def test_rescaled_channels_are_other_latents_of_the_same_images():
    model = toy()
    randomise(model, 5)
    images, std = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([0.5, 1.0, 3.0, 8.0])
    before, noise = model.encode(images), torch.randn(2, 4, 4, 4)
    out = model(images, noise).images
    model.rescale_channels(std)
    after, by = model.encode(images), std[:, None, None]
    assert before.logvar is not None
    assert after.logvar is not None
    torch.testing.assert_close(after.mean, before.mean / by)
    torch.testing.assert_close(after.logvar.exp(), before.logvar.exp() / by**2)
    torch.testing.assert_close(model(images, noise).images, out, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    model = toy()
    randomise(model, 3)
    rebuilt = model(torch.rand(2, 3, 16, 16), torch.randn(2, 4, 4, 4))
    out, moments = rebuilt.images, rebuilt.moments
    assert moments.logvar is not None
    (out.square().mean() + moments.logvar.square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # Softmax does not see a shift of all its inputs: the bias of k has no gradient but round-off.
    assert [name for name in without if not name.endswith("to_k.bias")] == []


def test_images_that_f_does_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"18 x 16; .* multiples of f = 4"):
        toy().encode(torch.zeros(1, 3, 18, 16))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embed_dim": 0}, r"^first_stage\.embed_dim=0; must be at least 1"),
        ({"channel_mult": []}, r"^first_stage\.channel_mult=\[\]"),
        ({"attention_factors": [8]}, r"^first_stage\.attention_factors=\[8\]; .*\[1, 2, 4\]"),
        ({"norm_groups": 32}, r"^first_stage\.norm_groups=32; must divide every width: 16, 32, 32"),
        ({"scale": 0.0}, r"^first_stage\.scale=0\.0"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        toy(**changes)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    model = toy()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(compiled(images, noise).images, model(images, noise).images, rtol=1e-4, atol=1e-5)

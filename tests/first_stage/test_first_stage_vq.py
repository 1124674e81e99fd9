"""The VQ autoencoder against diffusers' as an oracle, published sizes, the codebook by brute force, refusals."""

from typing import Any

import pytest
import torch
from diffusers import VQModel
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_scale.first_stage import vq
from ldm_scale.first_stage.base import MomentsKind
from ldm_scale.first_stage.vq import AutoencoderVQ, AutoencoderVQConfig, Codebook

F8 = {"channel_mult": [1, 2, 2, 4], "z_channels": 4, "embed_dim": 4, "attention_factors": [8]}
F16 = {"channel_mult": [1, 1, 2, 2, 4], "z_channels": 8, "embed_dim": 8, "attention_factors": [16]}
PUBLISHED: dict[str, tuple[int, int, dict[str, Any]]] = {
    # parameters and tensors of facts.md 2.1; vq-f4 is the default
    "f4": (55_322_782, 205, {}),
    "f4_noattn": (53_219_486, 185, {"mid_attention": False}),
    "f8": (67_717_295, 299, F8 | {"codebook_size": 16384}),
    "f8_n256": (67_652_783, 299, F8 | {"codebook_size": 256}),
    "f16": (69_593_371, 343, F16 | {"codebook_size": 16384}),
}


def toy(**changes: Any) -> AutoencoderVQ:
    fields = {"channels": 16, "channel_mult": [1, 2, 2], "num_res_blocks": 1, "norm_groups": 8, "codebook_size": 32}
    torch.manual_seed(0)
    return AutoencoderVQConfig(**(fields | changes)).build()


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Move every parameter; codebook vectors become as far apart as latents are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.5 if name.startswith("quantize.") else 0.2 / max(1, parameter[0].numel()) ** 0.5
            parameter += scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str):
    parameters, tensors, fields = PUBLISHED[name]
    with torch.device("meta"):
        state = AutoencoderVQConfig(**fields).build().state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert len(state) == tensors


@torch.no_grad()
@pytest.mark.parametrize("mid_attention", [True, False])
def test_equals_diffusers_both_ways(mid_attention: bool):
    theirs = VQModel(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=3,
        vq_embed_dim=4,
        num_vq_embeddings=32,
        norm_num_groups=8,
        mid_block_add_attention=mid_attention,
    ).eval()
    ours = toy(embed_dim=4, mid_attention=mid_attention).eval()
    generator = torch.Generator().manual_seed(0)
    images, latents = (
        torch.rand(2, 3, 32, 24, generator=generator) * 2 - 1,
        torch.randn(2, 4, 8, 6, generator=generator),
    )
    for source, target, seed in ((theirs, ours, 1), (ours, theirs, 2)):
        randomise(source, seed)
        target.load_state_dict(source.state_dict(), strict=True)
        encoded, expected = ours.encode(images), theirs.encode(images).latents
        assert encoded.kind is MomentsKind.POINT
        assert (encoded.mean - expected).abs().max() <= 1e-5 * expected.abs().max()
        quantised, _, (_, _, codes) = theirs.quantize(latents)
        assert len(codes.unique()) > 10
        assert torch.equal(ours.quantize(latents).indices.flatten(), codes)
        torch.testing.assert_close(ours.quantize(latents).quantised, quantised, rtol=0, atol=1e-6)
        decoded, expected_images = ours.decode(latents), theirs.decode(latents).sample
        assert expected_images.abs().max() > 0.1
        assert (decoded - expected_images).abs().max() <= 1e-5 * expected_images.abs().max()


@torch.no_grad()
def test_forward_quantises_the_latent_and_no_noise_moves_it():
    model = toy().eval()
    randomise(model, 3)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    rebuilt = model(images, torch.randn(2, 3, 4, 4))
    out, latents, quantised = rebuilt.images, rebuilt.moments.mean, rebuilt.codes.quantised
    assert latents.shape == (2, *model.config.latent_shape(16))
    assert torch.equal(out, model(images, torch.zeros(2, 3, 4, 4)).images)
    assert torch.equal(quantised, model.quantize(latents).quantised)
    assert not torch.equal(quantised, latents)
    assert torch.equal(out, model.decode(latents))
    assert torch.equal(out, model.decoder(model.post_quant_conv(quantised)))
    assert torch.equal(out, model.decode(quantised))  # what is quantised stays


def test_gradients_of_images_pass_the_codebook_and_those_of_codes_move_it():
    model = toy()
    randomise(model, 4)
    latents = torch.randn(2, 3, 4, 4)
    quantised = model.quantize(latents).quantised.detach()
    through, around = latents.clone().requires_grad_(), quantised.clone().requires_grad_()
    model.decode(through).square().sum().backward()
    model.decoder(model.post_quant_conv(around)).square().sum().backward()
    torch.testing.assert_close(through.grad, around.grad)
    model.zero_grad()
    rebuilt = model(torch.rand(2, 3, 16, 16), torch.zeros(2, 3, 4, 4))
    rebuilt.images.square().mean().backward(retain_graph=True)
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert [name for name in without if not name.endswith("to_k.bias")] == ["quantize.embedding.weight"]
    model.zero_grad()
    rebuilt.codes.quantised.sum().backward()
    grad, taken = model.quantize.embedding.weight.grad, rebuilt.codes.indices.flatten().bincount(minlength=32)
    torch.testing.assert_close(grad, taken[:, None].expand(32, 3).float())
    assert rebuilt.codes.size == 32


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that anything makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_codes_are_the_nearest_in_any_chunks(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    codebook, latents = Codebook(64, 3), torch.randn(2, 3, 7, 5)
    torch.nn.init.normal_(codebook.embedding.weight)
    rows = latents.double().movedim(1, -1)[..., None, :] - codebook.embedding.weight.double()
    nearest = rows.square().sum(-1).argmin(-1)
    for at_once in (1, 3 * 64, 10**9):  # rows at once: one; three, which do not divide 70; all
        monkeypatch.setattr(vq, "DISTANCES_AT_ONCE", at_once)
        with Largest() as largest:
            codes = codebook.nearest(latents)
        assert torch.equal(codes, nearest)
        assert largest.numel <= max(min(at_once, 70 * 64), latents.numel())


def test_autocast_moves_no_code():
    torch.manual_seed(0)
    codebook, latents = Codebook(4096, 4), torch.randn(1, 4, 8, 8) / 4096  # as close together as they start
    with torch.autocast("cpu", torch.bfloat16):
        codes = codebook(latents)
    assert torch.equal(codes.indices, codebook.nearest(latents))
    assert torch.equal(codes.quantised, codebook.embedding.weight[codes.indices].movedim(-1, 1))


def test_equally_near_vectors_give_the_first():
    codebook = Codebook(3, 1)
    with torch.no_grad():
        codebook.embedding.weight.copy_(torch.tensor([[5.0], [1.0], [-1.0]]))
    assert codebook.nearest(torch.zeros(1, 1, 1, 1)).item() == 1


def test_codebook_starts_uniform():
    torch.manual_seed(0)
    weight = Codebook(8192, 4).embedding.weight * 8192
    assert weight.abs().max() <= 1
    assert weight.std().item() == pytest.approx(3**-0.5, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"codebook_size": 0}, r"^first_stage\.codebook_size=0; must be at least 1"),
        ({"z_channels": 0}, r"^first_stage\.z_channels=0; must be at least 1"),
        ({"attention_factors": [8]}, r"^first_stage\.attention_factors=\[8\]; .*\[1, 2, 4\]"),
        ({"scale": -1.0}, r"^first_stage\.scale=-1\.0"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        toy(**changes)


def test_images_that_f_does_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"18 x 16; .* multiples of f = 4"):
        toy().encode(torch.zeros(1, 3, 18, 16))


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    model = toy()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images, noise = torch.rand(2, 3, 16, 16), torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(compiled(images, noise).images, model(images, noise).images, rtol=1e-4, atol=1e-5)


def test_every_parameter_belongs_to_a_part():
    model = toy()
    parts = {name: model.part_of(name) for name, _ in model.named_parameters()}
    assert set(parts.values()) == {"encoder", "decoder", "codebook"}
    assert (parts["quant_conv.bias"], parts["post_quant_conv.bias"]) == ("encoder", "decoder")

"""The U-Net against diffusers' as an oracle, published sizes, and what training needs of it."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ldm_scale.nn.attention import AttentionBlock
from ldm_scale.nn.unet import UNet, UNetConfig

LATENT_32 = {"in_channels": 4, "out_channels": 4, "attention_factors": [4, 2, 1]}
LATENT_64 = {"in_channels": 3, "out_channels": 3, "attention_factors": [8, 4, 2], "head_channels": 32}
STABLE = LATENT_32 | {"model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_heads": 8}
CLASS_F8 = LATENT_32 | {"model_channels": 256, "channel_mult": [1, 2, 4], "head_channels": 32}
LAYOUT = LATENT_64 | {"model_channels": 128, "channel_mult": [1, 2, 3, 4], "transformer_depth": 3}
FACES = LATENT_64 | {"model_channels": 224, "channel_mult": [1, 2, 3, 4]}
UPSCALE = LATENT_64 | {"in_channels": 6, "model_channels": 160, "channel_mult": [1, 2, 2, 4], "attention_factors": [8]}
SEMANTIC = {"in_channels": 6, "out_channels": 3, "model_channels": 128, "channel_mult": [1, 4, 8], "num_heads": 8}
PUBLISHED: dict[str, tuple[int, int, dict[str, Any]]] = {  # parameters and tensors of facts.md 2.2
    "txt2img-1p4B": (872_300_484, 686, STABLE | {"context_dim": 1280}),
    "SD v1": (859_520_964, 686, STABLE | {"context_dim": 768}),
    "cin256": (394_984_196, 626, CLASS_F8 | {"context_dim": 512}),
    "layout2img": (246_277_379, 1328, LAYOUT | {"context_dim": 512}),
    "celeba256": (274_056_163, 368, FACES),
    "bsr_sr": (113_622_563, 306, UPSCALE),
    "semantic": (215_229_315, 216, SEMANTIC),
}


def toy(**changes: Any) -> UNetConfig:
    fields = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_factors": [2],
        "num_heads": 4,
        "context_dim": 24,
        "norm_groups": 16,
    }
    return UNetConfig(**(fields | changes))


def inputs(*, channels: int = 4, context_dim: int = 24, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(3, channels, side, side, generator=generator)
    return z, torch.tensor([0, 500, 999]), torch.randn(3, 5, context_dim, generator=generator)


def assert_same_output(ours: Tensor, theirs: Tensor) -> None:
    assert ours.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str):
    parameters, tensors, fields = PUBLISHED[name]
    with torch.device("meta"):
        unet = UNetConfig(**fields).build()
    state = unet.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    # Self-attention without context: the reference keeps q, k and v in one convolution, we have three layers.
    split = sum(isinstance(module, AttentionBlock) for module in unet.modules())
    assert len(state) - 4 * split == tensors


@torch.no_grad()
def test_equals_diffusers_text_to_image_topology(randomise: Any):
    """The levels of the 1.45B model, narrow: attention on three of four, cross-attention, eight heads, depth 2."""
    config = toy(
        channel_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attention_factors=[4, 2, 1],
        num_heads=8,
        transformer_depth=2,
    )
    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8,  # the number of heads, by an old mistake of theirs
        transformer_layers_per_block=2,
        cross_attention_dim=24,
        norm_num_groups=16,
    )
    randomise(theirs, 1)
    ours = config.build().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    z, t, context = inputs()
    assert_same_output(ours(z, t, context), theirs(z, t, context).sample)

    randomise(ours, 2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_output(ours(z, t, context), theirs(z, t, context).sample)


@torch.no_grad()
def test_equals_diffusers_with_concatenated_channels_and_a_vector(randomise: Any):
    theirs = UNet2DConditionModel(
        in_channels=7,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=24,
        norm_num_groups=16,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=12,
    )
    randomise(theirs, 3)
    ours = toy(in_channels=7, vector_dim=12).build().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    z, t, context = inputs(channels=7)
    vector = torch.randn(3, 12)
    assert_same_output(ours(z, t, context, vector), theirs(z, t, context, class_labels=vector).sample)


@torch.no_grad()
def test_equals_diffusers_without_context(randomise: Any):
    theirs = UNet2DModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=16,
        freq_shift=0,
    )
    randomise(theirs, 4)
    ours = toy(context_dim=0, num_heads=0, head_channels=8).build().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    z, t, _ = inputs()
    assert_same_output(ours(z, t), theirs(z, t).sample)


@torch.no_grad()
def test_starts_by_predicting_zero_and_can_be_any_even_shape():
    unet = toy().build()
    z, t, context = inputs()
    assert unet(z, t, context).abs().max() == 0
    assert unet(z[:, :, :4, :6], t, context).shape == (3, 4, 4, 6)


def test_gradients_reach_every_parameter(randomise: Any):
    unet = randomise(toy(vector_dim=6).build(), 5)
    z, t, context = inputs()
    unet(z, t, context, torch.randn(3, 6)).square().mean().backward()
    without = [name for name, p in unet.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == []


def test_same_seed_same_weights_and_dropout_only_in_training(randomise: Any):
    def build() -> UNet:
        torch.manual_seed(3)
        return toy(dropout=0.5).build()

    first, second = build(), build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    randomise(first, 6)
    with torch.no_grad():
        assert torch.equal(first(*inputs()), first(*inputs()))
        first.train()
        assert not torch.equal(first(*inputs()), first(*inputs()))


@torch.no_grad()
def test_batch_is_independent_samples(randomise: Any):
    unet = randomise(toy().build(), 8)
    z, t, context = inputs()
    together = unet(z, t, context)
    for i in range(3):
        alone = unet(z[i : i + 1], t[i : i + 1], context[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_runs_in_bfloat16_and_any_memory_layout(randomise: Any, layout: torch.memory_format):
    unet = randomise(toy().build(), 9)
    z, t, context = inputs()
    exact = unet(z, t, context)
    unet.to(dtype=torch.bfloat16, memory_format=layout)
    out = unet(z.bfloat16().to(memory_format=layout), t, context.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() <= 0.05 * exact.norm()


@torch.no_grad()
def test_float_timesteps_are_integer_ones(randomise: Any):
    unet = randomise(toy().build(), 10)
    z, t, context = inputs()
    assert torch.equal(unet(z, t.float(), context), unet(z, t, context))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": None}, r"context has width 0 .* unet\.context_dim=24"),
        ({"context": torch.zeros(3, 5, 23)}, r"context has width 23 .* unet\.context_dim=24"),
        ({"vector": torch.zeros(3, 9)}, r"vector has width 9 .* unet\.vector_dim=0"),
        ({"z": torch.zeros(3, 5, 8, 8)}, r"5 channels; unet\.in_channels=4"),
        ({"z": torch.zeros(3, 4, 8, 7)}, r"8 x 7; .* multiples of 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Tensor | None], message: str):
    z, t, context = inputs()
    given = {"z": z, "context": context, "vector": None} | change
    with pytest.raises(ValueError, match=message):
        toy().build()(given["z"], t, given["context"], given["vector"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"in_channels": 0}, r"^unet\.in_channels=0; must be at least 1"),
        ({"channel_mult": []}, r"^unet\.channel_mult=\[\]"),
        ({"channel_mult": [1, 0]}, r"^unet\.channel_mult=\[1, 0\]"),
        ({"attention_factors": [4]}, r"^unet\.attention_factors=\[4\]; .*\[1, 2\]"),
        ({"num_heads": 0}, r"^unet\.num_heads=0 unet\.head_channels=0; state exactly one"),
        ({"head_channels": 8}, r"^unet\.num_heads=4 unet\.head_channels=8; state exactly one"),
        ({"num_heads": 5}, r"^unet\.num_heads=5; must divide every width that has attention: \[64, 64\]"),
        ({"norm_groups": 24}, r"^unet\.norm_groups=24; must divide every width: 32, 64"),
        ({"dropout": 1.0}, r"^unet\.dropout=1\.0"),
        ({"context_dim": -1}, r"^unet\.context_dim=-1"),
        ({"model_channels": 33}, r"^unet\.model_channels=33; must be even"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        toy(**changes)


@pytest.mark.slow
def test_compiles_without_graph_breaks(randomise: Any):
    unet: nn.Module = randomise(toy().build(), 11)
    z, t, context = inputs()
    expected = unet(z, t, context)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    out = compiled(z, t, context)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.square().mean().backward()
    assert all(p.grad is not None for p in unet.parameters())

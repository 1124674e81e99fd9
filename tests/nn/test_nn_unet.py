"""The U-Net against diffusers' as an oracle, published sizes, and what training needs of it."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention as TheirAttention
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
BY_COUNT = {"head_channels": 0, "num_heads": 8}
CLASS_F4 = LATENT_64 | {"model_channels": 192, "channel_mult": [1, 2, 3, 5]}
CHURCHES = LATENT_32 | {"model_channels": 192, "channel_mult": [1, 2, 2, 4, 4], "attention_factors": [8, 4, 2, 1]}
INPAINTING = LATENT_64 | BY_COUNT | {"in_channels": 7, "model_channels": 256, "channel_mult": [1, 2, 3, 4]}
RETRIEVAL = LATENT_32 | {"in_channels": 16, "out_channels": 16, "model_channels": 448, "channel_mult": [1, 2, 3, 4]}
SEMANTIC = {"in_channels": 6, "out_channels": 3, "model_channels": 128, "channel_mult": [1, 4, 8], "num_heads": 8}
PUBLISHED: dict[str, tuple[int, int, dict[str, Any]]] = {  # parameters and tensors of facts.md 2.2
    "txt2img-1p4B": (872_300_484, 686, STABLE | {"context_dim": 1280}),
    "SD v1": (859_520_964, 686, STABLE | {"context_dim": 768}),
    "cin256": (394_984_196, 626, CLASS_F8 | {"context_dim": 512}),
    "cin256-v2": (400_920_579, 688, CLASS_F4 | {"head_channels": 0, "num_heads": 1, "context_dim": 512}),
    "text2img256": (403_623_939, 688, CLASS_F4 | {"context_dim": 640}),
    "layout2img": (246_277_379, 1328, LAYOUT | {"context_dim": 512}),
    "celeba256": (274_056_163, 368, FACES),
    "lsun_churches": (
        294_966_916,
        520,
        CHURCHES | {"num_heads": 8, "scale_shift_norm": True, "residual_resampling": True},
    ),
    "inpainting_big": (387_245_827, 416, INPAINTING | {"residual_resampling": True}),
    "RDM 768": (1_335_480_400, 688, RETRIEVAL | {"head_channels": 32, "context_dim": 768}),
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


PLAIN = {"context_dim": 0}
WIDE_HEADS = {"num_heads": 0, "head_channels": 8}
TEXT_TO_IMAGE = {"channel_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attention_factors": [4, 2, 1], "num_heads": 8}
DEEP_PLAIN = PLAIN | {"channel_mult": [1, 2, 3], "attention_factors": [2, 1], "num_res_blocks": 2}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "text_to_image": TEXT_TO_IMAGE | {"transformer_depth": 2},
    "one_head": {"num_heads": 1, "transformer_depth": 3},
    "head_width": WIDE_HEADS | {"channel_mult": [1, 3], "attention_factors": [2, 1]},
    "concatenated_channels_and_vector": {"in_channels": 7, "vector_dim": 12},
    "scale_shift_with_context": {"scale_shift_norm": True},
    "plain": PLAIN | WIDE_HEADS,
    "plain_head_count": DEEP_PLAIN,
    "plain_attention_in_the_middle_only": PLAIN | {"in_channels": 6, "channel_mult": [1, 4], "attention_factors": []},
    "churches": DEEP_PLAIN | {"scale_shift_norm": True, "residual_resampling": True},
    "inpainting": PLAIN | WIDE_HEADS | {"in_channels": 7, "channel_mult": [1, 2, 2], "residual_resampling": True},
}


def oracle(config: UNetConfig) -> UNet2DModel | UNet2DConditionModel:
    """The network of diffusers that has the shape of `config`."""
    attended = [2**level in config.attention_factors for level in range(len(config.channel_mult))]
    kind = "Attn" if config.context_dim == 0 else "CrossAttn"
    down, up = ("ResnetDownsample", "ResnetUpsample") if config.residual_resampling else ("Down", "Up")
    shape: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": tuple(config.widths),
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "down_block_types": tuple(f"{kind}DownBlock2D" if has else f"{down}Block2D" for has in attended),
        "up_block_types": tuple(f"{kind}UpBlock2D" if has else f"{up}Block2D" for has in reversed(attended)),
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }
    heads = [config.num_heads or width // config.head_channels for width in config.widths]
    if config.context_dim:
        vector = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": config.vector_dim}
        return UNet2DConditionModel(
            **shape,
            attention_head_dim=tuple(heads),  # the number of heads, by an old mistake of theirs
            transformer_layers_per_block=config.transformer_depth,
            cross_attention_dim=config.context_dim,
            **(vector if config.vector_dim else {}),
        )
    resampling = "resnet" if config.residual_resampling else "conv"
    theirs = UNet2DModel(
        **shape,
        attention_head_dim=8,
        attn_norm_num_groups=config.norm_groups,
        downsample_type=resampling,
        upsample_type=resampling,
        freq_shift=0,
    )
    for module in theirs.modules():  # they can only be told a head's width, one for all levels
        if isinstance(module, TheirAttention):
            module.heads = config.num_heads or module.inner_dim // config.head_channels
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_equals_diffusers_both_ways(randomise: Any, name: str):
    config = toy(**TOPOLOGIES[name])
    ours, theirs = config.build().eval(), oracle(config).eval()
    z, t, context = inputs(channels=config.in_channels)
    vector = torch.randn(3, config.vector_dim) if config.vector_dim else None
    for source, target, seed in ((theirs, ours, 1), (ours, theirs, 2)):
        randomise(source, seed)
        target.load_state_dict(source.state_dict(), strict=True)
        if config.context_dim:
            assert_same_output(ours(z, t, context, vector), theirs(z, t, context, class_labels=vector).sample)
        else:
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


@pytest.mark.parametrize("changes", [{"transformer_depth": 2}, TEXT_TO_IMAGE], ids=["deep", "text_to_image"])
def test_keys_and_values_stand_for_their_context(randomise: Any, changes: dict[str, Any]):
    unet = randomise(toy(**changes).build(), 9)
    z, t, context = inputs(side=16)
    keys_values = unet.keys_values(context)
    assert torch.equal(unet(z, t, keys_values_BF=keys_values), unet(z, t, context))
    assert not torch.equal(unet(z, t, keys_values_BF=keys_values.roll(1, dims=0)), unet(z, t, context))
    with pytest.raises(ValueError, match=r"7 keys and values a sample; this U-Net takes \d+ a token"):
        unet(z, t, keys_values_BF=keys_values[:, :7])
    with pytest.raises(ValueError, match="no context beside them"):
        unet(z, t, context, keys_values_BF=keys_values)


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
        (
            {"activation_checkpointing": ["resnet", "conv"]},
            r"^unet\.activation_checkpointing=\['resnet', 'conv'\]; choose, each once, .* resnet, attention",
        ),
        ({"activation_checkpointing": ["resnet", "resnet"]}, r"^unet\.activation_checkpointing=.*each once"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        toy(**changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 7, "vector_dim": 12},
        PLAIN | {"scale_shift_norm": True, "residual_resampling": True},
        {"activation_checkpointing": ["resnet", "attention"]},
    ],
    ids=["context_and_vector", "plain_residual", "recomputed"],
)
def test_compiles_without_graph_breaks(randomise: Any, changes: dict[str, Any]):
    config = toy(**changes)
    unet: nn.Module = randomise(config.build(), 11)
    z, t, context = inputs(channels=config.in_channels)
    given = (z, t, context if config.context_dim else None, torch.randn(3, 12) if config.vector_dim else None)
    expected = unet(*given)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    out = compiled(*given)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.square().mean().backward()
    assert all(p.grad is not None for p in unet.parameters())
    if config.context_dim:
        told = unet.keys_values(context)
        torch.testing.assert_close(compiled(z, t, None, given[3], keys_values_BF=told), expected, rtol=1e-4, atol=1e-5)

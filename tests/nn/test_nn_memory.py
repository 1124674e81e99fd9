"""What training keeps in memory: the layout and type of activations, and what recomputing blocks saves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ldm_scale.nn.attention import Attention, AttentionBlock
from ldm_scale.nn.autoencoder import Decoder, Encoder
from ldm_scale.nn.unet import UNet, UNetConfig

KINDS = ["resnet", "attention"]


def unet(**changes: Any) -> UNet:
    fields = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "attention_factors": [2],
        "num_heads": 2,
        "context_dim": 12,
        "norm_groups": 8,
    }
    return UNetConfig(**(fields | changes)).build()


def unet_inputs(context_dim: int = 12) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    z, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700])
    return (z, t, torch.randn(2, 5, context_dim, generator=generator)) if context_dim else (z, t)


PLAIN: dict[str, Any] = {"context_dim": 0, "residual_resampling": True, "scale_shift_norm": True}
AUTOENCODER: dict[str, Any] = {"widths": [8, 16], "num_res_blocks": 1, "attention_factors": [2], "groups": 4}
NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "unet_with_context": lambda: (unet(), unet_inputs()),
    "unet_plain_residual": lambda: (unet(**PLAIN), unet_inputs(0)),
    "encoder": lambda: (Encoder(3, 6, **AUTOENCODER), (torch.randn(2, 3, 8, 8),)),
    "decoder": lambda: (Decoder(3, 3, **AUTOENCODER), (torch.randn(2, 3, 4, 4),)),
}


@pytest.fixture
def gpu_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that answer as on a GPU under autocast: in float32, and group norm in NCHW."""
    group_norm, layer_norm = nn.functional.group_norm, nn.functional.layer_norm
    monkeypatch.setattr(nn.functional, "group_norm", lambda *args: group_norm(*args).float().contiguous())
    monkeypatch.setattr(nn.functional, "layer_norm", lambda *args: layer_norm(*args).float())


@pytest.mark.usefixtures("gpu_norms")
@pytest.mark.parametrize("name", NETWORKS)
def test_activations_stay_channels_last_and_in_the_type_of_autocast(name: str):
    network, given = NETWORKS[name]()
    seen: list[tuple[str, Tensor]] = []

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.extend((f"{path} gave", x) for x in (output if isinstance(output, list) else [output]))
            seen.extend((f"{path} was given", x) for x in args if isinstance(x, Tensor) and x.ndim == 4)
            if isinstance(module, nn.Linear):  # images become tokens without a copy
                assert args[0].is_contiguous(), path

        return note

    for path, module in network.named_modules():
        if path:  # what the caller gives to the whole may be NCHW, and float32
            module.register_forward_hook(hook(path))
    assert not given[0].is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(*given)
    images = [(where, x) for where, x in seen if x.ndim == 4 and not where.startswith("conv_in was")]
    assert len(images) > 30
    assert [where for where, x in images if not x.is_contiguous(memory_format=torch.channels_last)] == []
    assert [where for where, x in seen if x.dtype != torch.bfloat16 and not where.startswith("conv_in was")] == []


@pytest.mark.parametrize("kind", [Attention, AttentionBlock])
def test_attention_weights_are_never_a_tensor(kind: type[nn.Module]):
    """Nothing kept for the backward pass grows with the square of the tokens."""
    tokens, width = 256, 8
    if kind is Attention:
        module: nn.Module = Attention(width, context_dim=width, heads=1, bias=False)
        given: tuple[Tensor, ...] = (torch.randn(1, tokens, width), torch.randn(1, tokens, width))
    else:
        module = AttentionBlock(width, heads=1, groups=4, eps=1e-5, zero_init=False)
        given = (torch.randn(1, width, 16, 16),)
    sizes: list[int] = []
    with saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        module(*given)
    assert 0 < max(sizes) <= tokens * width


def train(network: UNet, given: tuple[Tensor, ...], autocast: bool) -> list[Tensor]:
    """Gradients of one step with dropout, always the same draw."""
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = network(*given)
    out.float().square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(network.parameters()))
    return gradients


def recomputing_pair(randomise: Any, kinds: list[str], **changes: Any) -> tuple[UNet, UNet]:
    """The same weights, once kept and once recomputed."""
    kept, recomputed = unet(dropout=0.3, **changes), unet(dropout=0.3, activation_checkpointing=kinds, **changes)
    randomise(kept, 2)
    recomputed.load_state_dict(kept.state_dict())
    kept.train()
    return kept, recomputed


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kinds", [["resnet"], ["attention"], KINDS], ids="+".join)
@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["context", "plain_residual"])
def test_recomputing_leaves_gradients_bit_for_bit(
    randomise: Any, changes: dict[str, Any], kinds: list[str], autocast: bool
):
    kept, recomputed = recomputing_pair(randomise, kinds, **changes)
    given = unet_inputs(changes.get("context_dim", 12))
    pairs = zip(train(kept, given, autocast), train(recomputed, given, autocast), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_gradients_depend_on_the_dropout_that_recomputing_repeats(randomise: Any):
    """Otherwise the test above could not fail where dropout draws anew."""
    kept, again = recomputing_pair(randomise, [])
    first = train(kept, unet_inputs(), autocast=False)
    again.eval()
    assert not torch.equal(first[0], train(again, unet_inputs(), autocast=False)[0])


def test_recomputed_forward_stays_in_the_type_of_autocast(randomise: Any):
    _, network = recomputing_pair(randomise, KINDS)
    types: list[torch.dtype] = []
    blocks = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    train(network, unet_inputs(), autocast=True)
    assert len(types) > 1.5 * len(blocks)  # the backward pass runs them again, up to the last tensor that it needs
    assert set(types) == {torch.bfloat16}


def kept_bytes(network: UNet, given: tuple[Tensor, ...]) -> int:
    """What the forward pass leaves in memory for the backward pass, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = network(*given)
    assert out.requires_grad
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights)


def test_recomputing_keeps_less():
    given = unet_inputs()
    everything = kept_bytes(unet(), given)
    for kind in KINDS:
        assert kept_bytes(unet(activation_checkpointing=[kind]), given) < 0.9 * everything, kind
    assert kept_bytes(unet(activation_checkpointing=KINDS), given) < 0.4 * everything

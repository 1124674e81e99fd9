"""Attention and the blocks made of it (Rombach et al. 2022, section 3.3 and appendix E.2.1).

Parameter names are those of diffusers: `to_q`, `to_out.0`, `ff.net.0.proj`, `transformer_blocks.0.attn2` ... Every
parameter is used inside the forward of the module that owns it, which ZeRO-3 relies on.
Knows no schedule, text, file or rank.

Shape letters: B batch, C channels, H W height and width, L query tokens, M key tokens, D context width, N heads,
K width of a head, E = N * K inner width.
"""

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from ldm_scale.nn.blocks import GroupNorm, LayerNorm, Pointwise, zero_parameters

TRANSFORMER_NORM_EPS = 1e-6  # the group norm before a spatial transformer; facts.md 5.2

KeysValues = tuple[Tensor, Tensor]
"""What one attention makes of the tokens it attends to, (B, M, E) each."""

Context = Tensor | Mapping[nn.Module, KeysValues]
"""Tokens to attend to, (B, M, D), or what each attention made of them before."""


def attend(q_BLE: Tensor, k_BME: Tensor, v_BME: Tensor, heads: int) -> Tensor:
    """Multi-head attention without mask, scale K^(-1/2); (B, L, E) -> (B, L, E)."""
    q_BNLK, k_BNMK, v_BNMK = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BLE, k_BME, v_BME))
    return functional.scaled_dot_product_attention(q_BNLK, k_BNMK, v_BNMK).transpose(1, 2).flatten(2)


def to_tokens(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C); a view, contiguous where the image is channels_last."""
    return x_BCHW.flatten(2).transpose(1, 2)


def to_image(x_BLC: Tensor, like: Tensor) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) with the height and width of `like`; a view, channels_last in memory."""
    return x_BLC.transpose(1, 2).unflatten(2, like.shape[-2:])


class Attention(nn.Module):
    """Projected multi-head attention of `width` channels to itself or to a context.

    context_dim  width D of the tokens attended to; `width` for self-attention
    bias         on q, k and v; the output projection always has one
    """

    def __init__(self, width: int, *, context_dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_dim, width, bias=bias)
        self.to_v = nn.Linear(context_dim, width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def keys_values(self, context_BMD: Tensor) -> KeysValues:
        return self.to_k(context_BMD), self.to_v(context_BMD)

    def forward(self, x_BLC: Tensor, context: Context) -> Tensor:
        k_BME, v_BME = self.keys_values(context) if isinstance(context, Tensor) else context[self]
        out: Tensor = self.to_out(attend(self.to_q(x_BLC), k_BME, v_BME, self.heads))
        return out


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, with group norm before and a residual around.

    The attention of first stages (one head, eps 1e-6) and of U-Nets without context (eps 1e-5, zero-initialised).
    """

    def __init__(self, channels: int, *, heads: int, groups: int, eps: float, zero_init: bool) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        if zero_init:
            zero_parameters(self.to_out)

    def forward(self, x_BCHW: Tensor, context_BMD: None = None) -> Tensor:
        """`context_BMD` is always None: a U-Net without context calls its blocks like one with."""
        h_BLC = to_tokens(self.group_norm(x_BCHW))
        h_BLC = self.to_out(attend(self.to_q(h_BLC), self.to_k(h_BLC), self.to_v(h_BLC), self.heads))
        return x_BCHW + to_image(h_BLC, like=x_BCHW)


class GEGLU(nn.Module):
    """Shazeer 2020: value * gelu(gate). The first half of the projection is the value; exact (erf) GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x_BLC: Tensor) -> Tensor:
        value, gate = self.proj(x_BLC).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Named 0 and 2 as in the reference, which keeps a dropout of zero between them.
        self.net = nn.Sequential(OrderedDict({"0": GEGLU(width, 4 * width), "2": nn.Linear(4 * width, width)}))

    def forward(self, x_BLC: Tensor) -> Tensor:
        out: Tensor = self.net(x_BLC)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each after a layer norm and with a residual."""

    def __init__(self, width: int, *, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, context_dim=width, heads=heads, bias=False)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, context_dim=context_dim, heads=heads, bias=False)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x_BLC: Tensor, context: Context) -> Tensor:
        h_BLC = self.norm1(x_BLC)
        x_BLC = x_BLC + self.attn1(h_BLC, h_BLC)
        x_BLC = x_BLC + self.attn2(self.norm2(x_BLC), context)
        return x_BLC + self.ff(self.norm3(x_BLC))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, conditioned on a context; starts as the identity."""

    def __init__(self, channels: int, *, depth: int, context_dim: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = Pointwise(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim=context_dim, heads=heads) for _ in range(depth)
        )
        self.proj_out = Pointwise(channels, channels)
        zero_parameters(self.proj_out)

    def forward(self, x_BCHW: Tensor, context: Context) -> Tensor:
        h_BLC = to_tokens(self.proj_in(self.norm(x_BCHW)))
        for block in self.transformer_blocks:
            h_BLC = block(h_BLC, context)
        out: Tensor = x_BCHW + self.proj_out(to_image(h_BLC, like=x_BCHW))
        return out

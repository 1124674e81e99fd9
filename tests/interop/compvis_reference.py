"""The original networks once more, written for these tests from facts.md 5.2 and 6.1: slow, plain, and with its names.

An oracle: nothing here is imported from ldm_scale. `instantiate` builds what a configuration file describes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Config = dict[str, Any]


def instantiate(config: Config) -> nn.Module:
    """The module of a `model:` section, with fresh weights; its state dict is a checkpoint's."""
    return TARGETS[config["target"].rsplit(".", 1)[1]](**config.get("params", {}))


# U-Net ----------------------------------------------------------------------------------------------------------------


class Sequence(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class ResBlock(nn.Module):
    def __init__(
        self, inner: int, out: int, emb: int, scale_shift: bool, resample: Callable[[Tensor], Tensor] | None = None
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inner), nn.SiLU(), nn.Conv2d(inner, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inner == out else nn.Conv2d(inner, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        told = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            width = h.shape[1]
            h = self.out_layers[0](h) * (1 + told[:, :width]) + told[:, width:]
            for layer in self.out_layers[1:]:
                h = layer(h)
        else:
            h = self.out_layers(h + told)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, heads: int, new_order: bool):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        ch = c // self.heads
        qkv = self.qkv(self.norm(x).reshape(b, c, -1))
        if self.new_order:
            q, k, v = (part.reshape(b * self.heads, ch, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(b * self.heads, 3 * ch, -1).split(ch, dim=1)
        scale = ch**-0.25
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        mixed = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
        return x + self.proj_out(mixed).reshape(b, c, *size)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out(explicit_attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    b, length, width = q.shape
    q, k, v = (x.reshape(b, -1, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    weight = torch.softmax(q @ k.transpose(-1, -2) * (width // heads) ** -0.5, dim=-1)
    return (weight @ v).transpose(1, 2).reshape(b, length, width)


class GEGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width), nn.Dropout(0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int, depth: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, context, heads) for _ in range(depth))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(h.shape))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(twice(x))


def twice(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


def half(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 2)


class UNetModel(nn.Module):
    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        attention_resolutions: list[int],
        num_res_blocks: int,
        channel_mult: list[int],
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        **_: Any,
    ):
        super().__init__()
        self.width = model_channels
        emb = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        def attention(width: int) -> nn.Module:
            heads = num_heads if num_head_channels == -1 else width // num_head_channels
            if use_spatial_transformer:
                assert context_dim is not None
                return SpatialTransformer(width, context_dim, heads, transformer_depth)
            return AttentionBlock(width, heads, use_new_attention_order)

        def block(inner: int, out: int, resample: Callable[[Tensor], Tensor] | None = None) -> ResBlock:
            return ResBlock(inner, out, emb, use_scale_shift_norm, resample)

        width, factor, skips = model_channels, 1, [model_channels]
        self.input_blocks = nn.ModuleList([Sequence(nn.Conv2d(in_channels, width, 3, padding=1))])
        for level, multiple in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [block(width, multiple * model_channels)]
                width = multiple * model_channels
                layers += [attention(width)] * (factor in attention_resolutions)
                self.input_blocks.append(Sequence(*layers))
                skips.append(width)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(Sequence(block(width, width, half) if resblock_updown else Downsample(width)))
                skips.append(width)
                factor *= 2
        self.middle_block = Sequence(block(width, width), attention(width), block(width, width))
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                layers = [block(width + skips.pop(), multiple * model_channels)]
                width = multiple * model_channels
                layers += [attention(width)] * (factor in attention_resolutions)
                if level and index == num_res_blocks:
                    layers.append(block(width, width, twice) if resblock_updown else Upsample(width))
                    factor //= 2
                self.output_blocks.append(Sequence(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(model_channels, out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        half_width = self.width // 2
        frequencies = 10000.0 ** (-torch.arange(half_width) / half_width)
        angles = t[:, None].float() * frequencies
        emb = self.time_embed(torch.cat((angles.cos(), angles.sin()), dim=1))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat((x, skips.pop()), dim=1), emb, context)
        return self.out(x)


# First stages ---------------------------------------------------------------------------------------------------------


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class ResnetBlock(nn.Module):
    def __init__(self, inner: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = norm(inner), nn.Conv2d(inner, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if inner != out:
            self.nin_shortcut = nn.Conv2d(inner, out, 1)
        self.changes = inner != out

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return (self.nin_shortcut(x) if self.changes else x) + h


class AttnBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = explicit_attention(q, k, v, heads=1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class Rightwards(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """`block`, `attn` and one resampler, under the name that its side of the autoencoder has for it."""

    def __init__(self, inner: int, width: int, blocks: int, attention: bool):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(width if i else inner, width) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(width) for _ in range(blocks * attention))

    def forward(self, h: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[index](h)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                h = self.get_submodule(name)(h)
        return h


class Middle(nn.Module):
    def __init__(self, width: int, attention: bool):
        super().__init__()
        self.block_1 = ResnetBlock(width, width)
        self.attn_1 = AttnBlock(width) if attention else nn.Identity()
        self.block_2 = ResnetBlock(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        widths = [c["ch"] * multiple for multiple in c["ch_mult"]]
        self.conv_in = nn.Conv2d(c["in_channels"], c["ch"], 3, padding=1)
        self.down = nn.ModuleList()
        for level, (inner, width) in enumerate(zip([c["ch"], *widths], widths, strict=False)):
            attention = c["resolution"] // 2**level in c["attn_resolutions"]
            self.down.append(Level(inner, width, c["num_res_blocks"], attention))
            if level < len(widths) - 1:
                self.down[-1].add_module("downsample", Rightwards(width))
        self.mid = Middle(widths[-1], c.get("attn_type") != "none")
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], c["z_channels"] * (2 if c["double_z"] else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(swish(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        widths = [c["ch"] * multiple for multiple in c["ch_mult"]]
        self.conv_in = nn.Conv2d(c["z_channels"], widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], c.get("attn_type") != "none")
        levels = []
        for level, (inner, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            attention = c["resolution"] // 2**level in c["attn_resolutions"]
            levels.append(Level(inner, width, c["num_res_blocks"] + 1, attention))
            if level:
                levels[-1].add_module("upsample", Upsample(width))
        self.up = nn.ModuleList(levels)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], c["out_ch"], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(swish(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    def __init__(self, *, ddconfig: Config, embed_dim: int, **_: Any):
        super().__init__()
        self.encoder, self.decoder = Encoder(ddconfig), Decoder(ddconfig)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class VQModel(nn.Module):
    def __init__(self, *, ddconfig: Config, embed_dim: int, n_embed: int, **_: Any):
        super().__init__()
        self.encoder, self.decoder = Encoder(ddconfig), Decoder(ddconfig)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(n_embed, embed_dim)})
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, x: Tensor) -> tuple[Tensor, None]:
        return self.quant_conv(self.encoder(x)), None

    def decode(self, z: Tensor) -> Tensor:
        codebook = self.quantize["embedding"].weight
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        nearest = codebook[(flat[:, None] - codebook[None]).square().sum(-1).argmin(1)]
        b, c, h, w = z.shape
        return self.decoder(self.post_quant_conv(nearest.reshape(b, h, w, c).permute(0, 3, 1, 2)))


class IdentityFirstStage(nn.Module):
    def __init__(self, **_: Any):
        super().__init__()

    def encode(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def decode(self, z: Tensor) -> Tensor:
        return z


# Conditioners ---------------------------------------------------------------------------------------------------------


class TextAttention(nn.Module):
    def __init__(self, width: int, heads: int = 8, head_dim: int = 64):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(explicit_attention(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class TextFeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()), nn.Dropout(0), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BERTEmbedder(nn.Module):
    def __init__(self, *, n_embed: int, n_layer: int, vocab_size: int = 30522, max_seq_len: int = 77, **_: Any):
        super().__init__()
        transformer = nn.Module()
        transformer.token_emb = nn.Embedding(vocab_size, n_embed)
        transformer.pos_emb = nn.ModuleDict({"emb": nn.Embedding(max_seq_len, n_embed)})
        pairs = [
            nn.ModuleList([nn.LayerNorm(n_embed), block(n_embed)])
            for _ in range(n_layer)
            for block in (TextAttention, TextFeedForward)
        ]
        transformer.attn_layers = nn.ModuleDict({"layers": nn.ModuleList(pairs)})
        transformer.norm = nn.LayerNorm(n_embed)
        transformer.to_logits = nn.Linear(n_embed, vocab_size)
        self.transformer = transformer

    def forward(self, ids: Tensor) -> Tensor:
        net = self.transformer
        x = net.token_emb(ids) + net.pos_emb["emb"].weight[: ids.shape[1]]
        for layer in net.attn_layers["layers"]:
            x = x + layer[1](layer[0](x))
        return net.norm(x)


class ClassEmbedder(nn.Module):
    def __init__(self, *, embed_dim: int, n_classes: int = 1000, key: str = "class"):
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)[:, None]


class SpatialRescaler(nn.Module):
    def __init__(self, *, n_stages: int, in_channels: int, out_channels: int):
        super().__init__()
        self.n_stages, self.classes = n_stages, in_channels
        self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, labels: Tensor) -> Tensor:
        x = functional.one_hot(labels, self.classes).permute(0, 3, 1, 2).float()
        for _ in range(self.n_stages):
            x = functional.interpolate(x, scale_factor=0.5, mode="bilinear")
        return self.channel_mapper(x)


class Renamed(nn.Module):
    """transformers' text encoder under the names it had when the checkpoints were written."""

    def __init__(self, version: str):
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        model = CLIPTextModel(CLIPTextConfig.from_pretrained(version))
        self.text_model = model.text_model if "text_model" in model._modules else model
        self.text_model.embeddings.register_buffer("position_ids", self.text_model.embeddings.position_ids)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(input_ids=ids).last_hidden_state


class FrozenCLIPEmbedder(nn.Module):
    def __init__(self, *, version: str, **_: Any):
        super().__init__()
        self.transformer = Renamed(version)

    def forward(self, ids: Tensor) -> Tensor:
        return self.transformer(ids)


# The whole ------------------------------------------------------------------------------------------------------------


class LatentDiffusion(nn.Module):
    def __init__(
        self,
        *,
        unet_config: Config,
        first_stage_config: Config,
        cond_stage_config: Config | str,
        linear_start: float,
        linear_end: float,
        scale_by_std: bool = False,
        **_: Any,
    ):
        super().__init__()
        betas = torch.linspace(linear_start**0.5, linear_end**0.5, 1000, dtype=torch.float64, device="cpu") ** 2
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0).float())
        self.register_buffer("posterior_mean_coef1", betas.float())
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(0.625, device="cpu"))
        self.model = nn.ModuleDict({"diffusion_model": instantiate(unet_config)})
        self.first_stage_model = instantiate(first_stage_config)
        if cond_stage_config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
        elif isinstance(cond_stage_config, dict):
            self.cond_stage_model = instantiate(cond_stage_config)

    @property
    def unet(self) -> UNetModel:
        return self.model["diffusion_model"]


class Identity(nn.Identity):
    pass


TARGETS: dict[str, Callable[..., nn.Module]] = {
    "LatentDiffusion": LatentDiffusion,
    "UNetModel": UNetModel,
    "AutoencoderKL": AutoencoderKL,
    "VQModel": VQModel,
    "VQModelInterface": VQModel,
    "IdentityFirstStage": IdentityFirstStage,
    "BERTEmbedder": BERTEmbedder,
    "ClassEmbedder": ClassEmbedder,
    "SpatialRescaler": SpatialRescaler,
    "FrozenCLIPEmbedder": FrozenCLIPEmbedder,
    "Identity": Identity,
}

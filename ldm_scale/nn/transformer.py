"""Text transformer, trained from scratch with the U-Net (Rombach et al. 2022, section 4.3 and appendix E.2.1).

Token ids in, token features out. Knows nothing of tokenizers, captions, files or ranks. Parameter names are those of
diffusers' LDMBertModel (`model.layers.0.self_attn.q_proj ...`) without its `to_logits`, which nothing trains or reads.

Shape letters: B batch, L tokens, D width, E inner width of attention (heads x head_dim).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm_scale.nn.attention import attend


class TextTransformer(nn.Module):
    """Bidirectional pre-norm transformer with learned positions, no mask: padding is attended to, as in the reference.

    width          D of the features, and of the context that a U-Net reads
    head_dim       of one attention head; heads x head_dim need not be the width (reference: 8 x 64 for 1280)
    max_length     tokens that there are position embeddings for
    embedding_std  of token and position embeddings at the start
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_length: int,
        width: int,
        layers: int,
        heads: int,
        head_dim: int,
        embedding_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.model = TextEncoder(vocab_size, max_length, width, layers, heads, head_dim)
        for embeddings in (self.model.embed_tokens, self.model.embed_positions):
            nn.init.normal_(embeddings.weight, std=embedding_std)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Token ids, integers below vocab_size, at most max_length of them -> (B, L, D)."""
        out_BLD: Tensor = self.model(ids_BL)
        return out_BLD


class TextEncoder(nn.Module):
    """Embeddings, layers, final layer norm."""

    def __init__(self, vocab_size: int, max_length: int, width: int, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.embed_positions = nn.Embedding(max_length, width)
        self.layers = nn.ModuleList(TextLayer(width, heads, head_dim) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, ids_BL: Tensor) -> Tensor:
        positions_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        h_BLD = self.embed_tokens(ids_BL) + self.embed_positions(positions_L)
        for layer in self.layers:
            h_BLD = layer(h_BLD)
        out_BLD: Tensor = self.layer_norm(h_BLD)
        return out_BLD


class TextLayer(nn.Module):
    """Self-attention and a feed-forward of four times the width, each after a layer norm and with a residual."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = TextAttention(width, heads, head_dim)
        self.final_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, h_BLD: Tensor) -> Tensor:
        h_BLD = h_BLD + self.self_attn(self.self_attn_layer_norm(h_BLD))
        return h_BLD + self.fc2(functional.gelu(self.fc1(self.final_layer_norm(h_BLD))))


class TextAttention(nn.Module):
    """Multi-head self-attention; no bias on q, k and v."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, h_BLD: Tensor) -> Tensor:
        mixed_BLE = attend(self.q_proj(h_BLD), self.k_proj(h_BLD), self.v_proj(h_BLD), self.heads)
        out_BLD: Tensor = self.out_proj(mixed_BLE)
        return out_BLD

"""Captions as context: a BERT tokenizer and a transformer trained with the U-Net (Rombach et al. 2022, section 4.3).

Knows nothing of the diffusion process, files of captions or ranks.

Shape letters: B batch, L tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_scale.conditioning.base import Conditioner, ConditionerConfig, Conditions, require_captions
from ldm_scale.conditioning.tokenizer import CaptionTokenizer, load_tokenizer
from ldm_scale.nn.transformer import TextTransformer


@dataclass(kw_only=True, slots=True)
class TextTransformerConfig(ConditionerConfig):
    """Shape of the text transformer; the defaults are the 1.45B model's (Rombach et al. 2022, table 17)."""

    width: int = 1280
    """Width D of the tokens; the U-Net's context_dim."""
    layers: int = 32
    """Transformer layers."""
    heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Channels of one head; heads x head_dim need not be the width."""
    max_length: int = 77
    """Tokens L of every caption, [CLS] and [SEP] included: longer captions are cut, shorter ones padded."""
    vocab_size: int = 30522
    """Token ids there are embeddings for; must be the tokenizer's."""
    embedding_std: float = 0.02
    """Standard deviation of token and position embeddings at the start of training."""
    tokenizer: str = "bert-base-uncased"
    """A tokenizer.json, a directory that holds one (or BERT's vocab.txt), or a name on the Hugging Face hub."""

    def __post_init__(self) -> None:
        ConditionerConfig.__post_init__(self)
        for name, value, least in (
            ("width", self.width, 1),
            ("layers", self.layers, 1),
            ("heads", self.heads, 1),
            ("head_dim", self.head_dim, 1),
            ("max_length", self.max_length, 3),
            ("vocab_size", self.vocab_size, 5),
        ):
            if value < least:
                raise ValueError(f"conditioning.{name}={value}; must be at least {least}")
        if not self.embedding_std > 0:
            raise ValueError(f"conditioning.embedding_std={self.embedding_std}; must be above 0")
        if not self.tokenizer:
            raise ValueError("conditioning.tokenizer is empty; give a tokenizer.json, a directory or a hub name")

    def build(self) -> "TextConditioner":
        """Needs no tokenizer; `prepare` or `load_tokenizer` reads it."""
        return TextConditioner(self)


class TextConditioner(Conditioner):
    """Captions to context tokens. The empty condition is the empty caption."""

    config: TextTransformerConfig
    part = "text"

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.context_dim = config.width
        self.transformer = TextTransformer(
            vocab_size=config.vocab_size,
            max_length=config.max_length,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            head_dim=config.head_dim,
            embedding_std=config.embedding_std,
        )
        self._tokenizer: CaptionTokenizer | None = None
        self._counts = self._told = (0, 0)  # cut captions, and all: as counted by one thread, and told to another

    def load_tokenizer(self) -> CaptionTokenizer:
        """Read the tokenizer now, so that a mistake shows before training; later calls return the same one.

        raises  FileNotFoundError where it is not found; ValueError where its vocabulary is not the configured one
        """
        if self._tokenizer is None:  # two threads may both load it: the same thing twice
            tokenizer = load_tokenizer(self.config.tokenizer, self.config.max_length)
            if tokenizer.vocab_size != self.config.vocab_size:
                raise ValueError(
                    f"conditioning.vocab_size={self.config.vocab_size}, but conditioning.tokenizer="
                    f"{self.config.tokenizer!r} has {tokenizer.vocab_size} tokens; set vocab_size to that, or name the "
                    "tokenizer these weights were trained with"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def prepare(self, conditions: Sequence[Any]) -> Tensor:
        """Captions to (B, max_length) int64 token ids."""
        return self.load_tokenizer()(require_captions(conditions))

    def null_inputs(self, batch: int) -> Tensor:
        """The ids of the empty caption, (batch, max_length)."""
        return self.prepare([""]).expand(batch, -1)

    def read(self, conditions: list[str]) -> Tensor:
        ids_BL, cut = self.load_tokenizer().encode(require_captions(conditions))
        self._counts = (self._counts[0] + cut, self._counts[1] + len(conditions))
        return ids_BL

    def cut(self) -> tuple[int, int]:
        before, self._told = self._told, self._counts
        return self._told[0] - before[0], self._told[1] - before[1]

    def lengths(self, inputs: Tensor) -> dict[str, Tensor]:
        """`tokens`, first and last included, and whether there are no others (`empty`)."""
        tokens_B = (inputs != self.load_tokenizer().pad_id).sum(1)
        return {"tokens": tokens_B, "empty": tokens_B == 2}

    def in_words(self, inputs: Tensor, conditions: list[str]) -> list[str]:
        """The captions that the token ids spell, lower-cased and cut as the model reads them."""
        return self.load_tokenizer().decode(inputs)

    def forward(self, inputs: Tensor) -> Conditions:
        """(B, L) token ids -> context (B, L, D)."""
        return Conditions(context=self.transformer(inputs))

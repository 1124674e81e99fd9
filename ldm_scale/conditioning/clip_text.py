"""Captions as context: CLIP's text encoder, frozen, as in Stable Diffusion v1 (Radford et al. 2021).

The network is that of the transformers library. A training does not run it, but reads what it made of each caption from
a cache; `CachedTextConditioner` stands in for it there. Knows nothing of the diffusion process, files of captions or
ranks.

Shape letters: B batch, L tokens, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditioner, ConditionerConfig, Conditions, require_captions
from ldm_scale.conditioning.tokenizer import CaptionTokenizer, load_clip_tokenizer
from ldm_scale.core import weights

_REMEDY = (
    "`make fetch-weights` on a machine with internet fetches openai/clip-vit-large-patch14; then set "
    "conditioning.model to its directory"
)


_AT_ONCE = 64  # captions encoded together


@dataclass(kw_only=True, slots=True)
class ClipTextConfig(ConditionerConfig):
    """Shape of the text encoder, and where its weights are; the defaults are ViT-L/14's."""

    model: str = "openai/clip-vit-large-patch14"
    """A directory as transformers saves it, or a name on the Hugging Face hub: tokenizer and pretrained weights."""
    max_length: int = 77
    """Tokens L of every caption, first and last included: longer captions are cut, shorter ones padded."""
    width: int = 768
    """Width D of the tokens; the U-Net's context_dim."""
    layers: int = 12
    """Transformer layers."""
    heads: int = 12
    """Attention heads; must divide the width."""
    vocab_size: int = 49408
    """Token ids there are embeddings for; must be the tokenizer's."""

    def __post_init__(self) -> None:
        ConditionerConfig.__post_init__(self)
        if not self.model:
            raise ValueError("conditioning.model is empty; give a directory or a hub name")
        for name, value, least in (
            ("max_length", self.max_length, 3),
            ("width", self.width, 1),
            ("layers", self.layers, 1),
            ("heads", self.heads, 1),
            ("vocab_size", self.vocab_size, 3),
        ):
            if value < least:
                raise ValueError(f"conditioning.{name}={value}; must be at least {least}")
        if self.width % self.heads:
            raise ValueError(f"conditioning.heads={self.heads}; must divide conditioning.width={self.width}")

    def build(self) -> "ClipTextConditioner":
        """Fresh weights, and no files needed; `load_pretrained` reads the real ones."""
        return ClipTextConditioner(self)

    def build_trained(self) -> "CachedTextConditioner":
        """What takes its output from a cache; has no weights."""
        return CachedTextConditioner(self)


class ClipTextConditioner(Conditioner):
    """Captions to the last hidden state of CLIP's text encoder. The empty condition is the empty caption.

    Its parameters take no gradient, and it never trains: `train()` leaves it in evaluation mode.
    """

    config: ClipTextConfig

    def __init__(self, config: ClipTextConfig) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel  # seconds to import, and most runs do without

        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.context_dim = config.width
        self.transformer = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.max_length,
                bos_token_id=config.vocab_size - 2,
                eos_token_id=config.vocab_size - 1,
            )
        )
        self.transformer.requires_grad_(False)
        self.transformer.eval()
        self._tokenizer: CaptionTokenizer | None = None

    def train(self, mode: bool = True) -> "ClipTextConditioner":
        """Changes nothing: the encoder stays as it was trained, without dropout."""
        return super().train(False)

    def load_pretrained(self) -> None:
        """Read the weights that `config.model` names.

        raises  FileNotFoundError where they are not found, ValueError where they are of another shape
        """
        from transformers import CLIPTextModel

        try:
            loaded: Any = CLIPTextModel.from_pretrained(self.config.model, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise self._not_found("weights") from error
        theirs, found = loaded
        if found["missing_keys"]:  # which transformers would fill with random numbers
            raise ValueError(
                f"conditioning.model={self.config.model} holds another network than CLIP's text encoder: it lacks "
                f"{len(found['missing_keys'])} tensors, {', '.join(sorted(found['missing_keys'])[:3])} ..."
            )
        weights.load_exactly(self.transformer, theirs.state_dict(), f"conditioning.model={self.config.model}")

    def load_tokenizer(self) -> CaptionTokenizer:
        """Read the tokenizer now, so that a mistake shows before training; later calls return the same one.

        raises  FileNotFoundError where it is not found; ValueError where its vocabulary is not the configured one
        """
        if self._tokenizer is None:  # two threads may both load it: the same thing twice
            try:
                tokenizer = load_clip_tokenizer(self.config.model, self.config.max_length)
            except (OSError, ValueError) as error:
                raise self._not_found("tokenizer") from error
            if tokenizer.vocab_size != self.config.vocab_size:
                raise ValueError(
                    f"conditioning.vocab_size={self.config.vocab_size}, but the tokenizer in conditioning.model="
                    f"{self.config.model!r} has {tokenizer.vocab_size} tokens: it is not CLIP's, or not all there; "
                    f"{_REMEDY}"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def prepare(self, conditions: Sequence[Any]) -> Tensor:
        """Captions to (B, max_length) int64 token ids."""
        return self.load_tokenizer()(require_captions(conditions))

    def null_inputs(self, batch: int) -> Tensor:
        """The ids of the empty caption, (batch, max_length)."""
        return self.prepare([""]).expand(batch, -1)

    def forward(self, inputs: Tensor) -> Conditions:
        """(B, L) token ids -> context (B, L, D)."""
        return Conditions(context=self.transformer(input_ids=inputs).last_hidden_state)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """The context of captions, (B, L, D) float32, on the device of the weights."""
        ids_BL = self.prepare(captions).to(self.transformer.device)
        parts = [self.transformer(input_ids=part_BL) for part_BL in ids_BL.split(_AT_ONCE)]
        return torch.cat([part.last_hidden_state for part in parts])

    def digest(self) -> str:
        """sha256 of the weights, as of a first stage's."""
        return weights.digest(self.state_dict())

    def _not_found(self, what: str) -> FileNotFoundError:
        return FileNotFoundError(
            f"no {what} of CLIP: conditioning.model={self.config.model!r} is no directory that holds it, and the "
            f"Hugging Face hub did not give it; {_REMEDY}"
        )


class CachedTextConditioner(Conditioner):
    """Stands in for the encoder in a training: its inputs are the context that a cache holds. It has no weights.

    For captions that are in no cache, as those of grids and scores, `prepare` runs the encoder that `use` was given. It
    stays outside: no engine wraps it, no checkpoint holds it.
    """

    config: ClipTextConfig
    null_1LD: Tensor

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.context_dim = config.width
        self.register_buffer("null_1LD", torch.zeros(1, config.max_length, config.width), persistent=False)
        self._encode: Callable[[Sequence[str]], Tensor] | None = None

    def use(self, encoder: ClipTextConditioner) -> None:
        """Take the context of the empty caption from `encoder`, and later that of captions to draw."""
        self._encode = encoder.encode
        self.null_1LD.copy_(encoder.encode([""]))

    def prepare(self, conditions: Sequence[Any]) -> Tensor:
        """Captions to context (B, L, D), rounded to float16 as a cache would hold it. Not for the loader's thread."""
        assert self._encode is not None, "given by `use` to whoever draws"
        return self._encode(require_captions(conditions)).half().cpu()

    def null_inputs(self, batch: int) -> Tensor:
        """The context of the empty caption, (batch, L, D), on the module's device."""
        return self.null_1LD.expand(batch, -1, -1)

    def forward(self, inputs: Tensor) -> Conditions:
        """Context (B, L, D) of any floating type -> the same in float32."""
        return Conditions(context=inputs.float())

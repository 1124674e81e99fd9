"""Captions to token ids: WordPiece as BERT uses it (Devlin et al. 2019), lower-cased, padded to one length.

`train_wordpiece` makes a small tokenizer for toy worlds; the paper's models use `bert-base-uncased`, Stable Diffusion
v1 the byte pairs of CLIP. Knows nothing of networks.
"""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from ldm_scale.core.storage import atomic_write, digest

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNKNOWN, FIRST, LAST, _ = SPECIAL_TOKENS
_INSIDE = "##"  # prefix of a piece that continues a word
_REMEDY = (
    "give the path of a tokenizer.json or of a directory that holds one; `make fetch-weights` on a machine with "
    "internet fetches bert-base-uncased"
)


class CaptionTokenizer:
    """Captions to rows of exactly `max_length` ids: first token, pieces (cut where too many), last token, padding.

    Settings are fixed when it is made, so `__call__` may run in several threads at once.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, pad: str) -> None:
        """`tokenizer` is taken over: its truncation and padding are set here."""
        tokenizer.enable_truncation(max_length)
        pad_id = tokenizer.token_to_id(pad)
        assert pad_id is not None, "whoever loads a tokenizer makes sure"
        self.pad_id: int = pad_id
        tokenizer.enable_padding(length=max_length, pad_id=self.pad_id, pad_token=pad)
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(self, captions: list[str]) -> Tensor:
        """(B, max_length) int64, on the CPU."""
        return self.encode(captions)[0]

    def encode(self, captions: list[str]) -> tuple[Tensor, int]:
        """The same, and how many of the captions were cut."""
        encodings = self._tokenizer.encode_batch(captions)
        ids_BL = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        return ids_BL, sum(bool(encoding.overflowing) for encoding in encodings)

    def digest(self) -> str:
        """sha256 of the vocabulary: which piece has which id."""
        return digest(sorted(self._tokenizer.get_vocab(with_added_tokens=True).items()))

    def decode(self, ids_BL: Tensor) -> list[str]:
        """The lower-cased captions back, without special tokens: for logs and reports."""
        captions: list[str] = self._tokenizer.decode_batch(ids_BL.tolist(), skip_special_tokens=True)
        return captions


def load_tokenizer(source: str, max_length: int) -> CaptionTokenizer:
    """A BERT tokenizer from a tokenizer.json, a directory with one (or with vocab.txt), or the Hugging Face hub.

    raises  FileNotFoundError where `source` is none of these, or the hub cannot be reached; ValueError where the file
            is no tokenizer
    """
    tokenizer = _read(source)
    _require_special_tokens(tokenizer.get_vocab())
    return CaptionTokenizer(tokenizer, max_length, pad=PAD)


def load_clip_tokenizer(model: str, max_length: int) -> CaptionTokenizer:
    """CLIP's tokenizer, which pads with its last token, from a directory or the Hugging Face hub.

    raises  OSError or ValueError where `model` is neither
    """
    from transformers import CLIPTokenizer  # seconds to import, and most runs do without

    theirs = CLIPTokenizer.from_pretrained(model, local_files_only=hub_is_away())
    # A copy: transformers sets truncation and padding on its own object at every call, and threads share ours.
    return CaptionTokenizer(
        Tokenizer.from_str(theirs.backend_tokenizer.to_str()), max_length, pad=str(theirs.pad_token)
    )


def _read(source: str) -> Tokenizer:
    for file in (source, os.path.join(source, "tokenizer.json")):
        if os.path.isfile(file):
            return _from_json(file)
    vocab_file = os.path.join(source, "vocab.txt")
    if os.path.isfile(vocab_file):
        with open(vocab_file, encoding="utf-8") as lines:
            return _bert({line.rstrip("\n"): number for number, line in enumerate(lines)})
    if os.path.exists(source) or os.path.isabs(source) or source.endswith(".json"):
        raise FileNotFoundError(
            f"conditioning.tokenizer={source!r} is no tokenizer.json, nor a directory with tokenizer.json or "
            f"vocab.txt; {_REMEDY}"
        )
    return _from_hub(source)


def _from_json(file: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is not a tokenizer of the tokenizers library ({error}); {_REMEDY}") from error


def _from_hub(name: str) -> Tokenizer:
    from transformers import AutoTokenizer  # seconds to import, and most runs have a file

    try:
        return AutoTokenizer.from_pretrained(name, use_fast=True, local_files_only=hub_is_away()).backend_tokenizer
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"conditioning.tokenizer={name!r} is no file here and the Hugging Face hub did not give it; {_REMEDY}"
        ) from error


def hub_is_away() -> bool:
    """Whether the name of the Hugging Face hub leads nowhere from here; its library would try for a minute."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():  # which may know the name
        return False
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def train_wordpiece(captions: list[str], vocab_size: int, path: str | Path) -> None:
    """Train a lower-cased WordPiece with BERT's special tokens on `captions`, and write it to `path` (tokenizer.json).

    The file depends on the captions alone, on any machine. Where the captions give fewer pieces than `vocab_size`, the
    rest are `[unused0]`, `[unused1]` ... as in BERT, so that the vocabulary always has the size asked for.

    raises  ValueError where `vocab_size` is too small for the special tokens and the characters, or no caption has one
    """
    blank = _pipeline(vocab={})
    words = [
        word
        for caption in captions
        for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(caption))
    ]
    if not words:
        raise ValueError("no words in the captions: nothing to train a tokenizer on")
    alphabet = sorted({c for word in words for c in word})
    alphabet += [_INSIDE + c for c in sorted({c for word in words for c in word[1:]})]
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size}; these captions need at least {smallest}: every character, alone")
    # The trainer numbers `##x` in the order of a randomly seeded hash map, and breaks ties by number. Giving it the
    # alphabet as special tokens fixes every number, hence every tie.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *alphabet], show_progress=False
    )
    blank.train_from_iterator(captions, trainer)
    vocab = blank.get_vocab(with_added_tokens=True)
    for number in range(vocab_size - len(vocab)):
        vocab[f"[unused{number}]"] = len(vocab)
    with atomic_write(path) as file:
        file.write(_bert(vocab).to_str(pretty=True).encode())


def _pipeline(vocab: dict[str, int]) -> Tokenizer:
    """BERT's lower-casing and splitting around a vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_INSIDE)
    return tokenizer


def _bert(vocab: dict[str, int]) -> Tokenizer:
    """BERT's tokenizer around a vocabulary that has its special tokens."""
    _require_special_tokens(vocab)
    tokenizer = _pipeline(vocab)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{FIRST} $A {LAST}", special_tokens=[(FIRST, vocab[FIRST]), (LAST, vocab[LAST])]
    )
    return tokenizer


def _require_special_tokens(vocab: dict[str, int]) -> None:
    if missing := [token for token in SPECIAL_TOKENS if token not in vocab]:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}; it is not one of BERT's kind: {_REMEDY}")

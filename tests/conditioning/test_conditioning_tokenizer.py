"""WordPiece tokenizers: training is deterministic, reading equals transformers' BERT, mistakes are named."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer

from ldm_scale.conditioning import tokenizer
from ldm_scale.conditioning.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_wordpiece

CAPTIONS = [
    f"A {colour} {shape} at the {place}."
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "triangle")
    for place in ("top left", "bottom right", "middle")
]


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_wordpiece(CAPTIONS, 128, path)
    return path


def test_rows_are_cls_pieces_sep_padding(toy_file: Path):
    ids = load_tokenizer(str(toy_file), 10)(["A red circle", ""])
    vocab = Tokenizer.from_file(str(toy_file)).get_vocab()
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == [vocab[t] for t in ("[CLS]", "a", "red", "circle", "[SEP]")] + [vocab["[PAD]"]] * 5
    assert ids[1].tolist() == [vocab["[CLS]"], vocab["[SEP]"]] + [vocab["[PAD]"]] * 8
    assert [vocab[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]


def test_long_captions_are_cut_before_sep(toy_file: Path):
    tokenizer = load_tokenizer(str(toy_file), 6)
    vocab = Tokenizer.from_file(str(toy_file)).get_vocab()
    ids = tokenizer([CAPTIONS[0] * 50])
    assert ids.shape == (1, 6)
    assert ids[0, -1] == vocab["[SEP]"]
    assert tokenizer.decode(ids) == ["a red circle at"]


def test_captions_come_back_lower_cased(toy_file: Path):
    tokenizer = load_tokenizer(str(toy_file), 40)
    assert tokenizer.decode(tokenizer(CAPTIONS)) == [caption.lower() for caption in CAPTIONS]


def test_vocabulary_has_the_size_asked_for(toy_file: Path, tmp_path: Path):
    assert load_tokenizer(str(toy_file), 8).vocab_size == 128
    train_wordpiece(["aa ab ba"], 40, tmp_path / "few.json")
    tokenizer = load_tokenizer(str(tmp_path / "few.json"), 8)
    assert tokenizer.vocab_size == 40
    assert int(tokenizer(["aa ab ba abba zz [unused0]"]).max()) < 40


def test_training_is_the_same_in_every_process(tmp_path: Path):
    """The library's trainer alone is not: it numbers pieces in the order of a randomly seeded hash map."""
    script = "import sys; from ldm_scale.conditioning.tokenizer import train_wordpiece as t; t({}, 70, sys.argv[1])"
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    train_wordpiece(CAPTIONS[::-1], 70, here)  # nor does the order of the captions matter
    subprocess.run([sys.executable, "-c", script.format(CAPTIONS), str(there)], check=True)
    assert here.read_bytes() == there.read_bytes()


def test_vocab_txt_equals_transformers_bert(toy_file: Path, tmp_path: Path):
    from transformers import BertTokenizer

    vocab = Tokenizer.from_file(str(toy_file)).get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n", encoding="utf-8")
    theirs = BertTokenizer.from_pretrained(str(tmp_path), do_lower_case=True)
    captions = [*CAPTIONS, "", "R\u00e9d  circle,\tsquare!", "\u7ea2 circle", "x" * 120, "re-treat: middle's left" * 9]
    expected = theirs(captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    assert torch.equal(load_tokenizer(str(tmp_path), 16)(captions), expected)
    assert torch.equal(load_tokenizer(str(toy_file), 16)(captions), expected)


def test_threads_get_what_one_thread_gets(toy_file: Path):
    tokenizer = load_tokenizer(str(toy_file), 12)
    expected = tokenizer(CAPTIONS)
    with ThreadPoolExecutor(8) as threads:
        assert all(torch.equal(ids, expected) for ids in threads.map(lambda _: tokenizer(CAPTIONS), range(64)))


def test_too_small_a_vocabulary_or_no_captions_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"vocab_size=8; these captions need at least 9"):
        train_wordpiece(["ab", "cb"], 8, tmp_path / "t.json")  # five special, a, b, c, ##b
    with pytest.raises(ValueError, match="no words"):
        train_wordpiece(["", "  "], 50, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


def test_absent_or_wrong_files_are_named(tmp_path: Path):
    missing = tmp_path / "nowhere" / "tokenizer.json"
    for source in (missing, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"conditioning\.tokenizer=.*make fetch-weights") as caught:
            load_tokenizer(str(source), 8)
        assert str(source) in str(caught.value)
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer"):
        load_tokenizer(str(broken), 8)


def test_a_tokenizer_of_another_kind_is_refused(toy_file: Path, tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(ValueError, match=r"has no \[CLS\], \[SEP\], \[MASK\]"):
        load_tokenizer(str(tmp_path), 8)
    assert json.loads(toy_file.read_text())["model"]["type"] == "WordPiece"


def test_the_hub_out_of_reach_is_explained_at_once(monkeypatch: pytest.MonkeyPatch):
    """RFC 6761: a name under `invalid` leads nowhere, on any machine."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(tokenizer, "getproxies", dict)
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"conditioning\.tokenizer='nobody/nothing' .*make fetch-weights"):
        load_tokenizer("nobody/nothing", 77)
    assert time.monotonic() - began < 20, "the library alone tries for a minute"


def test_a_hub_that_has_a_name_or_lies_behind_a_proxy_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:1")
    assert not tokenizer.hub_is_away()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    assert tokenizer.hub_is_away()
    monkeypatch.setattr(tokenizer, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert not tokenizer.hub_is_away()

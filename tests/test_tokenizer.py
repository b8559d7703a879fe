"""Tokenizer: golden ids, no special tokens from plain text, streamed against whole, damaged files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Bpe

from molmo_edge.frontend.tokenizer import MOLMOE_SPECIAL_IDS, StreamDecoder, Tokenizer, TokenizerError

GOLDEN = Path(__file__).parent / "golden"
PRUNED = GOLDEN / "molmoe_pruned_tokenizer.json"  # made by make_tokenizer_fixture.py
CASES = json.loads((GOLDEN / "molmoe_tokenizer.json").read_text(encoding="utf-8"))
FILES = {"pruned": PRUNED} | {name: GOLDEN / name / "tokenizer.json" for name in ("molmoe", "qwen", "olmo")}
LIBRARY = {name: Bpe.from_file(str(path)) for name, path in FILES.items()}
TOKENIZERS = {name: Tokenizer.from_file(path) for name, path in FILES.items()}
SPECIAL_TEXTS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<|endoftext|>", "<|padding|>")
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())

# Parts of special tokens, which often combine to whole ones.
tricky_texts = st.lists(
    st.sampled_from([*SPECIAL_TEXTS, "<", "|", "im_", "patch>", " ", "|<EXTRA_TOKENS_0>|"]) | st.text()
).map("".join)


def special_ids(path: Path) -> set[int]:
    return {token["id"] for token in json.loads(path.read_text(encoding="utf-8"))["added_tokens"] if token["special"]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:30])
def test_ids_equal_the_golden_ones(case):
    tokenizer = TOKENIZERS["pruned"]
    assert tokenizer.encode(case["text"], allow_special=True) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["text"]


def test_special_ids():
    assert TOKENIZERS["pruned"].special == MOLMOE_SPECIAL_IDS
    special = TOKENIZERS["molmoe"].special
    assert (special.bos, special.eos, special.im_start, special.image) == (499, 499, 500, 504)
    # Molmo-7B-D's special ids follow padding ids, in the rows of new_embedding.
    assert TOKENIZERS["qwen"].special.im_start > 504


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=tricky_texts)
@example(text="".join(SPECIAL_TEXTS))
def test_no_text_becomes_a_special_token(name, text):
    assert not set(TOKENIZERS[name].encode(text)) & special_ids(FILES[name])


@every_tokenizer
def test_text_that_looks_special_survives(tokenizer):
    text = "what does <im_patch> mean? <|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) != tokenizer.encode(text, allow_special=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(ids=st.lists(st.integers(0, 504) | st.sampled_from([50254, 50276, 50279, 50282, 22692, 223, 224])))
def test_streamed_equals_whole_equals_the_library(name, ids):
    """Any ids, including incomplete and invalid characters."""
    tokenizer = TOKENIZERS[name]
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.feed(i) for i in ids) + decoder.flush() == tokenizer.decode(ids)
    known = [i for i in ids if tokenizer.token_bytes(i)]
    assert tokenizer.decode(ids) == LIBRARY[name].decode(known, skip_special_tokens=False)


def test_no_piece_holds_half_a_character():
    tokenizer = TOKENIZERS["pruned"]
    text = "naïve café — 你好 🌍 👩‍👩‍👧"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(i) for i in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert "" in pieces  # some characters were incomplete
    assert decoder.flush() == ""
    first, *_ = tokenizer.encode("🌍")
    assert decoder.feed(first) == ""
    assert decoder.flush() == "\ufffd"


def test_unknown_and_negative_ids():
    assert TOKENIZERS["pruned"].decode([50303]) == ""  # a padding row of MolmoE's embedding
    with pytest.raises(TokenizerError, match="-1"):
        TOKENIZERS["pruned"].decode([-1])


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "hello world " * 9000, " " * 100_000, "é" * 100_000, "<im_col>" * 12_500]
)
def test_long_text_is_quick(text):
    started = time.process_time()
    ids = TOKENIZERS["pruned"].encode(text)
    assert time.process_time() - started < 1
    assert TOKENIZERS["pruned"].decode(ids) == text


def test_lone_surrogates_are_refused():
    with pytest.raises(TokenizerError, match="surrogate"):
        TOKENIZERS["pruned"].encode("\ud800")


def damaged(**changes) -> str:
    return json.dumps(json.loads(PRUNED.read_text(encoding="utf-8")) | changes)


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(TokenizerError, match="there is no tokenizer"):
        Tokenizer.from_file(path)
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_file(tmp_path)
    for content, message in (
        (b"\xff\xfe\x00", "cannot be read"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "not the tokenizer of a Molmo"),
        (damaged(decoder={"type": "Metaspace"}).encode(), "byte-level"),
        (damaged(model={"type": "BPE"}).encode(), "damaged"),
        (
            damaged(model={"type": "BPE", "vocab": {"a": 0}, "merges": []}, added_tokens=[]).encode(),
            "lacks .*<im_patch>",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=message) as caught:
            Tokenizer.from_file(path)
        assert str(path) in str(caught.value)

"""tokenizer.json as GGUF metadata, so that a program that reads only the GGUF can encode and decode text.

llama.cpp's pre-tokenizers, which split a text before its bytes are merged, are compiled in under short names. The one
that a tokenizer.json needs is found by trial: llama.cpp gets the vocabulary with each name and has to produce the same
ids for the same texts.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from molmo_edge.checkpoints.gguf_layout import token_names
from molmo_edge.config import DecoderConfig
from molmo_edge.export.errors import ExportError
from molmo_edge.export.gguf_writer import write_header
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes.llama_library import load_library, take_errors

# Those of OLMoE, Qwen2, OLMo 2 and SmolLM2, then of other byte-level tokenizers.
_PRETOKENIZERS = ("olmo", "qwen2", "dbrx", "smollm", "llama-bpe", "gpt-4o", "mpt", "falcon")
_TEXTS = (
    " User: Point to the dog. Assistant:",
    ' <points x1="61.5" y1="40.4" x2="7.0" y2="99.9" alt="red cups">red cups</points>',
    "Counting the cups shows a total of 12345 in 2024, they're 3.14 or -0.5e10.",
    "I'll say: don't! We'd've... (it's) [ok]? {yes}/no_maybe; a+b==c & d|e <= f%",
    "  two  spaces   three\n\nlines\twith\ttabs   \n  and ends  ",
    "Über naïve café — “quotes” ‘x’ … 日本語の文 中文 한국어 Привет мир عربى हिन्दी",
    "emoji 😀👍🏽 and maths ∑∫≈ x² ½ №",
    "def f(x):\n    return {'a': [1, 22, 333, 4444]}  # comment\n",
    "ALLCAPS CamelCase snake_case http://example.org/?q=1&r=2#top",
    "1 12 123 1234 12345 123456 1234567",
    "<|endoftext|> <im_patch> typed by a person",
)
# Molmo has no system prompt, and a user's turn ends where the assistant's begins.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %} User: {{ message['content'] }} Assistant:"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, d: DecoderConfig) -> None:
    """Write the tokenizer into the GGUF's metadata.

    Raises ExportError if none of llama.cpp's pre-tokenizers splits texts as this tokenizer does.
    """
    definition = json.loads(tokenizer.definition)
    _add(writer, tokenizer, definition, d, find_pretokenizer(tokenizer, definition, d))


def _add(
    writer: GGUFWriter, tokenizer: Tokenizer, definition: dict[str, Any], d: DecoderConfig, pretokenizer: str
) -> None:
    special = {token["id"]: bool(token["special"]) for token in definition.get("added_tokens") or ()}
    types = []
    for i in range(d.n_logits):
        if tokenizer.token(i) is None:
            types.append(TokenType.UNUSED)
        elif i in special:  # runs of spaces, for example, are added tokens but text
            types.append(TokenType.CONTROL if special[i] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    merges = definition["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pretokenizer)
    writer.add_token_list(token_names(tokenizer, d))
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    eos = tokenizer.special.eos
    writer.add_bos_token_id(eos)  # none of the decoders has a BOS token
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(eos)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    if unused := list(range(d.vocab_size, d.embedding_size)):  # rows of the head without a token
        writer.add_array("tokenizer.ggml.suppress_tokens", unused)


def find_pretokenizer(tokenizer: Tokenizer, definition: dict[str, Any], d: DecoderConfig) -> str:
    """llama.cpp's name for the pre-tokenizer of `definition`, the content of a tokenizer.json."""
    llama_cpp = load_library()
    expected = [tokenizer.encode(text) for text in _TEXTS]
    with tempfile.TemporaryDirectory() as scratch:
        for pretokenizer in _PRETOKENIZERS:
            path = Path(scratch) / f"{pretokenizer}.gguf"
            writer = GGUFWriter(path, "gpt2")
            writer.add_vocab_size(d.n_logits)
            _add(writer, tokenizer, definition, d, pretokenizer)
            write_header(writer)
            writer.close()
            if _ids(llama_cpp, path) == expected:
                return pretokenizer
    raise ExportError(
        "none of llama.cpp's pre-tokenizers splits texts as this tokenizer.json does: export to ONNX instead"
    )


def _ids(llama_cpp: Any, path: Path) -> list[list[int]]:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ExportError(f"llama.cpp cannot load this tokenizer: {take_errors()}")
    try:
        vocab, encoded = llama_cpp.llama_model_get_vocab(model), []
        for text in _TEXTS:
            raw = text.encode()
            ids = (ctypes.c_int32 * (len(raw) + 8))()
            n = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, len(ids), False, False)
            encoded.append(list(ids[:n]))
        return encoded
    finally:
        llama_cpp.llama_model_free(model)

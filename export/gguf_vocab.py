"""tokenizer.json in llama.cpp's words, so that a program that only reads the GGUF can take and give text.

How a text is cut before its bytes are merged is compiled into llama.cpp under short names. Which of them a
tokenizer.json means is not guessed from hashes here: llama.cpp is given the vocabulary with each, and has to make the
same ids of the same texts.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge.checkpoints.gguf_layout import token_names
from molmo_edge.config import DecoderConfig
from molmo_edge.export.errors import ExportError
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes.llama_library import last_words, load_library

if TYPE_CHECKING:
    from gguf import GGUFWriter

# OLMoE, Qwen2, OLMo 2, SmolLM2; then what other byte-level tokenizers are like.
_CUTS = ("olmo", "qwen2", "dbrx", "smollm", "llama-bpe", "gpt-4o", "mpt", "falcon")
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
# Molmo has no system prompt; a turn of the user's ends where the assistant's begins.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %} User: {{ message['content'] }} Assistant:"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, d: DecoderConfig) -> None:
    """Write the tokenizer into the GGUF's metadata.

    Raises ExportError for a tokenizer that llama.cpp cuts texts otherwise for, whatever it is told.
    """
    definition = json.loads(tokenizer.definition)
    _add(writer, tokenizer, definition, d, _cut(tokenizer, definition, d))


def _add(writer: GGUFWriter, tokenizer: Tokenizer, definition: dict[str, Any], d: DecoderConfig, cut: str) -> None:
    from gguf import TokenType

    special = {token["id"]: bool(token["special"]) for token in definition.get("added_tokens") or ()}
    kinds = []
    for i in range(d.embedding_size):
        if tokenizer.token(i) is None:
            kinds.append(TokenType.UNUSED)
        elif i in special:  # spaces in a row, for one, are added, but are text
            kinds.append(TokenType.CONTROL if special[i] else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL)
    merges = definition["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(token_names(tokenizer, d))
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    eos = tokenizer.special.eos
    writer.add_bos_token_id(eos)  # none of the decoders has one of its own
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(eos)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    if silent := list(range(d.vocab_size, d.embedding_size)):  # rows of the head that stand for no text
        writer.add_array("tokenizer.ggml.suppress_tokens", silent)


def _cut(tokenizer: Tokenizer, definition: dict[str, Any], d: DecoderConfig) -> str:
    from gguf import GGUFWriter

    llama_cpp = load_library()
    wanted = [tokenizer.encode(text) for text in _TEXTS]
    with tempfile.TemporaryDirectory() as scratch:
        for cut in _CUTS:
            path = Path(scratch) / f"{cut}.gguf"
            writer = GGUFWriter(path, "gpt2")
            writer.add_vocab_size(d.embedding_size)
            _add(writer, tokenizer, definition, d, cut)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            if _ids(llama_cpp, path) == wanted:
                return cut
    raise ExportError(
        "llama.cpp cuts texts otherwise than this tokenizer.json, whatever it is told: its text would not be the "
        "model's. Export to ONNX instead"
    )


def _ids(llama_cpp: Any, path: Path) -> list[list[int]]:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ExportError(f"llama.cpp does not take this tokenizer: {last_words()}")
    try:
        vocab, found = llama_cpp.llama_model_get_vocab(model), []
        for text in _TEXTS:
            raw = text.encode()
            ids = (ctypes.c_int32 * (len(raw) + 8))()
            n = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, len(ids), False, False)
            found.append(list(ids[:n]))
        return found
    finally:
        llama_cpp.llama_model_free(model)

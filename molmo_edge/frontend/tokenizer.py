"""Load tokenizer.json, with the special ids that Molmo uses for images.

Text of a user must never become a special token: "<im_patch>" in a question would shift the image, "<|endoftext|>"
would end the conversation. Therefore `encode` treats special tokens as plain text by default.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Bpe

END_OF_TEXT = "<|endoftext|>"


class TokenizerError(MolmoEdgeError):
    """A tokenizer.json that cannot be used, or invalid ids."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens. Molmo's decoders have no separate BOS: bos equals eos."""

    bos: int
    eos: int
    im_start: int
    im_end: int
    im_patch: int
    im_col: int
    image: int


# The added_tokens.json of MolmoE is outdated (it has the ids of Molmo-7B-O); its tokenizer.json is right.
MOLMOE_SPECIAL_IDS = SpecialIds(
    bos=50279, eos=50279, im_start=50280, im_end=50281, im_patch=50282, im_col=50283, image=50284
)

_NAMES = {
    "bos": END_OF_TEXT,
    "eos": END_OF_TEXT,
    "im_start": "<im_start>",
    "im_end": "<im_end>",
    "im_patch": "<im_patch>",
    "im_col": "<im_col>",
    "image": "<|image|>",
}


class Tokenizer:
    """A byte-level BPE tokenizer. Thread-safe."""

    def __init__(self, definition: str, *, name: str = "tokenizer.json") -> None:
        """`definition`: the text of a tokenizer.json. `name`: its name in error messages. Raises TokenizerError."""
        try:
            parsed = json.loads(definition)
        except json.JSONDecodeError as error:
            raise TokenizerError(f"{name} is not valid JSON: {error}") from None
        decoder = parsed.get("decoder") if isinstance(parsed, dict) else None
        if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
            raise TokenizerError(f"{name} is not the tokenizer of a Molmo, which is a byte-level BPE")
        self.definition = definition  # the text of the tokenizer.json
        self._name = name
        self._text = self._load()
        self._text.encode_special_tokens = True  # special tokens in a text are text
        ids: dict[str, Any] = {field: self._text.token_to_id(token) for field, token in _NAMES.items()}
        missing = sorted({token for field, token in _NAMES.items() if ids[field] is None})
        if missing:
            raise TokenizerError(f"{name} lacks {', '.join(missing)}: it is not the tokenizer of a Molmo")
        self.special = SpecialIds(**ids)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json. Raises TokenizerError if it is missing, damaged or not that of a Molmo."""
        try:
            definition = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise TokenizerError(
                f"there is no tokenizer {path}: copy the tokenizer.json of the same model from the hub to this path"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"the tokenizer {path} cannot be read: {error}") from None
        return cls(definition, name=str(path))

    def _load(self) -> Bpe:
        from tokenizers import Tokenizer as Bpe

        try:
            return Bpe.from_str(self.definition)
        except Exception as error:  # the library raises Exception itself
            raise TokenizerError(f"{self._name} is damaged: {error}") from None

    @cached_property
    def _with_special(self) -> Bpe:
        # A second instance, because the setting applies to the whole tokenizer, which other threads may be using.
        return self._load()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Encode `text` without adding tokens. `allow_special`: encode "<im_patch>" etc. as special tokens."""
        bpe = self._with_special if allow_special else self._text
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise TokenizerError("the text contains lone surrogates (broken UTF-16), which cannot be encoded") from None
        return list(bpe.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`, including special tokens; invalid UTF-8 becomes U+FFFD.

        Ids without a token (padding rows of the embedding) decode to nothing. Raises TokenizerError for negative ids.
        """
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token(self, token_id: int) -> str | None:
        """The token as written in tokenizer.json; None for an id without a token."""
        return self._text.id_to_token(int(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token: often a word, sometimes a part of a character."""
        if token_id < 0:
            raise TokenizerError(f"{token_id} is not a token id")
        token = self.token(token_id)
        if token is None:
            return b""
        table = _byte_of_char()
        try:
            return bytes(table[char] for char in token)
        except KeyError:  # added tokens are written as plain text, for example "   "
            return token.encode("utf-8")


class StreamDecoder:
    """Decodes ids one at a time. The pieces, joined, equal `Tokenizer.decode` of all ids.

    `tokenizers.decoders.DecodeStream` does not: it drops an incomplete character at the end of an answer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is incomplete."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The remaining text: U+FFFD for an incomplete character, else ""."""
        return self._utf8.decode(b"", final=True)


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte; printable bytes represent themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}

"""tokenizer.json, plus the special ids that Molmo puts around images.

Text typed by a person must never become a special token: a question that contains "<im_patch>" would shift the
image, one that contains "<|endoftext|>" would end the conversation. So `encode` treats such text as plain
characters unless it is told otherwise.
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
    """A tokenizer.json that cannot be used, or ids that are none."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that no text can produce. None of Molmo's decoders has a BOS of its own: bos is eos."""

    bos: int
    eos: int
    im_start: int
    im_end: int
    im_patch: int
    im_col: int
    image: int


# MolmoE's own added_tokens.json gives the ids of Molmo-7B-O: it is stale, tokenizer.json is right.
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
    """A byte-level BPE. Safe to share between threads."""

    def __init__(self, definition: str, *, name: str = "tokenizer.json") -> None:
        """`definition` is the text of a tokenizer.json, `name` stands for it in errors. Raises TokenizerError."""
        try:
            parsed = json.loads(definition)
        except json.JSONDecodeError as error:
            raise TokenizerError(f"{name} is not valid JSON: {error}") from None
        decoder = parsed.get("decoder") if isinstance(parsed, dict) else None
        if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
            raise TokenizerError(f"{name} is not the tokenizer of a Molmo: those are byte-level BPE")
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
        """Read a tokenizer.json. Raises TokenizerError where it is missing, damaged, or not a Molmo's."""
        try:
            definition = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise TokenizerError(
                f"there is no tokenizer {path}: copy the tokenizer.json of the same model on the hub there"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"the tokenizer {path} cannot be read: {error}") from None
        return cls(definition, name=str(path))

    def _load(self) -> Bpe:
        from tokenizers import Tokenizer as Bpe

        try:
            return Bpe.from_str(self.definition)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{self._name} is damaged: {error}") from None

    @cached_property
    def _with_special(self) -> Bpe:
        # A second instance: the switch is a property of the whole tokenizer, and other threads may be encoding.
        return self._load()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`, nothing added. Only with `allow_special` does "<im_patch>" and its like become one token."""
        bpe = self._with_special if allow_special else self._text
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise TokenizerError(
                "the text has lone surrogates (broken UTF-16), which no tokenizer can encode"
            ) from None
        return list(bpe.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD.

        Ids without a token (rows that only pad an embedding) decode to nothing. Raises TokenizerError
        for negative ids.
        """
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token(self, token_id: int) -> str | None:
        """The token as tokenizer.json writes it; None for an id that has none."""
        return self._text.id_to_token(int(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: often a word, sometimes a part of a character."""
        if token_id < 0:
            raise TokenizerError(f"{token_id} is not a token id")
        token = self.token(token_id)
        if token is None:
            return b""
        table = _byte_of_char()
        try:
            return bytes(table[char] for char in token)
        except KeyError:  # added tokens are written as they are, "   " for one
            return token.encode("utf-8")


class StreamDecoder:
    """Decodes ids one at a time. The pieces, joined, equal `Tokenizer.decode` of all ids.

    `tokenizers.decoders.DecodeStream` does not: it drops an incomplete character at the end of an answer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """Text that is complete with this id; "" while the bytes of a character are still missing."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else ""."""
        return self._utf8.decode(b"", final=True)


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte. Printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}

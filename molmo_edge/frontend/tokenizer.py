"""Load tokenizer.json, with the special ids that Molmo uses for images.

User text must never become a special token: "<im_patch>" in a question would shift the image, "<|endoftext|>"
would end the conversation. Therefore `encode` treats special tokens, and MolmoPoint's grounding tokens, as plain text
by default.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.grounding_tokens import TOKEN as GROUNDING
from molmo_edge.system.lazy import cached_property

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Bpe

END_OF_TEXT = "<|endoftext|>"


class TokenizerError(MolmoEdgeError):
    """A tokenizer.json that cannot be used, or invalid ids."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens. In Molmo v1, bos equals eos. The last four are those of Molmo2, None in Molmo v1."""

    bos: int
    eos: int
    im_start: int
    im_end: int
    im_patch: int
    im_col: int
    image: int
    low_res_im_start: int | None = None
    im_low: int | None = None
    frame_start: int | None = None
    frame_end: int | None = None

    def to_dict(self) -> dict[str, int]:
        """The ids by name, without those that the model does not have."""
        return {name: token for name, token in asdict(self).items() if token is not None}

    @property
    def chat_markup(self) -> bool:
        """Whether conversations are written in ChatML, as in Molmo2."""
        return self.low_res_im_start is not None

    @property
    def image_block(self) -> tuple[int, ...]:
        """The tokens of images, which attend to each other in both directions in Molmo2."""
        names = ("im_start", "im_end", "im_patch", "im_col", *_MOLMO2_NAMES)
        return tuple(token for token in (getattr(self, name) for name in names) if token is not None)


_MOLMO2_NAMES = {name: f"<{name}>" for name in ("low_res_im_start", "im_low", "frame_start", "frame_end")}

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


CHAT_END = "<|im_end|>"  # ends the turns of a Molmo2


class Tokenizer:
    """A byte-level BPE tokenizer. Thread-safe."""

    def __init__(self, definition: str, *, name: str = "tokenizer.json", bos: str | int | None = None) -> None:
        """`definition`: the text of a tokenizer.json. `name`: its name in error messages. Raises TokenizerError.

        `bos`: the BOS of a Molmo2, a token or an id, which tokenizer.json does not tell. Default: that of its EOS.
        """
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
        more = {field: self._text.token_to_id(token) for field, token in _MOLMO2_NAMES.items()}
        end = self._text.token_to_id(CHAT_END)
        if end is not None and more["low_res_im_start"] is not None:
            first = self._text.token_to_id(bos) if isinstance(bos, str) else bos
            ids |= {"bos": end if first is None else first, "eos": end} | more
        self.special = SpecialIds(**ids)
        listed = parsed.get("added_tokens") or []
        # MolmoPoint lists its grounding tokens as ordinary ones. They have no embeddings: in a text they are text.
        grounding = [token["content"] for token in listed if GROUNDING.fullmatch(token["content"])]
        self._text.add_special_tokens(grounding)
        # Tokens that are no text, wherever they are listed.
        self.special_ids = frozenset({*self.special.to_dict().values(), *(t["id"] for t in listed if t["special"])})

    @classmethod
    def from_file(cls, path: str | Path, *, bos: int | None = None) -> Tokenizer:
        """Read a tokenizer.json. Raises TokenizerError if it is missing, damaged or not that of a Molmo.

        `bos`: as in `Tokenizer`; default: what a tokenizer_config.json beside it says.
        """
        try:
            definition = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise TokenizerError(
                f"there is no tokenizer {path}: copy the tokenizer.json of the same model from the hub to this path"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"the tokenizer {path} cannot be read: {error}") from None
        return cls(definition, name=str(path), bos=_bos_token(Path(path)) if bos is None else bos)

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


def _bos_token(tokenizer: Path) -> str | None:
    """The BOS token that the tokenizer_config.json beside `tokenizer` names, if there is one."""
    try:
        token = json.loads(tokenizer.with_name("tokenizer_config.json").read_text(encoding="utf-8")).get("bos_token")
    except (OSError, ValueError, AttributeError):  # not there, or not of this kind: tokenizer.json alone decides
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


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

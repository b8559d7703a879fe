"""Build the model's prompts: roles, style tags and turns; and the questions of point, count and caption.

A sequence is BOS, the image tokens, then for each turn " User: {question} Assistant:" and " {answer}" EOS.
Source: olmo/data/data_formatter.py::DataFormatter (message format "role", leading space always) and
MultiModalPreprocessor.__call__.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.chatml import chat_ids
from molmo_edge.frontend.crops import PreparedImage
from molmo_edge.frontend.tokenizer import Tokenizer


class PromptError(MolmoEdgeError):
    """An empty question, or turns that do not end with a question."""


class Prompt(NamedTuple):
    """The ids of BOS and an image, and the positions of the image's features among them."""

    ids: np.ndarray  # int32 [n], BOS first
    token_index: np.ndarray  # int32 [n_crops, cells^2]: position in `ids`, negative where dropped


def build_prompt(question: str, *, style: str | None = None) -> str:
    """ " User: {question} Assistant:", with "{style}: " before the question if a style is given.

    Styles are the tags of the academic training sets ("vqa2", "chart_qa", "a_okvqa_mc", ...): with a style the model
    answers as in that set, without one in full sentences. Raises PromptError for an empty question.
    """
    if not question.strip():
        raise PromptError("the question is empty")
    tag = f"{style}: " if style else ""
    return f" User: {tag}{question} Assistant:"


def build_caption_prompt(style: str = "long_caption", length: int | None = 65) -> str:
    """The prompt of stage 1, which has no roles: " long_caption 65:" or " transcript 40:".

    `length` requests an answer of about 15 times as many characters; None leaves the length open. Reference:
    `get_system_prompt`, "style_and_length", including its space before the colon of an open length.
    """
    return f" {style} {'' if length is None else length}:"


def image_ids(tokenizer: Tokenizer, image: PreparedImage) -> Prompt:
    """The beginning of every sequence: BOS and the image. `text_ids` follow."""
    ids = np.concatenate([[tokenizer.special.bos], image.tokens]).astype(np.int32)
    return Prompt(ids, np.where(image.token_index < 0, image.token_index, image.token_index + 1).astype(np.int32))


def text_ids(tokenizer: Tokenizer, turns: Sequence[str | Sequence[int]], *, style: str | None = None) -> np.ndarray:
    """Ids of a conversation after BOS and image, int32 [n].

    `turns`: the texts of user, assistant, user, ..., ending with the user; an answer may also be given as the ids that
    were generated. `style` tags the last question. EOS follows every answer. Special tokens in a text are encoded as
    plain text.

    Raises PromptError for an empty question, and for turns that do not end with a question.
    """
    if isinstance(turns, str) or len(turns) % 2 == 0:
        raise PromptError("turns must be a list of question, answer, question, ... that ends with a question")
    if any(isinstance(turn, str) and not turn.strip() for turn in turns[::2]):
        raise PromptError("the question is empty")
    if tokenizer.special.chat_markup:
        return np.array(chat_ids(tokenizer, turns, style=style), np.int32)
    ids: list[int] = []
    for i, turn in enumerate(turns):
        if i % 2:
            ids += [*(tokenizer.encode(f" {turn}") if isinstance(turn, str) else turn), tokenizer.special.eos]
        else:
            assert isinstance(turn, str)
            ids += tokenizer.encode(build_prompt(turn, style=style if i == len(turns) - 1 else None))
    return np.array(ids, np.int32)


def point_question(label: str) -> str:
    """ "Point to the dog." for "dog", "the dog" or "a dog"; "all dogs" and "my dog" are kept."""
    return f"Point to {_with_article(_phrase(label))}."


def count_question(label: str) -> str:
    """ "How many cups are there?" for "cups" or "the cups"."""
    phrase = _phrase(label)
    first, _, rest = phrase.partition(" ")
    return f"How many {rest if first.lower() in _ARTICLES and rest else phrase} are there?"


def asked_label(question: str) -> str:
    """The label of `point_question` and `count_question`, without an article; empty for other questions."""
    asked = _ASKED.fullmatch(question.strip())
    return "" if asked is None else asked["point"] or asked["count"]


def caption_question() -> str:
    """The simplest of the reference's caption prompts."""
    return "Describe this image."


_ASKED = re.compile(r"Point to (?:the )?(?P<point>[^.\"]+)\.?|How many (?P<count>[^?\"]+) are there\?")
_ARTICLES = frozenset(("the", "a", "an"))
# fmt: off
_DETERMINERS = frozenset((
    "all", "any", "both", "each", "either", "every", "her", "his", "its", "my", "our", "some", "that", "their",
    "these", "this", "those", "your",
))
# fmt: on


def _phrase(label: str) -> str:
    """`label` on one line, without punctuation at its end."""
    phrase = " ".join(label.split()).rstrip(".?!,;: ")
    if not phrase:
        raise PromptError('the label is empty: name what to look for, for example "the dog"')
    return phrase


def _with_article(phrase: str) -> str:
    first, _, rest = phrase.partition(" ")
    if first.lower() in _ARTICLES and rest:
        return f"the {rest}"
    return phrase if first.lower() in _DETERMINERS and rest else f"the {phrase}"

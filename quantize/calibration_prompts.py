"""Folders of photos as prompts, for `--calibrate` and for measuring a loss.

A Molmo prompt is mostly image, and image embeddings are distributed differently from text embeddings, so a
calibration on text alone optimizes for the wrong inputs. Each prompt here is a photo, a question, and an answer if
there is one.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import numpy as np

from molmo_edge.frontend.answer_points import encode_parts, grounded, in_coords
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.frontend.grounding_tokens import point_target
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.prompts import build_prompt, caption_question, image_ids, text_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.quantize import QuantizeError
from molmo_edge.runtimes import Runtime
from molmo_edge.runtimes.constraint import answer_space
from molmo_edge.runtimes.prompt_embeddings import image_embeddings, with_features
from molmo_edge.sdk.encoding import CollectedParts, image_part
from molmo_edge.system.files import FileNameError, find_file, printable

if TYPE_CHECKING:
    from molmo_edge.runtimes.grounding import GroundingInputs
    from molmo_edge.runtimes.protocol import PartedRuntime, PointRuntime

PROMPTS = "prompts.jsonl"
MAX_PROMPTS = 32  # of a calibration; each has several hundred positions
# For photos without a question. The last one names the kinds of answer that Molmo was trained to give.
QUESTIONS = (
    caption_question(),
    "Point to the main object.",
    "How many people are there?",
    "What is written in this image?",
    "Point to everything that a person could pick up.",
)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Prompt:
    """A photo and a question about it."""

    image: Path
    question: str
    answer: str = ""  # part of the prompt if there is one


class DecoderInput(NamedTuple):
    """A prompt as the decoder sees it."""

    embeddings: np.ndarray  # float32 [n, d_model]
    image: np.ndarray  # bool [n], True for image tokens
    answer: int = 0  # number of positions of the answer, the last ones


def find_prompts(folder: str | Path) -> list[Prompt]:
    """At most MAX_PROMPTS prompts, spread evenly over those of a folder.

    They come from its prompts.jsonl (`read_prompts`). Without that file every photo gets one of QUESTIONS. Raises
    QuantizeError, ImageError or PromptError for files that cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise QuantizeError(f"{folder} is not a folder of calibration photos")
    listed = folder / PROMPTS
    if listed.is_file():
        prompts = _spread(read_prompts(listed))
    else:
        prompts = [Prompt(path, QUESTIONS[i % len(QUESTIONS)]) for i, path in enumerate(_spread(photos_in(folder)))]
    if not prompts:
        raise QuantizeError(f"{folder} contains neither calibration photos nor a {PROMPTS}")
    for prompt in prompts:  # fail now rather than after an hour
        load_image(prompt.image)
    return prompts


def _spread(items: list[_Item]) -> list[_Item]:
    return [items[i * len(items) // MAX_PROMPTS] for i in range(MAX_PROMPTS)] if len(items) > MAX_PROMPTS else items


def photos_in(folder: Path) -> list[Path]:
    """The photos in a folder and its subfolders, in a fixed order, without hidden files (macOS's "._photo.jpg")."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in paths if os.path.isfile(path))


def read_prompts(file: Path) -> list[Prompt]:
    """Read a prompts.jsonl: one {"image": path in the folder, "question": ..., "answer": ...} per line, without an
    answer if there is none.

    Raises QuantizeError that names the line, and PromptError for an empty question. Does not open the photos.
    """
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError:
        raise QuantizeError(f"{file} is not in UTF-8") from None
    prompts = [_parse(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for prompt in prompts:
        build_prompt(prompt.question)
    return prompts


def _parse(file: Path, number: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
        name = entry["image"]
        prompt = Prompt(file.parent / name, entry["question"], entry.get("answer") or "")
        if not isinstance(prompt.question, str) or not isinstance(prompt.answer, str):
            raise TypeError("question and answer must be strings")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QuantizeError(
            f'{file}, line {number}: expected {{"image": ..., "question": ..., "answer": ...}}: {error}'
        ) from None
    try:
        image = find_file(file.parent, name)
    except FileNameError as error:
        raise QuantizeError(f"{file}, line {number}: {error}") from None
    if image is None:
        raise QuantizeError(f"{file}, line {number}: there is no {printable(prompt.image)}")
    return Prompt(image, prompt.question, prompt.answer)


def embed_prompts(prompts: Sequence[Prompt], runtime: Runtime, tokenizer: Tokenizer) -> list[DecoderInput]:
    """The decoder's input for each prompt, cut to the model's context. `runtime` needs no decoder.

    Points of answers are written as the model writes them: in its grammar, or as grounding tokens.
    """
    process = ImageProcessor(runtime.config.image, tokenizer.special)
    max_length = runtime.config.decoder.max_position_embeddings
    inputs = []
    for prompt in prompts:
        rgb = load_image(prompt.image)
        prepared = process(rgb)
        shown = image_ids(tokenizer, prepared)
        grounding = None
        if runtime.config.point_head is None:
            image = image_embeddings(runtime, prepared, shown)
        else:
            part = image_part(process.config, prepared, rgb.shape[:2], shown.token_index, grounded=True)
            patches, features = part.features(cast("PartedRuntime", runtime))
            image, collected = with_features(runtime, shown, features), CollectedParts()
            collected.add(part, patches, features)
            grounding = collected.inputs(cast("PointRuntime", runtime), shown.ids, tokenizer.special.im_patch)
        question = runtime.embed(text_ids(tokenizer, [prompt.question]))
        answer = _embed_answer(prompt.answer, runtime, tokenizer, grounding) if prompt.answer else question[:0]
        rows = np.concatenate([image, question, answer])[:max_length]
        at = np.arange(len(rows))
        answered = max(0, len(rows) - len(image) - len(question))
        inputs.append(DecoderInput(rows, (at > 0) & (at < len(image)), answered))  # all of the image's part but BOS
    return inputs


def _embed_answer(answer: str, runtime: Runtime, tokenizer: Tokenizer, grounding: GroundingInputs | None) -> np.ndarray:
    """The embeddings of an answer's tokens, float32 [n, d_model]."""
    space = answer_space(tokenizer)
    if grounding is not None and grounding.grids[0].size:  # a MolmoPoint cannot point without crops
        grid, frame = grounding.grids[0], grounding.frames[0]
        parts = grounded(
            space + answer, lambda x, y: point_target(x, y, grounding.pooling, grid, frame), grounding.token_ids
        )
        return grounding.embed(np.array(encode_parts(tokenizer, parts)))
    written = in_coords(answer) if tokenizer.special.chat_markup else answer
    return runtime.embed(np.array(tokenizer.encode(space + written), np.int64))

"""Let a teacher write the answers to the questions of data sets, for a student to be trained on.

Training on a teacher's own answers is sequence-level distillation (arXiv 1606.07947). Answers are appended to
FOLDER/answers.jsonl one by one, and questions without a usable answer to FOLDER/left_out.jsonl, so an interrupted call
is continued by the next one. Random choices depend on (seed, data set's name, example, question, turn) alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from molmo_edge.data.annotation_prompts import CONVERSATIONAL, UNTAGGED
from molmo_edge.data.examples import Annotation, DataSet
from molmo_edge.data.json_files import json_lines, read_json
from molmo_edge.data.written_answers import ANSWERS, AnswersError
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.image_files import load_image
from molmo_edge.molmo import Molmo
from molmo_edge.system.files import atomic_write

SETTINGS = "answers.json"
LEFT_OUT = "left_out.jsonl"  # with a "from" a line
_COORDS = "<points coords"  # a Molmo2's points, which a data set writes as a Molmo v1 does


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated."""

    max_new_tokens: int = 448
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """What `write_answers` did."""

    answers: int  # written now
    known: int  # found in the folder
    left_out: int  # now or before: without an end within max_new_tokens, or with points that cannot be written


def write_answers(
    teacher: Molmo,
    identity: str,
    sets: Sequence[DataSet],
    folder: Path,
    *,
    pictures: int,
    settings: AnswerSettings,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Answer the questions about the first `pictures` examples of each data set, and append them to `folder`.

    identity: of the teacher, see `model_identity`. Images without a file of their own are stored in FOLDER/images. A
    later question of a conversation follows the teacher's own earlier answers. progress: called with the number of
    pictures done. Raises AnswersError if the folder has answers of another teacher or with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder / SETTINGS, {"teacher": identity, **asdict(settings)})
    known, useless = _known(folder / ANSWERS), _known(folder / LEFT_OUT)
    written = left_out = done = before = 0
    with (
        (folder / ANSWERS).open("a", encoding="utf-8") as file,
        (folder / LEFT_OUT).open("a", encoding="utf-8") as rest,
    ):
        for data in sets:
            for index in range(min(pictures, len(data))):
                rng = np.random.default_rng(_seed(settings.seed, data.name, index))
                try:
                    example = data.example(index, rng)
                    rgb = None if example.image is None else load_image(example.image)
                except MolmoEdgeError:  # damaged: a run replaces it, too
                    left_out += 1
                    continue
                scene = None
                for place, annotation in enumerate(example.annotations if rgb is not None else ()):
                    key = (data.name, index, place)
                    if key in known:
                        before += 1
                        continue
                    if key in useless:
                        left_out += 1
                        continue
                    scene = teacher.encode(rgb) if scene is None else scene
                    messages = _conversation(teacher, scene, annotation, settings, key)
                    if messages is None:
                        _append(rest, {"from": key})
                        left_out += 1
                        continue
                    image = _file_of(example.image, rgb, folder)
                    row = {"image": image, "style": annotation.style, "messages": messages, "from": key}
                    _append(file, row)
                    written += 1
                done += 1
                if progress is not None:
                    progress(done)
    return Written(written, before, left_out)


def _append(file: IO[str], row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _seed(*of: int | str) -> int:
    """The seed of random choices that belong to these values alone."""
    return int.from_bytes(hashlib.blake2b(json.dumps(of).encode(), digest_size=8).digest(), "big")


def _conversation(
    teacher: Molmo, scene: Any, annotation: Annotation, settings: AnswerSettings, key: tuple[str, int, int]
) -> list[str] | None:
    """Questions and answers in turn; None if an answer cannot be learned. key: of the annotation."""
    history: list[tuple[str, str]] = []
    messages: list[str] = []
    style = annotation.style
    tagged = style not in UNTAGGED | CONVERSATIONAL
    for turn, question in enumerate(annotation.messages[::2]):
        asked = f"{style}: {question}" if tagged and not turn else question
        answer = teacher.ask(
            scene,
            asked,
            history=history,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=_seed(settings.seed, *key, turn),
        )
        if not answer.complete or not answer.text.strip() or _COORDS in answer.text:
            return None
        history.append((asked, answer.text))
        messages += [question, answer.text]
    return messages


def _file_of(image: Any, rgb: Any, folder: Path) -> str:
    """The path of an image relative to `folder`; it is stored there if it has no file of its own."""
    if isinstance(image, str | os.PathLike):
        return Path(os.path.relpath(os.fspath(image), folder)).as_posix()
    pixels = np.ascontiguousarray(rgb)
    name = f"images/{hashlib.blake2b(pixels.data, digest_size=12, person=b'%dx%d' % pixels.shape[:2]).hexdigest()}.png"
    path = folder / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as part:
            Image.fromarray(pixels).save(part, format="PNG")
    return name


def _check_settings(path: Path, now: dict[str, Any]) -> None:
    if path.exists():
        before = read_json(path, AnswersError)
        differs = [name for name in now if not isinstance(before, dict) or before.get(name) != now[name]]
        if differs:
            raise AnswersError(
                f"{path.parent} has answers with another {', '.join(differs)}: use the same, or another folder"
            )
        return
    with atomic_write(path) as part:
        part.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def _known(path: Path) -> set[tuple[str, int, int]]:
    """The questions in a file of answers or of what is left out. A last line that was cut off is removed."""
    if not path.exists():
        return set()
    raw = path.read_bytes()
    if raw and not raw.endswith(b"\n"):
        with atomic_write(path) as part:
            part.write_bytes(raw[: raw.rfind(b"\n") + 1])
    found = set()
    for where, row in json_lines(path, AnswersError):
        try:
            name, index, place = row["from"]
        except (KeyError, ValueError, TypeError):
            raise AnswersError(f'{where} lacks "from": the folder was written by another program') from None
        found.add((name, index, place))
    return found

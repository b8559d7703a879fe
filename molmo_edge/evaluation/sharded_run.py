"""An evaluation as JSON lines on disk, which can be interrupted, resumed and split into shards.

A run's folder holds `run.json` (what is evaluated), a file for each shard while the run goes on
(`SUITE.part-2-of-4.jsonl`), and `SUITE.jsonl` when all are answered. Its lines are in the suite's order and
contain no timings, so interruptions and shards do not change its bytes.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.evaluation.questions import Question, by_image
from molmo_edge.evaluation.stats import Estimate, score_mean
from molmo_edge.frontend.image_files import ImageError
from molmo_edge.molmo import Molmo, Scene
from molmo_edge.system.files import atomic_write, name_os_errors

RUN = "run.json"
Line = dict[str, Any]


class RunError(MolmoEdgeError):
    """A folder that belongs to another run, or lines that do not belong to this one."""


@dataclass(frozen=True)
class Shard:
    """One of several parts of a run."""

    number: int = 1  # 1 to `of`
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise RunError(f"shard {self.number}/{self.of} does not exist: shards are 1/N to N/N")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard of a text such as "2/4". Raises RunError."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal()):
            raise RunError(f'{text!r} is not a shard such as "2/4"')
        return cls(int(number), int(of))


def claim_folder(folder: Path, what: Line) -> None:
    """Make the folder, or check that it belongs to this run. Raises RunError if it has answers of another run.

    `what`: everything that changes an answer: model, suites, settings, threads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(what, indent=1, sort_keys=True) + "\n"
    mine = folder / f".{RUN}.{os.getpid()}"
    mine.write_text(text, encoding="utf-8")
    try:
        if not any(folder.glob("*.jsonl")):
            os.replace(mine, folder / RUN)  # shards that start together write the same
            return
        before = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(f"{folder} has answers but no valid {RUN}: choose another folder") from None
    finally:
        mine.unlink(missing_ok=True)
    if before != json.loads(text):
        changed = sorted(key for key in {*before, *what} if before.get(key) != what.get(key))
        differences = ", ".join(f"{key}: {before.get(key)!r} in the folder, {what.get(key)!r} now" for key in changed)
        raise RunError(f"{folder} holds another run ({differences}): choose another folder or remove this one")


def ask_shard(
    molmo: Molmo,
    questions: Sequence[Question],
    folder: Path,
    suite: str,
    shard: Shard = Shard(),
    on_answer: Callable[[], None] = lambda: None,
    on_skipped: Callable[[str], None] | None = None,
) -> None:
    """Ask the shard's questions that have no answer yet, and append a line for each.

    Images are distributed over the shards, not questions, so that each image is encoded once. If one cannot be read,
    the reason is passed to `on_skipped` and stored as the "error" of its questions, which the next run asks again;
    without `on_skipped` an ImageError is raised.
    """
    done = {name for name, line in _lines(folder, suite).items() if "error" not in json.loads(line)}
    groups = [group for i, group in enumerate(by_image(questions)) if i % shard.of == shard.number - 1]
    part = folder / f"{file_stem(suite)}.part-{shard.number}-of-{shard.of}.jsonl"
    if part.exists():
        os.truncate(part, len(_whole_lines(part)))
    with name_os_errors(part), part.open("a", encoding="utf-8") as file:
        for group in groups:
            left = [question for question in group if question.id not in done]
            scene, reason = None, ""
            try:
                scene = _scene(molmo, left[0]) if left else None
            except ImageError as error:
                if on_skipped is None:
                    raise
                reason = str(error)
                on_skipped(reason)
            for question in left:
                asked = {
                    "id": question.id,
                    "group": question.group,
                    "question": question.text,
                    "truth": question.truth,
                }
                line = {**asked, "error": reason} if scene is None else asked | _answered(molmo, scene, question)
                file.write(json.dumps(line, sort_keys=True) + "\n")
                file.flush()
                on_answer()


def _answered(molmo: Molmo, scene: Scene, question: Question) -> Line:
    answer = molmo.ask(scene, question.text, max_new_tokens=question.max_new_tokens)
    # With coordinates in place of grounding tokens, which say nothing without the image.
    text = answer.text if scene.grounding is None else scene.grounding.with_coordinates(answer.text)
    return {"answer": text, "complete": answer.complete, "scores": _rounded(question.score(text))}


def merge_shards(questions: Sequence[Question], folder: Path, suite: str) -> list[Line] | None:
    """Write `SUITE.jsonl` and return its lines, or return None while answers are missing.

    Raises RunError for answers to questions that the suite does not have.
    """
    lines = _lines(folder, suite)
    wanted = [question.id for question in questions]
    if foreign := lines.keys() - set(wanted):
        raise RunError(f"{folder} has answers to questions that {suite} does not have, such as {min(foreign)}")
    if any(name not in lines for name in wanted):
        return None
    whole = folder / f"{file_stem(suite)}.jsonl"
    with atomic_write(whole) as aside:
        aside.write_text("".join(lines[name] for name in wanted), encoding="utf-8")
    for part in _parts(folder, suite):
        part.unlink(missing_ok=True)
    return [json.loads(lines[name]) for name in wanted]


def count_answered(folder: Path, suite: str) -> int:
    """The number of answered questions, without those whose image could not be read."""
    return sum("error" not in json.loads(line) for line in _lines(folder, suite).values())


def average_scores(lines: Iterable[Line], questions: Sequence[Question]) -> dict[str, dict[str, Estimate]]:
    """{group: {score: mean over questions}}; without those whose image could not be read."""
    images = {question.id: question.image_id for question in questions}
    values: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for line in lines:
        for name, value in line.get("scores", {}).items():
            values.setdefault(line["group"], {}).setdefault(name, []).append((value, images[line["id"]]))
    return {
        group: {name: score_mean([v for v, _ in pairs], [i for _, i in pairs]) for name, pairs in scores.items()}
        for group, scores in values.items()
    }


def _lines(folder: Path, suite: str) -> dict[str, str]:
    """{question id: line}. An incomplete last line, of a process that was killed or is writing, is ignored."""
    found: dict[str, str] = {}
    errors: dict[str, str] = {}  # of images that could not be read; they may have been readable later
    whole = folder / f"{file_stem(suite)}.jsonl"
    for path in [*([whole] if whole.exists() else []), *_parts(folder, suite)]:
        for line in _whole_lines(path).decode("utf-8").splitlines(keepends=True):
            try:
                parsed = json.loads(line)
                if "error" in parsed:
                    errors.setdefault(parsed["id"], line)
                else:
                    found.setdefault(parsed["id"], line)
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path} has a line that is not an answer: {line[:60]!r}") from None
    return errors | found


def _whole_lines(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def _parts(folder: Path, suite: str) -> list[Path]:
    return sorted(folder.glob(f"{glob.escape(file_stem(suite))}.part-*-of-*.jsonl"))


def file_stem(suite: str) -> str:
    """The name of a suite's files: "photos:/data/mine" -> "photos-mine"."""
    kind, colon, where = suite.partition(":")
    return f"{kind}-{Path(where).resolve().name}" if colon else kind


def _scene(molmo: Molmo, question: Question) -> Scene:
    return molmo.engine.no_image() if question.words_alone else molmo.encode(question.image())


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in scores.items()}

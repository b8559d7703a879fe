"""Fewer image tokens against the F1 score of points, and seconds, for each way to choose them.

`python benchmarks/image_tokens.py [--model DIR] [--photos DIR] [--images 20] [--processes 1]` asks the pointing
questions about drawn scenes, or with --photos about the validation photos of a folder, with each share of the image
tokens. Every image goes through the vision tower once. It prints F1 with a 95 % interval, the paired difference from
all tokens, and the median milliseconds of the processor for the image's prefill and for a token; last, one line of
JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo_edge import Molmo
from molmo_edge.checkpoints.bundle import load_tokenizer, resolve_model
from molmo_edge.evaluation.questions import Question
from molmo_edge.evaluation.stats import mean
from molmo_edge.evaluation.suites import load_suite
from molmo_edge.runtimes import open_runtime
from molmo_edge.sdk.image_tokens import DEFAULT_SCORE, ImageTokens

ALL = ImageTokens(1.0)


class Remembering:
    """A runtime that keeps the features of the last image, because all choices of tokens share them."""

    def __init__(self, runtime: Any) -> None:
        self._runtime, self._kept = runtime, dict[str, tuple[Any, Any]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def encode_image(self, crops: np.ndarray, *rest: Any) -> np.ndarray:
        return self._remember("encode_image", crops, *rest)

    def encode_crops(self, crops: np.ndarray, *rest: Any) -> np.ndarray:
        return self._remember("encode_crops", crops, *rest)

    def _remember(self, name: str, crops: np.ndarray, *rest: Any) -> np.ndarray:
        before = self._kept.get(name)
        if before is None or not np.array_equal(before[0], crops):
            before = self._kept[name] = crops, getattr(self._runtime, name)(crops, *rest)
        features: np.ndarray = before[1]
        return features


def choices(shares: Sequence[float], scores: Sequence[str]) -> Iterator[ImageTokens]:
    yield ALL
    for share in shares:
        for score in scores:
            yield ImageTokens(share, score)
        yield ImageTokens(share, DEFAULT_SCORE, original_positions=False)


def by_image(suite: str, images: int) -> list[list[Question]]:
    """The pointing questions of a suite, by image."""
    groups: dict[str, list[Question]] = {}
    for question in load_suite(suite, limit=images):
        if question.kind == "point":
            groups.setdefault(question.image_id, []).append(question)
    return list(groups.values())


Row = tuple[str, float, float, float, int]  # image, F1, seconds of prefill and of a token, positions of the image


@dataclass(frozen=True)
class Part:
    """The images of one process."""

    model: str | None
    suite: str
    images: int
    tried: tuple[ImageTokens, ...]
    threads: int
    end: float  # time.time() after which no further image begins
    number: int
    of: int


def measure(part: Part) -> list[list[Row]]:
    """For each choice the rows of all questions. Each image is prefilled once.

    Seconds are the processor's, so that other programs do not count.
    """
    directory = resolve_model(part.model)
    runtime = Remembering(open_runtime(directory, threads=part.threads, gaps=True))
    molmos = [Molmo.from_parts(runtime, load_tokenizer(directory), image_tokens=choice) for choice in part.tried]
    found: list[list[Row]] = [[] for _ in part.tried]
    for questions in by_image(part.suite, part.images)[part.number :: part.of]:
        picture = questions[0].image()
        for molmo, rows in zip(molmos, found, strict=True):
            encoded = molmo.engine.scene(picture)
            scene, prefill = timed(functools.partial(molmo.engine.prefill, encoded, 512))
            for question in questions:
                asked = functools.partial(molmo.ask, scene, question.text, max_new_tokens=question.max_new_tokens)
                answer, decode = timed(asked)
                # With coordinates, as scores read them, also of a model that points by grounding tokens.
                text = answer.text if scene.grounding is None else scene.grounding.with_coordinates(answer.text)
                tokens, f1 = answer.usage.tokens, question.score(text)["f1"]
                rows.append((question.image_id, f1, prefill, decode / (1 + tokens.generated), tokens.image))
        print(".", end="", file=sys.stderr, flush=True)
        if time.time() > part.end:
            break
    return found


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the seconds of the processor."""
    began = time.process_time()
    result = run()
    return result, time.process_time() - began


def report(name: str, tried: Sequence[ImageTokens], found: Sequence[list[Row]]) -> list[Any]:
    images = [row[0] for row in found[0]]
    before = np.array([row[1] for row in found[0]])
    print(f"\n{name}: {len(images)} questions about {len(set(images))} images\n")
    print("| share | score | positions | image positions | F1 | difference | prefill, ms | a token, ms |")
    print("|--:|---|---|--:|--:|--:|--:|--:|")
    lines = []
    for choice, rows in zip(tried, found, strict=True):
        f1 = np.array([row[1] for row in rows])
        score, apart = mean(f1, images), mean(f1 - before, images)
        prefill, decode, kept = (statistics.median(row[i] for row in rows) for i in (2, 3, 4))
        line = {
            "share": choice.share,
            "score": choice.score if choice.share < 1 else "all",
            "positions": "original" if choice.original_positions else "counted anew",
            "image": kept,
            "f1": score.to_dict(),
            "difference": apart.to_dict(),
            "prefill": prefill,
            "decode": decode,
        }
        lines.append(line)
        print(
            f"| {choice.share:g} | {line['score']} | {line['positions']} | {kept:.0f} | {score.format(percent)} | "
            f"{'' if choice.share == 1 else apart.format(percent)} | {1e3 * prefill:.0f} | {1e3 * decode:.1f} |"
        )
    return lines


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=None, help="default: nano")
    parser.add_argument("--photos", default=None, help="a folder of annotated photos, of which the validation split")
    parser.add_argument(
        "--images", type=int, default=20, help="at most; those without a pointing question are left out"
    )
    parser.add_argument("--shares", default="0.75,0.5,0.35,0.25")
    parser.add_argument("--scores", default="distinct,spread,norm,random")
    parser.add_argument("--minutes", type=float, default=60, help="then no further image begins")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    tried = tuple(choices([float(share) for share in args.shares.split(",")], args.scores.split(",")))
    suite = "nano-val" if args.photos is None else f"photos:{args.photos}"
    end = time.time() + 60 * args.minutes
    parts = [
        Part(args.model, suite, args.images, tried, args.threads, end, number, args.processes)
        for number in range(args.processes)
    ]
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        measured = list(pool.map(measure, parts))
    print(file=sys.stderr)
    found = [[row for rows in some for row in rows] for some in zip(*measured, strict=True)]
    print(json.dumps(report(suite.partition(":")[0], tried, found)))


if __name__ == "__main__":
    main()

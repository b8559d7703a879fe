"""Verify a copy of a bundle: its files are unchanged, and it gives the same results as when it was exported.

Checksums of the stages (molmo_edge/sdk/stage_checksums.py) are compared one by one, then the answer. Processors round
differently, and where two ids are nearly tied (two digits of a coordinate, for example) rounding decides, and all
following ids differ. A different answer is therefore not necessarily an error: each id of the recorded answer must be
the most likely one on this machine, or nearly tied with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from molmo_edge.answer import Answer
from molmo_edge.checkpoints.bundle import Bundle, load_tokenizer, open_bundle
from molmo_edge.checkpoints.manifest import GRAPHS, MANIFEST, Check
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.molmo import Molmo
from molmo_edge.runtimes import open_runtime
from molmo_edge.runtimes.generate import GenerationError, likeliest
from molmo_edge.runtimes.prompt_embeddings import prefill
from molmo_edge.runtimes.protocol import Cache, Runtime
from molmo_edge.sdk.engine import Engine, check_text
from molmo_edge.sdk.stage_checksums import (
    VERSION,
    Part,
    array_sum,
    compare,
    layout_sum,
    logits_sum,
    pixels_sum,
    read_sums,
    settings_sum,
)

_MORE = 16  # tokens beyond the recorded ones, to detect an answer that does not stop there
# Gaps in logits that rounding explains; 0.09 was measured between two processors. An answer with other points needs
# the smaller gap: a near tie at the digit where it diverges.
_NEAR = 0.5
_TIE = 0.25


@dataclass(frozen=True)
class CheckReport:
    """The result of checking a bundle on this machine."""

    bundle: Bundle
    check: Check | None  # None: the bundle has no check, only its files were compared
    token_ids: tuple[int, ...] = ()  # of the answer on this machine
    drift: float | None = None  # percent of a side, the largest over the points; None if their number differs
    stopped: bool = True  # this answer stopped where the recorded one did
    gap: float | None = None  # logits: the largest gap of a recorded id to the most likely id; None if not needed
    parts: tuple[Part, ...] = ()  # stages in order, up to the first that differs; () without recorded checksums

    @property
    def different(self) -> Part | None:
        """The first stage that differs from the recording. Later stages and the answer were not compared."""
        return next((part for part in self.parts if not part.same), None)

    @property
    def exact(self) -> bool:
        """Whether the ids and the stop after them are as recorded."""
        return (
            self.check is not None
            and self.different is None
            and self.token_ids == self.check.token_ids
            and self.stopped
        )

    @property
    def same_points(self) -> bool:
        """Whether there are as many points as recorded, each within the check's tolerance."""
        return self.check is None or (self.drift is not None and self.drift <= self.check.tolerance)

    @property
    def passed(self) -> bool:
        """Whether all stages are as recorded, and rounding explains any difference between the ids.

        Equal ids must give the recorded points; other points need a near tie where the ids diverge. True for a bundle
        without a check: its files are intact, or `check_bundle` would have raised an error.
        """
        if self.check is None:
            return True
        if self.different is not None:
            return False
        if self.exact:
            return self.same_points
        return self.gap is not None and self.gap <= (_NEAR if self.same_points else _TIE)


def check_bundle(directory: str | Path, *, threads: int | None = None) -> CheckReport:
    """Compare all hashes and recorded checksums, then ask the bundle the question of its check.

    Raises BundleError for a damaged file or a changed manifest, and what `Molmo.ask` raises.
    """
    bundle = open_bundle(directory, hashes=True)
    check = bundle.check
    if check is None:
        return CheckReport(bundle, None)
    recorded = None if check.sums is None else read_sums(bundle.directory / MANIFEST, check.sums)
    tokenizer = load_tokenizer(bundle.directory)
    parts: list[Part] = []

    def as_recorded(name: str, find: Callable[[], Any]) -> bool:
        if recorded is not None:
            words = [bundle.components[graph].precision for graph in GRAPHS if name == "logits" or graph != "decoder"]
            parts.append(compare(name, recorded[name], find(), words))
        return all(part.same for part in parts)

    # Before an engine opens: settings that do not belong to the graphs can crash it.
    image = bundle.config.image
    sound = (
        as_recorded("settings", lambda: settings_sum(bundle.manifest.content))
        and as_recorded("layout", lambda: layout_sum(image, tokenizer, check.question))
        and as_recorded("pixels", lambda: pixels_sum(image, tokenizer.special))
    )
    if not sound:
        return CheckReport(bundle, check, parts=tuple(parts))
    runtime = _FirstLogits(open_runtime(bundle.directory, threads=threads))
    with Molmo.from_parts(cast("Runtime", runtime), tokenizer) as molmo:
        scene = molmo.engine.scene(bundle.directory / check.image.file)  # image and question run in one go, as in `ask`
        if not as_recorded("features", lambda: array_sum(scene.embeddings)):
            return CheckReport(bundle, check, parts=tuple(parts))
        most = len(check.token_ids) + (_MORE if check.complete else 0)
        answer = molmo.ask(scene, check.question, max_new_tokens=max(1, most))
        if not as_recorded("logits", lambda: logits_sum(runtime.first[: bundle.config.decoder.vocab_size])):
            return CheckReport(bundle, check, parts=tuple(parts))
        stopped, gap = answer.complete or not check.complete, None
        if answer.token_ids != check.token_ids or not stopped:
            gaps = logit_gaps(molmo.engine, scene, check.question, check.token_ids, complete=check.complete)
            gap = max(gaps, default=0.0)
    return CheckReport(bundle, check, answer.token_ids, _drift(answer, check), stopped, gap, tuple(parts))


def record_check(directory: str | Path, file: str, question: str, max_new_tokens: int) -> dict[str, Any]:
    """Ask a bundle, and record the answer and the checksums of all stages for `check_bundle`.

    `file`: the photo, relative to the bundle. Returns `question`, `token_ids`, `complete`, `points` and `sums` for
    the manifest's "check". Raises what `Molmo.ask` raises.
    """
    bundle = open_bundle(directory, hashes=False)
    tokenizer = load_tokenizer(bundle.directory)
    runtime = _FirstLogits(open_runtime(bundle.directory))
    with Molmo.from_parts(cast("Runtime", runtime), tokenizer) as molmo:
        scene = molmo.engine.scene(bundle.directory / file)
        answer = molmo.ask(scene, question, max_new_tokens=max_new_tokens)
    image = bundle.config.image
    return {
        "question": question,
        "token_ids": [int(i) for i in answer.token_ids],
        "complete": answer.complete,
        "points": [[float(np.round(p.x, 2)), float(np.round(p.y, 2))] for p in answer.points],
        "sums": {
            "version": VERSION,
            "settings": settings_sum(bundle.manifest.content),
            "layout": layout_sum(image, tokenizer, question),
            "pixels": pixels_sum(image, tokenizer.special),
            "features": array_sum(scene.embeddings),
            "logits": logits_sum(runtime.first[: bundle.config.decoder.vocab_size]),
        },
    }


def logit_gaps(
    engine: Engine, image: Any, question: str, token_ids: Sequence[int], *, complete: bool = True
) -> list[float]:
    """Return, for each id of a given answer, the gap in logits to the most likely id at its position (0.0: no gap).

    `complete`: include the stop token after the ids. Raises GenerationError for ids outside the vocabulary and for
    logits that are not finite.
    """
    scene = engine.scene(image)
    runtime, tokenizer = engine.runtime, engine.tokenizer
    size = engine.config.decoder.vocab_size if scene.grounding is None else scene.grounding.token_ids.end
    given = [*token_ids, tokenizer.special.eos] if complete else list(token_ids)
    if wrong := [token for token in given if not 0 <= token < size]:
        raise GenerationError(f"{wrong[0]} is not an id of this model (0 to {size - 1})")
    prompt = text_ids(tokenizer, [check_text(question)])
    rows = np.concatenate([scene.embeddings, runtime.embed(prompt)])
    cache: Any = runtime.new_cache(len(rows) + max(0, len(given) - 1))
    gaps: list[float] = []
    image, grounded = scene.image_flags(len(prompt)), None
    for token in given:  # the last id is compared with the logits and never fed back
        logits = prefill(runtime, rows, image, cache)
        if scene.grounding is None:
            graded = logits = logits[:size]
        else:  # another patch than the likeliest has the gap between these two
            grounded = grounded or scene.grounding.begin(cache.states)
            logits, graded = (grounded.logits(logits, cache.states[-1], patches) for patches in ("best", "graded"))
        gaps.append(float(logits[likeliest(logits)] - graded[token]))
        rows = runtime.embed(np.array([token])) if grounded is None else grounded.embed(token)
        image = np.zeros(1, bool)
    return gaps


def _drift(answer: Answer, check: Check) -> float | None:
    if len(answer.points) != len(check.points):
        return None
    pairs = zip(answer.points, check.points, strict=True)
    return max((max(abs(p.x - x), abs(p.y - y)) for p, (x, y) in pairs), default=0.0)


class _FirstLogits:
    """A runtime that keeps the logits of its first run: comparing them then needs no extra run."""

    def __init__(self, runtime: Runtime) -> None:
        self._inner = runtime
        self.first = np.empty(0, np.float32)  # [embedding_size]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        return self._keep(self._inner.forward(embeddings, cache))

    def prefill_image(self, embeddings: np.ndarray, image: np.ndarray, cache: Cache) -> np.ndarray:
        return self._keep(prefill(self._inner, embeddings, image, cache))

    def _keep(self, logits: np.ndarray) -> np.ndarray:
        if not self.first.size:
            self.first = logits
        return logits

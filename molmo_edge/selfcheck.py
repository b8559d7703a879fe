"""Is this copy of a bundle sound? Its files and its manifest are as written, and it computes what it computed then.

The sums of the check (molmo_edge/sdk/stage_checksums.py) are compared part by part, then the answer. Another
processor rounds
otherwise, and where a model hesitates, between two digits of a coordinate for one, a rounding decides, and all that
follows is another answer. So an answer that is not the same is not wrong yet: the recorded one is followed id by id,
and each has to be the likeliest here, or as good as that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.answer import Answer, Seconds
from molmo_edge.checkpoints.bundle import Bundle, load_tokenizer, open_bundle
from molmo_edge.checkpoints.manifest import GRAPHS, MANIFEST, Check
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.frontend.prompts import image_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.molmo import Molmo, Scene
from molmo_edge.runtimes import Cache, Runtime, open_runtime
from molmo_edge.runtimes.prompt_embeddings import image_embeddings
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

_MORE = 16  # tokens beyond the recorded ones, so that an answer that does not stop, or says it longer, is seen
# Logits behind the likeliest id that rounding accounts for; between two processors 0.09 was seen. Other points than
# recorded need the smaller one: a near tie at the digit where they part.
_NEAR = 0.5
_TIE = 0.25


@dataclass(frozen=True)
class CheckReport:
    bundle: Bundle
    check: Check | None  # None: the bundle brings no check, only its files were compared
    token_ids: tuple[int, ...] = ()  # as answered here
    drift: float | None = None  # percent of a side, the largest of all points; None where their number differs
    stopped: bool = True  # where the recorded answer did, this one did too
    gap: float | None = None  # logits, the farthest that a recorded id lies behind the likeliest; None where not needed
    parts: tuple[Part, ...] = ()  # in the order of the data, up to the first that differs; () without recorded sums

    @property
    def different(self) -> Part | None:
        """The part that is not as recorded. What comes after it was not looked at, the answer included."""
        return next((part for part in self.parts if not part.same), None)

    @property
    def exact(self) -> bool:
        """The very same ids, and the stop behind them."""
        return (
            self.check is not None
            and self.different is None
            and self.token_ids == self.check.token_ids
            and self.stopped
        )

    @property
    def same_points(self) -> bool:
        """As many points as recorded, each within the check's tolerance."""
        return self.check is None or (self.drift is not None and self.drift <= self.check.tolerance)

    @property
    def passed(self) -> bool:
        """Every part as recorded, and the same ids, or ids that rounding alone chose.

        The same ids have to give the recorded points, and other points need a near tie where the ids part. Without a
        check in the bundle: its files are sound, which `check_bundle` would have raised on.
        """
        if self.check is None:
            return True
        if self.different is not None:
            return False
        if self.exact:
            return self.same_points
        return self.gap is not None and self.gap <= (_NEAR if self.same_points else _TIE)


def check_bundle(directory: str | Path, *, threads: int | None = None) -> CheckReport:
    """Compare every hash and every recorded sum, then ask the bundle the question it brings.

    Raises BundleError for a damaged file or a manifest that was changed, and what `Molmo.ask` raises.
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

    # Before an engine opens: settings that are not the graphs' may end it in any way.
    image = bundle.config.image
    sound = (
        as_recorded("settings", lambda: settings_sum(bundle.manifest.content))
        and as_recorded("layout", lambda: layout_sum(image, tokenizer, check.question))
        and as_recorded("pixels", lambda: pixels_sum(image, tokenizer.special))
    )
    if not sound:
        return CheckReport(bundle, check, parts=tuple(parts))
    runtime = _Listener(open_runtime(bundle.directory, threads=threads))
    with Molmo.from_parts(runtime, tokenizer) as molmo:
        scene = _see(molmo, runtime, tokenizer, bundle.directory / check.image.file)
        if not as_recorded("features", lambda: array_sum(scene.embeddings)):
            return CheckReport(bundle, check, parts=tuple(parts))
        most = len(check.token_ids) + (_MORE if check.complete else 0)
        answer = molmo.ask(scene, check.question, max_new_tokens=max(1, most))
        if not as_recorded("logits", lambda: logits_sum(runtime.first[: bundle.config.decoder.vocab_size])):
            return CheckReport(bundle, check, parts=tuple(parts))
        stopped, gap = answer.complete or not check.complete, None
        if answer.token_ids != check.token_ids or not stopped:
            gap = max(molmo.gaps(scene, check.question, check.token_ids, complete=check.complete), default=0.0)
    return CheckReport(bundle, check, answer.token_ids, _drift(answer, check), stopped, gap, tuple(parts))


def record_check(directory: str | Path, file: str, question: str, max_new_tokens: int) -> dict[str, Any]:
    """Ask a bundle and note the answer, and the sums of every part, for `check_bundle` to compare.

    `file`: the photo, relative to the bundle. Returns `question`, `token_ids`, `complete`, `points` and `sums` of the
    manifest's "check". Raises what `Molmo.ask` raises.
    """
    bundle = open_bundle(directory, hashes=False)
    tokenizer = load_tokenizer(bundle.directory)
    runtime = _Listener(open_runtime(bundle.directory))
    with Molmo.from_parts(runtime, tokenizer) as molmo:
        scene = _see(molmo, runtime, tokenizer, bundle.directory / file)
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


def _see(molmo: Molmo, runtime: Runtime, tokenizer: Tokenizer, photo: Path) -> Scene:
    """The photo as `Molmo.ask` would see it, not prefilled: image and question then run in one go, as they do there."""
    rgb = load_image(photo)
    prepared = ImageProcessor(molmo.config.image, tokenizer.special)(rgb)
    embeddings = image_embeddings(runtime, prepared, image_ids(tokenizer, prepared))
    return Scene(rgb, len(prepared.crops), embeddings, Seconds(), None, molmo)


def _drift(answer: Answer, check: Check) -> float | None:
    if len(answer.points) != len(check.points):
        return None
    pairs: Iterator[Any] = zip(answer.points, check.points, strict=True)
    return max((max(abs(p.x - x), abs(p.y - y)) for p, (x, y) in pairs), default=0.0)


class _Listener:
    """A runtime that keeps the logits of its first run, so that they need no run of their own."""

    def __init__(self, runtime: Runtime) -> None:
        self._inner = runtime
        self.config = runtime.config
        self.encode_image, self.embed, self.new_cache = runtime.encode_image, runtime.embed, runtime.new_cache
        self.close = runtime.close
        self.first = np.empty(0, np.float32)  # [embedding_size]

    @property
    def engine(self) -> str:
        return self._inner.engine

    def forward(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        logits = self._inner.forward(embeddings, cache)
        if not self.first.size:
            self.first = logits
        return logits

"""Is this copy of a bundle sound? Its files are what the manifest says, and it answers what it answered when made.

Another processor rounds otherwise, and where a model hesitates, between two digits of a coordinate for one, a rounding
decides, and all that follows is another answer. So an answer that is not the same is not wrong yet: the recorded one
is followed id by id, and each has to be the likeliest here, or as good as that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from molmo_edge.bundle import Bundle, Check, open_bundle
from molmo_edge.molmo import Molmo

_MORE = 16  # tokens beyond the recorded ones, so that an answer that does not stop, or says it longer, is seen
_NEAR = 0.5  # logits behind the likeliest id that rounding accounts for; between two processors 0.09 was seen


@dataclass(frozen=True)
class CheckReport:
    bundle: Bundle
    check: Check | None  # None: the bundle brings no check, only its files were compared
    token_ids: tuple[int, ...] = ()  # as answered here
    drift: float | None = None  # percent of a side, the largest of all points; None where their number differs
    stopped: bool = True  # where the recorded answer did, this one did too
    gap: float | None = None  # logits, the farthest that a recorded id lies behind the likeliest; None where not needed

    @property
    def exact(self) -> bool:
        """The very same ids, and the stop behind them."""
        return self.check is not None and self.token_ids == self.check.token_ids and self.stopped

    @property
    def passed(self) -> bool:
        """The same ids, or ids that rounding alone chose.

        Without a check in the bundle: its files are sound, which `check_bundle` would have raised on.
        """
        return self.check is None or self.exact or (self.gap is not None and self.gap <= _NEAR)


def check_bundle(directory: str | Path, *, threads: int | None = None) -> CheckReport:
    """Compare every hash, then ask the bundle the question it brings. Raises BundleError for a damaged file."""
    bundle = open_bundle(directory, hashes=True)
    check = bundle.check
    if check is None:
        return CheckReport(bundle, None)
    image = bundle.directory / check.image.file
    with Molmo(bundle.directory, threads=threads) as molmo:
        most = len(check.token_ids) + (_MORE if check.complete else 0)
        answer = molmo.ask(image, check.question, max_new_tokens=max(1, most))
        stopped, gap = answer.complete or not check.complete, None
        if answer.token_ids != check.token_ids or not stopped:
            gap = max(molmo.gaps(image, check.question, check.token_ids, complete=check.complete), default=0.0)
    drift = None
    if len(answer.points) == len(check.points):
        pairs = zip(answer.points, check.points, strict=True)
        drift = max((max(abs(p.x - x), abs(p.y - y)) for p, (x, y) in pairs), default=0.0)
    return CheckReport(bundle, check, answer.token_ids, drift, stopped, gap)

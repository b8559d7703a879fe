"""Every data set of Molmo's two stages by its name, from one folder of copies or from the hub.

A folder DATA holds DATA/NAME for each set that is there as a copy or was drawn, in any form that `load_rows` takes, and
DATA/images with what PixMo's addresses gave. Sets of one hub repository can share a copy: DATA/pixmo-points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from molmo_edge.data.academic import ACADEMIC, open_academic
from molmo_edge.data.downloads import Counts, Manifest, fetch_images
from molmo_edge.data.examples import DataSet
from molmo_edge.data.mixture import Group
from molmo_edge.data.pixmo import PIXMO, open_pixmo, pointing_eval_urls, wanted_images
from molmo_edge.errors import MolmoEdgeError

IMAGES = "images"
_EVAL = "pixmo-points-eval"


class CatalogError(MolmoEdgeError):
    """Data sets that are not there, or not known."""


def known() -> list[str]:
    return sorted([*PIXMO, *ACADEMIC])


def copy_of(name: str, data: Path) -> Path | None:
    """The folder with the copy of a set, or None."""
    hub = PIXMO[name].hub_id if name in PIXMO else ""
    places = [data / name, *([data / hub.rpartition("/")[2]] if hub else [])]
    return next((place for place in places if place.is_dir()), None)


def open_sets(names: Iterable[str], data: Path, *, split: str = "train", hub: bool = False) -> list[DataSet]:
    """The sets in the order of `names`. hub: those without a copy in `data` come from there.

    Raises CatalogError that names all that are not known, or missing, and what to do.
    """
    names = list(names)
    if unknown := [name for name in names if name not in PIXMO and name not in ACADEMIC]:
        raise CatalogError(f"{', '.join(unknown)} are not known as data sets; known are {', '.join(known())}")
    missing = [name for name in names if copy_of(name, data) is None]
    if missing and not hub:
        raise CatalogError(
            f"{data} has no copies of {', '.join(missing)}: name fewer with --sets, draw or copy them there, or let "
            "--hub fetch them"
        )
    manifest = Manifest.load(data / IMAGES)
    held_out = _of_the_evaluation(names, data, hub)
    opened: list[DataSet] = []
    for name in names:
        if name in PIXMO:
            copy = copy_of(name, data)
            opened.append(open_pixmo(name, split=split, local=copy, images=manifest, held_out=held_out))
        else:
            opened.append(open_academic(name, split=split, local=copy_of(name, data)))
    return opened


def _of_the_evaluation(names: Sequence[str], data: Path, hub: bool) -> frozenset[str]:
    """Pictures that pointing is judged by, where any of `names` could hold them."""
    copy = data / _EVAL
    if copy.is_dir():
        return pointing_eval_urls(copy)
    from_hub = hub and any(name.startswith("pixmo_points") and copy_of(name, data) is None for name in names)
    return pointing_eval_urls(None) if from_hub else frozenset()


def in_mixture(mixture: Sequence[Group]) -> list[str]:
    """Names of a mixture's sets, each once."""
    return list(dict.fromkeys(name for group in mixture for name in group.sizes))


def at_hand(mixture: Sequence[Group], data: Path) -> list[str]:
    """Those of a mixture's sets that `data` has copies of."""
    return [name for name in in_mixture(mixture) if copy_of(name, data) is not None]


def fetch_pictures(
    names: Iterable[str], data: Path, *, jobs: int, retry_failed: bool, progress: Callable[[Counts], None] | None
) -> Manifest:
    """Fetch what PixMo's rows name by address into DATA/images; goes on where it was stopped. Raises CatalogError."""
    names = list(names)
    if unknown := [name for name in names if name not in PIXMO]:
        raise CatalogError(f"{', '.join(unknown)} have no pictures to fetch; of PixMo there are {', '.join(PIXMO)}")
    wanted = (each for name in names for each in wanted_images(name, local=copy_of(name, data)))
    return fetch_images(wanted, data / IMAGES, jobs=jobs, retry_failed=retry_failed, progress=progress)

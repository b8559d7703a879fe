"""The data sets of Molmo's two training stages by name, from a folder of copies or from the hub.

The folder DATA has DATA/NAME for each copied or drawn set, in any layout that `load_rows` accepts, and DATA/images with
the downloaded pictures of PixMo. Sets of one hub repository can share a copy, such as DATA/pixmo-points.
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
    """A data set is unknown or missing."""


def known() -> list[str]:
    """Names of all data sets."""
    return sorted([*PIXMO, *ACADEMIC])


def copy_of(name: str, data: Path) -> Path | None:
    """The folder with a copy of the set, or None."""
    hub = PIXMO[name].hub_id if name in PIXMO else ""
    places = [data / name, *([data / hub.rpartition("/")[2]] if hub else [])]
    return next((place for place in places if place.is_dir()), None)


def open_sets(names: Iterable[str], data: Path, *, split: str = "train", hub: bool = False) -> list[DataSet]:
    """Open the sets `names`, in that order. `hub`: download sets without a copy in `data`.

    Raises CatalogError with all unknown or missing names.
    """
    names = list(names)
    if unknown := [name for name in names if name not in PIXMO and name not in ACADEMIC]:
        raise CatalogError(f"unknown data sets: {', '.join(unknown)} (known: {', '.join(known())})")
    missing = [name for name in names if copy_of(name, data) is None]
    if missing and not hub:
        raise CatalogError(
            f"{data} has no copies of {', '.join(missing)}: exclude them with --sets, draw or copy them there, or "
            "download them with --hub"
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
    """URLs of the pictures of the pointing benchmark, if any of `names` may contain them."""
    copy = data / _EVAL
    if copy.is_dir():
        return pointing_eval_urls(copy)
    from_hub = hub and any(name.startswith("pixmo_points") and copy_of(name, data) is None for name in names)
    return pointing_eval_urls(None) if from_hub else frozenset()


def in_mixture(mixture: Sequence[Group]) -> list[str]:
    """Names of a mixture's sets, without repetition."""
    return list(dict.fromkeys(name for group in mixture for name in group.sizes))


def at_hand(mixture: Sequence[Group], data: Path) -> list[str]:
    """Names of a mixture's sets that have a copy in `data`."""
    return [name for name in in_mixture(mixture) if copy_of(name, data) is not None]


def fetch_pictures(
    names: Iterable[str], data: Path, *, jobs: int, retry_failed: bool, progress: Callable[[Counts], None] | None
) -> Manifest:
    """Download the pictures of PixMo sets into DATA/images. Calling it again resumes. Raises CatalogError."""
    names = list(names)
    if unknown := [name for name in names if name not in PIXMO]:
        raise CatalogError(f"{', '.join(unknown)} have no pictures to download (PixMo sets: {', '.join(PIXMO)})")
    wanted = (each for name in names for each in wanted_images(name, local=copy_of(name, data)))
    return fetch_images(wanted, data / IMAGES, jobs=jobs, retry_failed=retry_failed, progress=progress)

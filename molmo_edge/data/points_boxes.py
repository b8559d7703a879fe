"""Points folders in COCO and LabelMe format: the point of an annotation is the middle of its box or outline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molmo_edge.data.json_files import read_json
from molmo_edge.data.points_records import Frame, PictureRecord, PointsError, Records, number, shown
from molmo_edge.sdk.readable_text import counted

Corners = Sequence[tuple[float, float]]

_COCO_LISTS = ("categories", "images", "annotations")
_LABELME = ("shapes", "imagePath")
# LabelMe's shapes with a single position, and the points that each requires. A circle's second point is on its rim. A
# mask has two corners of its box, and stores its pixels separately.
_PLACED = {"point": 1, "rectangle": 2, "oriented_rectangle": 3, "polygon": 3, "circle": 2, "mask": 2}
_BY_FIRST_POINT = ("point", "circle")


# --- COCO -------------------------------------------------------------------------------------------------------------


def read_coco(path: Path, records: Records) -> None:
    """Add the points of a COCO file to `records`; crowds are marked as uncountable. Raises PointsError."""
    content, where = read_json(path, PointsError), str(path)
    try:
        categories, images, annotations = (
            _list(content[name], name) for name in ("categories", "images", "annotations")
        )
        labels: dict[Any, str] = {}
        for place, each in enumerate(categories):
            where = _called("category", each, place, path)
            _once(labels, each["id"], where)
            labels[each["id"]] = each["name"]
        pictures: dict[Any, tuple[PictureRecord, Frame | str]] = {}
        for place, each in enumerate(images):
            where = _called("image", each, place, path)
            _once(pictures, each["id"], where)
            picture = records.picture(each["file_name"], where)
            pictures[each["id"]] = picture, records.frame(picture, each.get("width"), each.get("height"), where)
        for place, each in enumerate(annotations):
            where = _called("annotation", each, place, path)
            (picture, frame), label = pictures[each["image_id"]], labels[each["category_id"]]
            crowd = each.get("iscrowd")
            if crowd not in (None, 0, 1):
                raise PointsError(f"{where}: iscrowd is {shown(crowd)}, neither 0 nor 1")
            if crowd:  # too many to tell apart: the label can be neither counted nor called absent
                records.crowd(picture, label, where)
                continue
            corners = _coco_corners(each, where)
            records.add(picture, label, _middle(corners, where), frame, where, tuple(corners))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PointsError(
            f"{where} does not follow the COCO format, {error!r}: is a list too short, or an id unknown?"
        ) from None


def _called(kind: str, each: Any, place: int, path: Path) -> str:
    """The place of an item for messages: its id, or its index in the list."""
    id = each.get("id") if isinstance(each, dict) else None
    return f"{kind} {place + 1} in the list of {path}" if id is None else f"{kind} {shown(id)} of {path}"


def _once(known: dict[Any, Any], id: Any, where: str) -> None:
    if id in known:
        raise PointsError(f"{where} has the same id as another one: make ids unique")


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is not a list")
    return value


def _coco_corners(each: dict[str, Any], where: str) -> Corners:
    """The corners of an annotation's box, or its outline, or its visible key points."""
    if box := each.get("bbox"):
        x, y, width, height = (number(value, where, "bbox") for value in _list(box, "bbox"))
        if width < 0 or height < 0:
            raise PointsError(f"{where} has a box of {width:g} x {height:g} pixels: a bbox is x, y, width, height")
        return [(x, y), (x + width, y + height)]
    outline = each.get("segmentation")
    if isinstance(outline, list) and outline:
        parts = [[number(value, where, "segmentation") for value in _list(part, "segmentation")] for part in outline]
        return [pair for part in parts for pair in zip(part[::2], part[1::2], strict=True)]
    keys = [number(value, where, "keypoints") for value in _list(each.get("keypoints") or [], "keypoints")]
    return [(x, y) for x, y, seen in zip(keys[::3], keys[1::3], keys[2::3], strict=True) if seen]


# --- LabelMe ----------------------------------------------------------------------------------------------------------


def is_labelme(path: Path, *, whole: bool) -> bool:
    """Whether a .json file is LabelMe's: whether it has both of its keys, or unless `whole`, at least one."""
    content = read_json(path, PointsError)
    return isinstance(content, dict) and (all if whole else any)(key in content for key in _LABELME)


def read_labelme(path: Path, records: Records) -> None:
    """Add the points of a LabelMe file to `records`; shapes without a position are skipped. Raises PointsError."""
    content = read_json(path, PointsError)
    picture = records.picture(content.get("imagePath"), str(path), beside=path.parent)
    frame = records.frame(picture, content.get("imageWidth"), content.get("imageHeight"), str(path))
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        raise PointsError(f'{path} does not follow the LabelMe format: it needs a list "shapes"')
    for place, shape in enumerate(shapes, 1):
        where = f"shape {place} of {path}"
        try:
            label, kind = shape["label"], shape.get("shape_type") or "polygon"
            corners = [
                (number(x, where, "x"), number(y, where, "y"))
                for x, y in (_list(pair, "a point") for pair in _list(shape["points"], "points"))
            ]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise PointsError(f"{where} does not follow the LabelMe format: it needs a label and points") from None
        if not isinstance(kind, str) or kind not in _PLACED:
            kind = f'"{kind}"' if isinstance(kind, str) and kind.isprintable() else shown(kind)
            records.skip(picture, label, where, f"is a {kind}, which has no single position")
            continue
        if len(corners) < _PLACED[kind]:
            raise PointsError(f'{where} is a "{kind}" with {counted(len(corners), "point")}: it needs {_PLACED[kind]}')
        placed = corners[:1] if kind in _BY_FIRST_POINT else corners
        records.add(picture, label, _middle(placed, where), frame, where, (kind, *corners))


def _middle(corners: Corners, where: str) -> tuple[float, float]:
    """The middle of the box around `corners`."""
    xs, ys = ([corner[axis] for corner in corners] for axis in (0, 1))
    if not xs:
        raise PointsError(f"{where} has neither a box nor an outline nor points")
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2

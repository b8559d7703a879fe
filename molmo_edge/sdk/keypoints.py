"""Points in the forms of other tools: COCO keypoints, and `supervision.KeyPoints`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_edge.frontend.points import Point

if TYPE_CHECKING:
    import supervision

_KEYPOINT = "point"  # COCO's name of the only keypoint of each category
_VISIBLE = 2


@dataclass(frozen=True)
class PointedPicture:
    """One picture of a data set, its size in pixels, and its points."""

    file_name: str
    width: int
    height: int
    points: tuple[Point, ...]


def coco_keypoints(pictures: Sequence[PointedPicture]) -> dict[str, Any]:
    """Return the points as a COCO keypoints data set, ready for JSON.

    Each point is an annotation with one keypoint, [x, y, 2] in pixels from the top left. Each label is a category.
    A point has no extent: its `bbox` is [x, y, 0, 0], and its `area` 0. All ids begin at 1.
    """
    labels = list(dict.fromkeys(point.label for picture in pictures for point in picture.points))
    categories = {label: number for number, label in enumerate(labels, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, 1):
        images.append({"id": number, "file_name": picture.file_name, "width": picture.width, "height": picture.height})
        for point in picture.points:
            x, y = (round(value, 2) for value in point.pixel(picture.width, picture.height))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": categories[point.label],
                    "keypoints": [x, y, _VISIBLE],
                    "num_keypoints": 1,
                    "bbox": [x, y, 0.0, 0.0],
                    "area": 0.0,
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": "Points of molmo-edge"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": label, "supercategory": "", "keypoints": [_KEYPOINT], "skeleton": []}
            for label, number in categories.items()
        ],
    }


def supervision_keypoints(picture: PointedPicture) -> supervision.KeyPoints:
    """Return the points as `supervision.KeyPoints`: n objects with one keypoint each, `xy` float32 [n, 1, 2] in pixels.

    `class_id` numbers the labels from 0 in order of appearance; `data["class_name"]` has the labels. Raises
    MissingExtra if supervision is not installed.
    """
    from molmo_edge.system.extras import with_extra

    return with_extra(_supervision_keypoints, "to_supervision")(picture)


def _supervision_keypoints(picture: PointedPicture) -> supervision.KeyPoints:
    from supervision import KeyPoints

    if not picture.points:
        return KeyPoints.empty()
    labels = list(dict.fromkeys(point.label for point in picture.points))
    xy = [[point.pixel(picture.width, picture.height)] for point in picture.points]
    return KeyPoints(
        xy=np.array(xy, np.float32),
        class_id=np.array([labels.index(point.label) for point in picture.points]),
        data={"class_name": np.array([point.label for point in picture.points])},
    )

"""Pixels in a points folder refer to the displayed picture, however its file is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo_edge.data.points_folder import PointsError, open_points
from molmo_edge.frontend.image_files import load_image

Box = tuple[float, float, float, float]  # left, top, right, bottom: pixels

# By EXIF orientation: what a viewer does to the stored pixels, and what the camera did to the scene.
SHOW: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.T[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}
STORE = {**SHOW, 6: SHOW[8], 8: SHOW[6]}
WIDTH, HEIGHT, SPOT = 80, 40, (32.0, 14.0, 44.0, 22.0)  # of the scene; its middle is at (38, 18)
KINDS = ("csv", "coco", "rectangle", "polygon", "circle", "mask", "point", "oriented_rectangle")


def save_turned(path: Path, orientation: int) -> None:
    scene = np.zeros((HEIGHT, WIDTH), np.uint8)
    left, top, right, bottom = map(int, SPOT)
    scene[top:bottom, left:right] = 255
    image = Image.fromarray(np.ascontiguousarray(STORE[orientation](scene)))
    if path.suffix == ".tif":
        image.save(path, tiffinfo={0x0112: orientation})
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.convert("RGB").save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))


def seen_at(path: Path) -> tuple[float, float]:
    """The middle of the bright spot, percent of the model's view."""
    rows, columns = np.nonzero(load_image(path)[:, :, 0] > 128)
    height, width = load_image(path).shape[:2]
    return 100 * (columns.mean() + 0.5) / width, 100 * (rows.mean() + 0.5) / height


def annotate(folder: Path, name: str, kind: str, box: Box, size: tuple[int, int] | None) -> None:
    left, top, right, bottom = box
    middle = [(left + right) / 2, (top + bottom) / 2]
    corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
    sides = dict(zip(("width", "height"), size, strict=True)) if size else {}
    if kind == "csv":
        (folder / "points.csv").write_text(f"image,label,x,y\n{name},spot,{middle[0]},{middle[1]}\n")
    elif kind == "coco":
        content = {
            "categories": [{"id": 1, "name": "spot"}],
            "images": [{"id": 1, "file_name": name, **sides}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [left, top, right - left, bottom - top]}
            ],
        }
        (folder / "annotations.json").write_text(json.dumps(content))
    else:
        points = {
            "rectangle": [corners[0], corners[2]],
            "mask": [corners[0], corners[2]],
            "circle": [middle, corners[0]],
            "point": [middle],
        }.get(kind, corners)
        shape = {"label": "spot", "shape_type": kind, "points": points}
        declared = {"imageWidth": size[0], "imageHeight": size[1]} if size else {}
        (folder / "spot.json").write_text(json.dumps({"imagePath": name, "shapes": [shape], **declared}))


def found(folder: Path) -> tuple[float, float]:
    train, _ = open_points(folder, validation=0)
    ((point,),) = train.pictures[0].points.values()
    return point


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".tif", ".jpg", ".png", ".webp"])
def test_a_point_is_where_the_picture_shows_it(tmp_path: Path, suffix: str, kind: str) -> None:
    for orientation in SHOW:
        path = tmp_path / f"spot{suffix}"
        save_turned(path, orientation)
        assert load_image(path).shape[:2] == (HEIGHT, WIDTH)
        for size in ((WIDTH, HEIGHT), None, (2 * WIDTH, 2 * HEIGHT)):
            scale = size[0] / WIDTH if size and kind != "csv" else 1
            annotate(tmp_path, path.name, kind, tuple(scale * v for v in SPOT), size)  # type: ignore[arg-type]
            assert found(tmp_path) == (47.5, 45.0) == seen_at(path), (orientation, size)


@pytest.mark.parametrize("suffix", [".tif", ".jpg", ".png", ".webp"])
def test_pixels_of_the_stored_picture_are_refused_where_they_differ(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"spot{suffix}"
    for orientation in (5, 6, 7, 8):
        save_turned(path, orientation)
        for kind in ("coco", "rectangle"):
            annotate(tmp_path, path.name, kind, (1, 1, 3, 3), (HEIGHT, WIDTH))
            with pytest.raises(PointsError, match=r"40 x 80 pixels, but spot\.\w+ is displayed with 80 x 40"):
                open_points(tmp_path)
            for file in tmp_path.glob("*.json"):
                file.unlink()
        (tmp_path / "points.csv").write_text(f"image,label,x,y\n{path.name},spot,3,60\n")
        with pytest.raises(PointsError, match=r"outside of spot\.\w+, 80 x 40 pixels: it is at 3 and 60 pixels"):
            open_points(tmp_path)
        (tmp_path / "points.csv").unlink()


def test_percent_and_questions_need_no_size_but_a_whole_picture(tmp_path: Path) -> None:
    save_turned(tmp_path / "spot.tif", 6)
    (tmp_path / "points.csv").write_text("image,label,x_percent,y_percent\nspot.tif,spot,47.5,45\n")
    assert found(tmp_path) == (47.5, 45.0)
    data = (tmp_path / "spot.tif").read_bytes()
    (tmp_path / "spot.tif").write_bytes(data[: len(data) // 2])
    with pytest.raises(PointsError, match=r"1 of the 1 pictures .*: spot\.tif cannot be read"):
        open_points(tmp_path)

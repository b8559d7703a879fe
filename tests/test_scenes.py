"""Drawn scenes and augmented photographs: annotations match the pixels."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from molmo_edge.data.annotated_photos import PhotoError, augment, crop_annotation, load_photos
from molmo_edge.data.drawn import scenes
from molmo_edge.data.drawn.backdrops import draw_backdrop
from molmo_edge.data.drawn.clocks import draw_dial
from molmo_edge.data.drawn.fonts import FontError, find_scene_fonts
from molmo_edge.data.drawn.rendered_words import draw_text
from molmo_edge.data.drawn.scenes import APART, KINDS, SceneError, draw_scene
from molmo_edge.data.drawn.sprite_names import BROADER, overlapping, sprite_sources
from molmo_edge.data.drawn.sprites import AssetError, Assets, Background, build_assets, load_sprites
from molmo_edge.evaluation.annotated_pictures import embedded_scenes

NAMES = ("bird", "owl", "cat", "cup", "ring", "clock", "shoe", "pizza")


def disc(hole: bool = False) -> Image.Image:
    """White and opaque; with a hole, a ring."""
    image = Image.new("RGBA", (90, 60))
    draw = ImageDraw.Draw(image)
    draw.ellipse((0, 0, 89, 59), fill=(255, 255, 255, 255))
    if hole:
        draw.ellipse((20, 14, 69, 45), fill=(0, 0, 0, 0))
    return image


@pytest.fixture(scope="module")
def assets() -> Assets:
    return Assets({name: (disc(hole=name == "ring"), disc()) for name in NAMES})


def on_black(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scenes, "draw_backdrop", lambda _rng, _backgrounds, size: (Image.new("RGB", size), "plain", frozenset())
    )


def pixels(box: list[float], width: int, height: int) -> tuple[int, int, int, int]:
    return tuple(round(v * (width, height)[i % 2] / 100) for i, v in enumerate(box))  # type: ignore[return-value]


def test_the_same_seed_draws_the_same_scene(assets: Assets) -> None:
    first, second = (draw_scene(np.random.default_rng(7), assets) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert first[1] == second[1]
    other = draw_scene(np.random.default_rng(8), assets)
    assert first[1] != other[1]


@pytest.mark.parametrize("kind", KINDS)
def test_annotations_are_complete_and_in_range(assets: Assets, kind: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        rgb, annotation = draw_scene(rng, assets, kind)
        assert rgb.dtype == np.uint8
        assert rgb.shape == (annotation["height"], annotation["width"], 3)
        assert min(rgb.shape[:2]) >= 256
        assert max(rgb.shape[:2]) <= 640
        assert annotation["objects"] or annotation["texts"] or annotation["clocks"]
        json.dumps(annotation)  # plain Python numbers only
        labels = [o["label"] for o in annotation["objects"]]
        assert len(labels) == len(set(labels))
        for item in annotation["objects"]:
            assert len(item["boxes"]) == len(item["points"]) > 0
            for box, point in zip(item["boxes"], item["points"], strict=True):
                assert 0 <= box[0] <= point[0] <= box[2] <= 100
                assert 0 <= box[1] <= point[1] <= box[3] <= 100
        for item in annotation["texts"] + annotation["clocks"]:
            assert 0 <= item["box"][0] < item["box"][2] <= 100
            assert 0 <= item["box"][1] < item["box"][3] <= 100


def test_boxes_and_points_are_where_the_pixels_are(assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    on_black(monkeypatch)
    rng = np.random.default_rng(2)
    for _ in range(40):
        rgb, annotation = draw_scene(rng, assets, "sprites")
        height, width = rgb.shape[:2]
        drawn = rgb.max(-1) > 90  # sprites are white, dimmed to 178 at most; the edges are soft
        boxed = np.zeros_like(drawn)
        for item in annotation["objects"]:
            for box, point in zip(item["boxes"], item["points"], strict=True):
                x0, y0, x1, y1 = pixels(box, width, height)
                boxed[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = True
                # Tight: something is drawn within three pixels of each side.
                assert drawn[y0 : y0 + 3, x0:x1].any()
                assert drawn[y1 - 3 : y1, x0:x1].any()
                assert drawn[y0:y1, x0 : x0 + 3].any()
                assert drawn[y0:y1, x1 - 3 : x1].any()
                x, y = round(point[0] * width / 100), round(point[1] * height / 100)
                assert drawn[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any(), "a point beside its object"
        assert not (drawn & ~boxed).any()


def test_little_of_an_object_is_hidden(assets: Assets) -> None:
    rng = np.random.default_rng(3)
    worst = 0.0
    for _ in range(60):
        _, annotation = draw_scene(rng, assets, "mixed")
        boxes = [b for o in annotation["objects"] for b in o["boxes"]]
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
                worst = max(worst, shared / min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)))
        for text in annotation["texts"]:
            t = text["box"]
            for b in boxes:
                overlap = min(t[2], b[2]) - max(t[0], b[0]), min(t[3], b[3]) - max(t[1], b[1])
                assert min(overlap) <= 0.11, "text must stay readable"  # 0.11: both boxes are rounded
    assert 0.05 < worst <= scenes.HIDDEN + 0.01


@pytest.mark.parametrize("kind", APART)
def test_objects_to_count_are_whole_and_unchanged(assets: Assets, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_black(monkeypatch)
    rng = np.random.default_rng(10)
    most = []
    for _ in range(20):
        rgb, annotation = draw_scene(rng, assets, kind)
        assert min(rgb.shape[:2]) >= 256
        assert max(rgb.shape[:2]) <= 800
        items = [pair for o in annotation["objects"] for pair in zip(o["boxes"], o["points"], strict=True)]
        most.append(max(len(o["boxes"]) for o in annotation["objects"]))
        for i, (a, point) in enumerate(items):
            x, y = (int(v * side / 100) for v, side in zip(point, rgb.shape[1::-1], strict=True))
            assert tuple(rgb[y, x]) == (255, 255, 255)
            for b, _ in items[:i]:
                assert a[0] > b[2] or b[0] > a[2] or a[1] > b[3] or b[1] > a[3], "two objects overlap or touch"
    assert max(most) > 4 if kind == "many" else max(most) <= 4


def test_neither_what_the_backdrop_shows_nor_a_broader_name_is_drawn(assets: Assets) -> None:
    photo = Background(
        np.full((60, 80, 3), 120, np.uint8), ((0, 0, 100, 100),), ("cat",), frozenset({"shoe", "clock", "ring"})
    )
    with_photo = Assets(assets.sprites, (photo,))
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(150):
        _, annotation = draw_scene(rng, with_photo)
        labels = {o["label"] for o in annotation["objects"]}
        assert not {"bird", "owl"} <= labels
        if annotation["backdrop"] == "photo":
            seen |= labels
            assert annotation["maybe_present"] == ["cat", "clock", "ring", "shoe"]
            assert not labels & {"cat", "shoe", "clock", "ring"}
            assert not annotation["clocks"]
    assert seen == {"bird", "owl", "cup", "pizza"}


def test_a_crop_of_a_photo_avoids_what_is_labelled() -> None:
    """Nearly every crop can exclude a label in a corner, and then it is not in maybe_present."""
    photo = Background(np.zeros((100, 100, 3), np.uint8), ((0, 0, 10, 10),), ("cat",))
    rng = np.random.default_rng(5)
    drawn = [draw_backdrop(rng, (photo,), (300, 300)) for _ in range(200)]
    free = [not maybe for _, kind, maybe in drawn if kind == "photo"]
    assert len(free) > 50
    assert np.mean(free) > 0.9


def test_the_embedded_scenes_stay_the_same() -> None:
    """The scores of nano-val are for these scenes. Their ids are hashes of their annotations."""
    ids = [picture.id.removeprefix("scenes/") for picture in embedded_scenes(6)]
    assert ids == ["88474f63", "5cc6790f", "5a75593a", "bfef5e68", "e0e6a767", "46e682e8"]


def test_unknown_kinds_and_empty_assets_are_refused(assets: Assets) -> None:
    with pytest.raises(SceneError, match="known: sprites, words, clocks, mixed, few, many"):
        draw_scene(np.random.default_rng(0), assets, "maps")
    with pytest.raises(AssetError, match="no sprites"):
        Assets({})


def test_clock_hands_show_the_time() -> None:
    rng = np.random.default_rng(6)
    times = set()
    for _ in range(80):
        picture, time = draw_dial(rng, (), 240)
        hour, minute = (int(part) for part in time.split(":"))
        assert 1 <= hour <= 12
        assert minute % 5 == 0
        assert len(time.split(":")[1]) == 2
        times.add(time)
        rgb = np.asarray(picture.convert("RGB"), int)

        def ink_at(turn: float, radius: float, rgb: np.ndarray = rgb) -> bool:
            """Whether there is a pixel in the colour of the hub, which is also that of the hands."""
            x = 120 + radius * 120 * math.sin(2 * math.pi * turn)
            y = 120 - radius * 120 * math.cos(2 * math.pi * turn)
            near = rgb[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].reshape(-1, 3)
            return bool((np.abs(near - rgb[120, 120]).max(1) < 40).any())

        assert ink_at(minute / 60, 0.56)  # past the end of the hour hand
        assert ink_at((hour + minute / 60) / 12, 0.36)
        # Apart from a second hand, the dial is empty elsewhere at this radius, so the minute is readable.
        assert sum(ink_at(i / 12, 0.56) for i in range(12)) <= 3
    assert len(times) > 50


def test_text_fits_and_is_drawn() -> None:
    rng = np.random.default_rng(7)
    for text in ("wide words that must shrink", "7", "EXIT"):
        for _ in range(10):
            picture = draw_text(rng, (), text, 60, 200)
            assert picture.width <= 200
            colours = np.unique(np.asarray(picture)[np.asarray(picture.getchannel("A")) == 255].reshape(-1, 4), axis=0)
            light = colours[:, :3] @ [0.299, 0.587, 0.114]
            assert light.max() - light.min() >= 100, "ink and paper must differ"


# --- assets -----------------------------------------------------------------------------------------------------


def webp_package(path: Path, codes: set[str]) -> Path:
    """Like @lobehub/fluent-emoji-3d: every picture a disc with a transparent margin."""
    image = Image.new("RGBA", (120, 100))
    image.paste(disc(), (10, 20))
    data = io.BytesIO()
    image.save(data, "webp", lossless=True)
    with tarfile.open(path, "w:gz") as tar:
        for code in sorted(codes):
            info = tarfile.TarInfo(f"package/assets/{code}.webp")
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
    return path


def test_assets_are_built_and_loaded(tmp_path: Path) -> None:
    sources = sprite_sources()
    package = webp_package(tmp_path / "fluent.tgz", {code for codes, _ in sources.values() for code in codes})
    with pytest.raises(AssetError, match=r'"donkey" has no picture'):
        build_assets(package, None, tmp_path / "without-stamps")
    stamps = tmp_path / "stamps"
    for _, paths in sources.values():
        for path in paths:
            (stamps / path).parent.mkdir(parents=True, exist_ok=True)
            disc().save(stamps / f"{path}.png")
    # "dogs/dog" must find .../animals/dogs/dog.png, but a second one of that name is an error.
    (stamps / "old/dogs").mkdir(parents=True)
    disc().save(stamps / "old/dogs/dog.png")
    with pytest.raises(AssetError, match=r"2 stamps called dogs/dog\.png"):
        build_assets(package, stamps, tmp_path / "ambiguous")
    (stamps / "old/dogs/dog.png").unlink()

    index = build_assets(package, stamps, tmp_path / "out")
    assert list(index) == list(sources)
    train, val = load_sprites(tmp_path / "out"), load_sprites(tmp_path / "out", "val")
    assert set(train) == set(sources)
    assert set(val) == {n for n, (a, b) in sources.items() if len(a) + len(b) >= 4}
    assert train["dog"][0].size == (90, 60), "cropped to what is visible"
    assert not set(index["dog"]["train"]) & set(index["dog"]["val"])
    assert max(load_sprites(tmp_path / "out", max_side=45)["dog"][0].size) == 45


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no index\.json"):
        load_sprites(tmp_path)
    with pytest.raises(FontError, match="none of the fonts"):
        find_scene_fonts(tmp_path)
    with pytest.raises(PhotoError, match=r"annotations\.jsonl is missing"):
        load_photos(tmp_path, "train")
    (tmp_path / "annotations.jsonl").write_text('{"image": "a.jpg", "split": "train"}\n{"image"\n')
    with pytest.raises(PhotoError, match="line 2"):
        load_photos(tmp_path, "train")


def test_overlapping_names_are_symmetric() -> None:
    for broad, narrow in BROADER.items():
        for name in narrow:
            assert name in overlapping(broad)
            assert broad in overlapping(name)


# --- photographs ------------------------------------------------------------------------------------------------


def test_augmented_boxes_follow_the_pixels() -> None:
    rng = np.random.default_rng(8)
    rgb = np.full((200, 300, 3), 60, np.uint8)
    rgb[40:100, 90:180] = 220
    annotation: dict[str, Any] = {
        "source": "coco",
        "width": 300,
        "height": 200,
        "captions": ["A bright box."],
        "objects": [{"label": "box", "boxes": [[30.0, 20.0, 60.0, 50.0]], "points": [[45.0, 35.0]]}],
    }
    kept = cut = 0
    for _ in range(300):
        out, changed = augment(rgb, annotation, rng)
        assert out.shape == (changed["height"], changed["width"], 3)
        bright = out.max(-1) > (int(out.min()) + int(out.max())) // 2 if out.min() != out.max() else out.max(-1) < 0
        (item,) = changed["objects"]
        if not item["boxes"]:
            cut += 1
            # Never absent while a part is visible.
            assert item.get("crowd") or not bright.any()
            continue
        kept += 1
        ys, xs = np.nonzero(bright)
        scale = np.array([100 / out.shape[1], 100 / out.shape[0]] * 2)
        seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * scale
        assert np.abs(seen - item["boxes"][0]).max() < 0.2
        x, y = np.array(item["points"][0]) / scale[:2]
        assert bright[min(int(y), out.shape[0] - 1), min(int(x), out.shape[1] - 1)]
    assert kept > 200
    assert cut > 3
    assert annotation["objects"][0]["boxes"] == [[30.0, 20.0, 60.0, 50.0]], "the input is left alone"


def test_crops_mark_what_they_cut() -> None:
    annotation = {
        "source": "coco",
        "captions": ["Two cups."],
        "objects": [{"label": "cup", "boxes": [[0, 0, 10, 10], [45, 0, 65, 10]], "points": [[5, 5], [64, 5]]}],
        "texts": [{"text": "in", "box": [0, 20, 10, 30]}, {"text": "cut", "box": [50, 20, 70, 30]}],
    }
    out = crop_annotation(annotation, (0, 0, 60, 100), flip=False)
    (cups,) = out["objects"]
    assert cups["boxes"] == [[0, 0, 16.7, 10], [75, 0, 100, 10]]
    assert cups["points"] == [[8.3, 5], [87.5, 5.0]], "a centroid that was cut off becomes the box's centre"
    assert "crowd" not in cups
    assert "captions" not in out
    assert [t["text"] for t in out["texts"]] == ["in"]
    assert out["texts_cut"]
    out = crop_annotation(annotation, (0, 0, 50, 100), flip=False)
    assert out["objects"][0]["boxes"] == [[0, 0, 20, 10]]
    assert out["objects"][0]["crowd"]
    out = crop_annotation(annotation, (0, 0, 100, 100), flip=True)
    assert out["objects"][0]["boxes"] == [[90, 0, 100, 10], [35, 0, 55, 10]]
    assert out["captions"] == ["Two cups."]
    assert not out["texts_cut"]


@pytest.mark.parametrize(("source", "flips"), [("coco", True), ("cards", False), ("road_signs", False)])
def test_signs_and_cards_are_never_mirrored(source: str, flips: bool) -> None:
    rgb = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (50, 1, 3))  # brighter to the right
    rng = np.random.default_rng(9)
    mirrored = [out[0, 0, 0] > out[0, -1, 0] for out, _ in (augment(rgb, {"source": source}, rng) for _ in range(60))]
    assert any(mirrored) == flips

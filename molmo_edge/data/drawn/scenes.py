"""Drawn scenes with exact annotations: named sprites, words and clocks on backdrops.

Annotations have the format of the annotated photographs (see `draw_scene`). Unlike those, they name every object.
The suite nano-val draws its scenes here. A change to the order of the random draws changes its pictures and scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from molmo_edge.data.annotated_photos import Annotation
from molmo_edge.data.drawn.backdrops import draw_backdrop
from molmo_edge.data.drawn.clocks import draw_dial
from molmo_edge.data.drawn.rendered_words import draw_text, random_text
from molmo_edge.data.drawn.sprite_names import overlapping
from molmo_edge.data.drawn.sprites import Assets
from molmo_edge.data.regions import area, shared_area
from molmo_edge.errors import MolmoEdgeError

Box = tuple[int, int, int, int]  # x0, y0, x1, y1, pixels
Wanted = list[tuple[str, Image.Image]]  # a name and one of its sprites, for each object to place

KINDS = {"sprites": 0.68, "words": 0.12, "clocks": 0.06, "mixed": 0.14}  # how often draw_scene picks each
APART = ("few", "many")  # kinds without occlusion, shadows or changes of colour, for pointing and counting
MAX_OBJECTS = 10
MAX_APART = 40
HIDDEN = 0.25  # largest share of an object's box that other objects may cover
TRIES = 24  # places tried before an object is drawn smaller or left out
_GAP = 3  # pixels between the objects of a scene in APART


class SceneError(MolmoEdgeError):
    """An unknown kind of scene."""


@dataclass
class _Canvas:
    """The picture so far, and the boxes in it."""

    image: Image.Image
    taken: list[Box] = field(default_factory=list)
    covered: list[float] = field(default_factory=list)  # pixels of each taken box under later ones; inf: keep clear
    objects: dict[str, list[tuple[Box, tuple[float, float]]]] = field(default_factory=dict)
    texts: list[tuple[str, Box]] = field(default_factory=list)
    clocks: list[tuple[str, Box]] = field(default_factory=list)

    @property
    def side(self) -> int:
        return min(self.image.size)


def draw_scene(rng: np.random.Generator, assets: Assets, kind: str | None = None) -> tuple[np.ndarray, Annotation]:
    """Draw a random scene.

    Args:
        kind: one of KINDS or APART; None draws one of KINDS. "few": 1 to 6 names, up to 4 objects of each. "many": 4
            to 20 objects of the first name.

    Returns:
        rgb: uint8 [h, w, 3]. Sides are 256 to 640 pixels, of APART up to 800.
        annotation: all coordinates in percent with one decimal.
            objects: [{"label", "boxes": [[x0, y0, x1, y1]], "points": [[x, y]]}]. Points are on the objects.
            texts: [{"text", "box"}] from top to bottom. clocks: [{"time": "3:25", "box"}], each also an object.
            maybe_present: labels that the backdrop may show, so that neither counts nor absence are known.
            backdrop: "photo", "plain", "gradient" or "noise". source: "scene". width, height: pixels.

    Raises SceneError for an unknown kind.
    """
    if kind is None:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    elif kind not in KINDS and kind not in APART:
        raise SceneError(f'"{kind}" is not a kind of scene (known: {", ".join((*KINDS, *APART))})')
    apart = kind in APART
    size = _random_size(rng, 1.25 if apart else 1.0)
    backdrop, backdrop_kind, maybe_present = draw_backdrop(rng, assets.backgrounds, size)
    canvas = _Canvas(backdrop)
    # A dial is labelled "clock": the backdrop must not show another clock.
    if (kind == "clocks" or (kind == "mixed" and rng.random() < 0.35)) and "clock" not in maybe_present:
        _place_clock(rng, assets, canvas, (0.4, 0.9) if kind == "clocks" else (0.3, 0.45))
    if kind in ("words", "mixed"):
        for _ in range(int(rng.integers(1, 5 if kind == "words" else 3))):
            _place_text(rng, assets, canvas, large=kind == "words")
    if apart:
        _place_sprites(rng, canvas, _choose_apart(rng, assets, canvas, maybe_present, kind == "many"), apart=True)
    elif kind in ("sprites", "mixed") or not (canvas.texts or canvas.clocks):
        wanted = _choose(rng, assets, canvas, maybe_present, MAX_OBJECTS if kind == "sprites" else 4)
        _place_sprites(rng, canvas, wanted, apart=False)
    return np.asarray(canvas.image), _annotate(canvas, backdrop_kind, maybe_present)


def _random_size(rng: np.random.Generator, scale: float) -> tuple[int, int]:
    aspect = float(np.exp(rng.uniform(-1, 1) * np.log(16 / 9 if rng.random() < 0.2 else 4 / 3)))
    longest = float(rng.uniform(320, 640)) * scale
    width, height = (longest, longest / aspect) if aspect >= 1 else (longest * aspect, longest)
    return max(256, round(width)), max(256, round(height))


# --- sprites ----------------------------------------------------------------------------------------------------


def _choose(
    rng: np.random.Generator, assets: Assets, canvas: _Canvas, maybe_present: frozenset[str], most: int
) -> Wanted:
    """1 to 5 names, mostly one or two objects of each."""
    banned = set(maybe_present) | set(canvas.objects)
    wanted: Wanted = []
    names_left = int(rng.choice([1, 2, 3, 4, 5], p=[0.28, 0.3, 0.22, 0.12, 0.08]))
    for index in rng.permutation(len(assets.names)):
        name = assets.names[index]
        if name in banned:
            continue
        if not names_left or len(wanted) >= most:
            break
        names_left -= 1
        banned |= {name} | overlapping(name)
        pictures = assets.sprites[name]
        first = pictures[int(rng.integers(len(pictures)))]
        same = rng.random() < 0.5
        for _ in range(int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.48, 0.19, 0.13, 0.09, 0.06, 0.05]))):
            wanted.append((name, first if same else pictures[int(rng.integers(len(pictures)))]))
    return wanted[:most]


def _choose_apart(
    rng: np.random.Generator, assets: Assets, canvas: _Canvas, maybe_present: frozenset[str], many: bool
) -> Wanted:
    """1 to 6 names; some share their noun with the last ("red star", "blue star"), so that both words matter."""
    banned = set(maybe_present)
    free = [name for name in assets.names if name not in banned]
    ground = np.asarray(canvas.image.resize((8, 8), Image.Resampling.BOX), np.float32).reshape(-1, 3)  # [64, 3]
    free = [name for name in free if _stands_out(ground, assets.flat.get(name))] or free
    wanted: Wanted = []
    for i in range(int(rng.integers(1, 7))):
        free = [name for name in free if name not in banned]
        if not free:
            break
        akin = [name for name in free if wanted and name.rpartition(" ")[2] == wanted[-1][0].rpartition(" ")[2]]
        choice = akin if akin and rng.random() < 0.3 else free
        name = choice[int(rng.integers(len(choice)))]
        banned |= {name} | overlapping(name)
        amount = int(rng.integers(4, 21) if many and i == 0 else rng.integers(1, 5))
        pictures = assets.sprites[name]
        wanted += [(name, pictures[int(rng.integers(len(pictures)))]) for _ in range(amount)]
    return wanted[:MAX_APART]


def _stands_out(ground: np.ndarray, colour: tuple[int, int, int] | None) -> bool:
    """Whether `colour` differs from all colours of `ground`, [n, 3]; None: a sprite of several colours."""
    return colour is None or bool(np.linalg.norm(ground - np.array(colour), axis=1).min() > 90)


def _place_sprites(rng: np.random.Generator, canvas: _Canvas, wanted: Wanted, apart: bool) -> None:
    # Many objects must be smaller to fit: the side that n equal squares could have, with room between them.
    largest = min(0.45, 0.85 / np.sqrt(max(len(wanted), 1)))
    for i in rng.permutation(len(wanted)):
        if apart:
            size = rng.uniform(0.5 * largest, largest)
        else:
            small = rng.random() < 0.25
            size = rng.uniform(0.10, 0.2) if small else rng.uniform(min(0.2, 0.7 * largest), largest)
        name, picture = wanted[i]
        _place_sprite(rng, canvas, name, picture, int(size * canvas.side), apart)


def _place_sprite(
    rng: np.random.Generator, canvas: _Canvas, name: str, picture: Image.Image, side: int, apart: bool
) -> None:
    """Paste a varied sprite at a free place. Where there is none, try three quarters of the size, then give up."""
    for shrink in (1.0, 0.75):
        sprite = _vary(rng, picture, max(24 if apart else 20, int(side * shrink)), lit=not apart)
        box = _find_place(rng, canvas, sprite.size, *((0.0, _GAP) if apart else (HIDDEN, 0)))
        if box is not None:
            if not apart and rng.random() < 0.3:
                _cast_shadow(canvas.image, sprite, box)
            canvas.image.paste(sprite, box[:2], sprite)
            _take(canvas, box)
            point = _point_inside(sprite) if apart else _nearest_to_centre(np.asarray(sprite.getchannel("A")) > 128)
            canvas.objects.setdefault(name, []).append((box, (box[0] + point[0], box[1] + point[1])))
            return


def _vary(rng: np.random.Generator, picture: Image.Image, side: int, lit: bool) -> Image.Image:
    """RGBA, longest side about `side`: often mirrored, turned by up to 15 degrees; if `lit`, brighter or darker."""
    scale = side / max(picture.size)
    size = (max(4, round(picture.width * scale)), max(4, round(picture.height * scale)))
    sprite = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        sprite = sprite.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR, expand=True)
        sprite = sprite.crop(sprite.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox())
    if lit and rng.random() < 0.7:
        alpha = sprite.getchannel("A")
        sprite = ImageEnhance.Brightness(sprite.convert("RGB")).enhance(float(rng.uniform(0.7, 1.25)))
        sprite.putalpha(alpha)
    return sprite


def _cast_shadow(image: Image.Image, sprite: Image.Image, box: Box) -> None:
    alpha = sprite.getchannel("A").filter(ImageFilter.BoxBlur(2)).point(lambda a: a * 2 // 5)
    drop = max(2, sprite.height // 24)
    image.paste((0, 0, 0), (box[0] + drop // 2, box[1] + drop), alpha)


def _point_inside(sprite: Image.Image) -> tuple[float, float]:
    """A point up to two pixels inside the edge, so that rounding to 0.1 % leaves it on the object."""
    opaque = np.asarray(sprite.getchannel("A")) > 250  # [h, w]
    inside = opaque
    for shift in (1, 2):
        smaller = inside.copy()
        for step in (-shift, shift):
            smaller &= np.roll(opaque, step, 0) & np.roll(opaque, step, 1)
        inside = smaller if smaller.any() else inside
    x, y = _nearest_to_centre(inside)
    return x + 0.5, y + 0.5


def _nearest_to_centre(mask: np.ndarray) -> tuple[int, int]:
    """The true pixel nearest to the centre: the centre of a ring is a hole."""
    centre_y, centre_x = mask.shape[0] // 2, mask.shape[1] // 2
    if mask[centre_y, centre_x] or not mask.any():
        return centre_x, centre_y
    ys, xs = np.nonzero(mask)
    nearest = int(np.argmin((ys - centre_y) ** 2 + (xs - centre_x) ** 2))
    return int(xs[nearest]), int(ys[nearest])


# --- words and clocks -------------------------------------------------------------------------------------------


def _place_text(rng: np.random.Generator, assets: Assets, canvas: _Canvas, large: bool) -> None:
    height = int(canvas.side * rng.uniform(0.06, 0.2 if large else 0.12))
    for shrink in (1.0, 0.6):
        picture = draw_text(
            rng, assets.fonts, text := random_text(rng), max(12, int(height * shrink)), int(canvas.image.width * 0.9)
        )
        if rng.random() < 0.2:
            picture = picture.rotate(float(rng.uniform(-6, 6)), Image.Resampling.BICUBIC, expand=True)
        box = _find_place(rng, canvas, picture.size, 0.0)
        if box is not None:
            canvas.image.paste(picture, box[:2], picture)
            _take(canvas, box, keep_clear=True)
            canvas.texts.append((text, box))
            return


def _place_clock(rng: np.random.Generator, assets: Assets, canvas: _Canvas, sizes: tuple[float, float]) -> None:
    picture, time = draw_dial(rng, assets.fonts, int(canvas.side * rng.uniform(*sizes)))
    box = _find_place(rng, canvas, picture.size, 0.0)
    if box is not None:
        canvas.image.paste(picture, box[:2], picture)
        _take(canvas, box, keep_clear=True)
        canvas.clocks.append((time, box))
        canvas.objects["clock"] = [(box, ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2))]


# --- placing ----------------------------------------------------------------------------------------------------


def _find_place(
    rng: np.random.Generator, canvas: _Canvas, size: tuple[int, int], hidden: float, gap: int = 0
) -> Box | None:
    """A random box of `size`, or None after TRIES.

    It covers at most the share `hidden` of every box below it, and stays `gap` pixels away from those it does not.
    """
    room_x, room_y = canvas.image.width - size[0], canvas.image.height - size[1]
    if room_x < 0 or room_y < 0:
        return None
    for _ in range(TRIES):
        x, y = int(rng.integers(room_x + 1)), int(rng.integers(room_y + 1))
        box = (x, y, x + size[0], y + size[1])
        grown = (x - gap, y - gap, x + size[0] + gap, y + size[1] + gap)
        if all(_fits(grown, old, used, hidden) for old, used in zip(canvas.taken, canvas.covered, strict=True)):
            return box
    return None


def _fits(box: Box, old: Box, used: float, hidden: float) -> bool:
    overlap = shared_area(box, old)
    # A small object on a large one hides little of it, but looks like a part of it.
    smaller = min(area(box), area(old))
    return overlap == 0 or (used + overlap <= hidden * area(old) and overlap <= hidden * smaller)


def _take(canvas: _Canvas, box: Box, keep_clear: bool = False) -> None:
    for i, old in enumerate(canvas.taken):
        canvas.covered[i] += shared_area(box, old)
    canvas.taken.append(box)
    canvas.covered.append(float("inf") if keep_clear else 0.0)


# --- annotation -------------------------------------------------------------------------------------------------


def _annotate(canvas: _Canvas, backdrop: str, maybe_present: frozenset[str]) -> Annotation:
    width, height = canvas.image.size
    scale = (100 / width, 100 / height)

    def percent(*pixels: float) -> list[float]:
        return [round(p * scale[i % 2], 1) for i, p in enumerate(pixels)]

    objects = [
        {
            "label": label,
            "boxes": [percent(*box) for box, _ in found],
            "points": [percent(*point) for _, point in found],
        }
        for label, found in canvas.objects.items()
    ]
    return {
        "source": "scene",
        "width": width,
        "height": height,
        "backdrop": backdrop,
        "objects": objects,
        "texts": [{"text": t, "box": percent(*box)} for t, box in sorted(canvas.texts, key=lambda t: t[1][1])],
        "clocks": [{"time": t, "box": percent(*box)} for t, box in canvas.clocks],
        "maybe_present": sorted(maybe_present),
    }

"""Sprites, backgrounds and fonts of drawn scenes: built once from packages, then loaded into memory.

Sources (rendered into training images, not distributed):
  npm @lobehub/fluent-emoji-3d 1.1.0 (MIT), npm @iconify-json/fluent-emoji-flat (MIT), @iconify-json/noto
  (Apache-2.0), @iconify-json/twemoji (CC BY 4.0), Debian tuxpaint-stamps-default (GPL-2); backgrounds from the
  scikit-image wheel's data folder (BSD, CC0) and from annotated photographs, which have licences of their own.

    python -m molmo_edge.data.drawn.sprites --fluent-3d A.tgz --iconify noto.tgz --iconify twemoji.tgz \
        --stamps usr/share/tuxpaint/stamps --out sprites
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from molmo_edge.data.annotated_photos import Photo
from molmo_edge.data.drawn.colours import Colour
from molmo_edge.data.drawn.fonts import find_scene_fonts
from molmo_edge.data.drawn.sprite_names import CLOTHES, UNLABELLED_IN_PHOTOS, sprite_sources
from molmo_edge.errors import MolmoEdgeError

SPRITE_SIDE = 256  # longest side of a stored sprite, pixels
ALPHA_EDGE = 24  # alpha below this is anti-aliasing or shadow, not the object
TEXTURES = ("brick", "grass", "gravel", "skin", "ihc")  # of scikit-image: they show none of the named objects


class AssetError(MolmoEdgeError):
    """An asset folder or package is incomplete."""


@dataclass(frozen=True)
class Background:
    """A photograph to draw on. Labels in `maybe_present` are neither drawn on it nor asked about."""

    rgb: np.ndarray  # uint8 [h, w, 3]
    boxes: tuple[tuple[float, float, float, float], ...] = ()  # x0, y0, x1, y1, percent
    labels: tuple[str, ...] = ()  # parallel to boxes
    maybe_present: frozenset[str] = frozenset()  # in any crop


@dataclass(frozen=True)
class Assets:
    """All that `draw_scene` needs, decoded."""

    sprites: Mapping[str, tuple[Image.Image, ...]]  # RGBA, cropped to what is visible
    backgrounds: tuple[Background, ...] = ()
    fonts: tuple[Path, ...] = ()
    flat: Mapping[str, Colour] = field(default_factory=dict)  # colours of plain sprites: used where they stand out
    names: tuple[str, ...] = field(init=False)  # of sprites, sorted

    def __post_init__(self) -> None:
        if not self.sprites:
            raise AssetError("there are no sprites: build them with `python -m molmo_edge.data.drawn.sprites`")
        object.__setattr__(self, "names", tuple(sorted(self.sprites)))


# --- building ---------------------------------------------------------------------------------------------------


def build_assets(
    fluent_tgz: str | Path, stamps_dir: str | Path | None, out_dir: str | Path, iconify_tgzs: Sequence[str | Path] = ()
) -> dict[str, dict[str, list[str]]]:
    """Write `out_dir`/NAME/STYLE-KEY.png and `out_dir`/index.json; returns the index.

    The index is {name: {"train": [files], "val": [files]}} with paths relative to `out_dir`. Names with four pictures
    or more have their last one in "val". Pictures that the packages lack are skipped. `iconify_tgzs` (SVG sets) need
    resvg-py. Raises AssetError for a name without any picture.
    """
    out = Path(out_dir)
    emoji_sets = [_read_webp_set(Path(fluent_tgz))] + [_read_iconify(Path(p)) for p in iconify_tgzs]
    index: dict[str, dict[str, list[str]]] = {}
    for name, (codes, stamps) in sprite_sources().items():
        pictures = [(f"{style}-{code}", pics[code]) for code in codes for style, pics in emoji_sets if code in pics]
        if stamps_dir is not None:
            pictures += [(f"stamp-{Path(s).stem}", _find_stamp(Path(stamps_dir), s).read_bytes()) for s in stamps]
        files = []
        for stem, data in pictures:
            file = f"{name.replace(' ', '_')}/{stem}.png"
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            _tight(_decode(data)).save(out / file)
            files.append(file)
        if not files:
            raise AssetError(f'"{name}" has no picture in the given packages: pass --stamps or another emoji set')
        held = 1 if len(files) >= 4 else 0
        index[name] = {"train": files[: len(files) - held], "val": files[len(files) - held :]}
    (out / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return index


def _read_webp_set(path: Path) -> tuple[str, dict[str, bytes]]:
    """("fluent3d", {code point: webp bytes}) of the @lobehub/fluent-emoji-3d package."""
    pictures = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None and member.name.endswith(".webp"):
                pictures[Path(member.name).stem.removesuffix("-fe0f")] = file.read()
    return "fluent3d", pictures


def _read_iconify(path: Path) -> tuple[str, dict[str, bytes]]:
    """(prefix, {code point: SVG bytes}) of an @iconify-json package of an emoji set."""
    with tarfile.open(path) as tar:
        chars, icons = (json.load(tar.extractfile(f"package/{n}.json")) for n in ("chars", "icons"))  # type: ignore[arg-type]
    side = icons.get("width", icons.get("height", 16))
    pictures = {}
    for code, key in chars.items():
        icon = icons["icons"].get(key)
        if icon is not None:
            width, height = icon.get("width", side), icon.get("height", icons.get("height", side))
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            pictures[code.removesuffix("-fe0f")] = svg.encode()
    return icons["prefix"], pictures


def _find_stamp(root: Path, path: str) -> Path:
    found = [p for p in root.rglob(f"{Path(path).name}.png") if p.parent.as_posix().endswith(str(Path(path).parent))]
    if len(found) != 1:
        raise AssetError(f"{root} has {len(found)} stamps called {path}.png, expected one: is it the stamps folder?")
    return found[0]


def _decode(data: bytes) -> Image.Image:
    if data.startswith(b"<svg"):
        import resvg_py  # needed for SVG sets only

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=SPRITE_SIDE))
    return Image.open(io.BytesIO(data)).convert("RGBA")


def _tight(image: Image.Image) -> Image.Image:
    """Crop to the visible part, and reduce the longest side to SPRITE_SIDE at most."""
    box = image.getchannel("A").point(lambda a: 255 if a >= ALPHA_EDGE else 0).getbbox()
    if box is None:
        raise AssetError("a picture is fully transparent: the package may be damaged")
    image = image.crop(box)
    image.thumbnail((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)
    return image


# --- loading ----------------------------------------------------------------------------------------------------


def load_sprites(folder: str | Path, split: str = "train", max_side: int = 160) -> dict[str, tuple[Image.Image, ...]]:
    """{name: RGBA pictures} of a built folder; names without a picture in the split are omitted.

    The pictures of "val" are not in "train". Raises AssetError if the folder has no index.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssetError(
            f"{folder} has no index.json: build it with `python -m molmo_edge.data.drawn.sprites`"
        ) from None
    sprites = {}
    for name, splits in index.items():
        if splits[split]:
            sprites[name] = tuple(_load_sprite(folder / file, max_side) for file in splits[split])
    return sprites


def _load_sprite(path: Path, max_side: int) -> Image.Image:
    with Image.open(path) as image:
        sprite = image.convert("RGBA")
    sprite.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return sprite


def load_textures(skimage_data: str | Path, max_side: int = 384) -> list[Background]:
    """Textures of scikit-image's data folder that show none of the named objects."""
    paths = sorted(p for p in Path(skimage_data).iterdir() if p.stem in TEXTURES)
    return [Background(_small_rgb(path, max_side)) for path in paths]


def load_photo_backgrounds(photos: Iterable[Photo], max_side: int = 384) -> list[Background]:
    """Backgrounds from COCO and clothing photographs; other sources are skipped.

    `maybe_present` holds crowds, what COCO photos may show without a label, and for clothing photos all garments.
    """
    backgrounds = []
    for photo in photos:
        annotation = photo.annotation
        if annotation["source"] == "clothing":
            maybe = CLOTHES | UNLABELLED_IN_PHOTOS
            backgrounds.append(Background(_small_rgb(photo.path, max_side), maybe_present=maybe))
        elif annotation["source"] == "coco" and "objects" in annotation:
            objects = annotation["objects"]
            pairs = [(tuple(box), o["label"]) for o in objects for box in o["boxes"]]
            crowds = frozenset(o["label"] for o in objects if o.get("crowd"))
            backgrounds.append(
                Background(
                    _small_rgb(photo.path, max_side),
                    tuple(box for box, _ in pairs),
                    tuple(label for _, label in pairs),
                    crowds | UNLABELLED_IN_PHOTOS,
                )
            )
    return backgrounds


def _small_rgb(path: Path, max_side: int) -> np.ndarray:
    with Image.open(path) as image:
        image.draft("RGB", (max_side, max_side))
        rgb = ImageOps.exif_transpose(image).convert("RGB")  # boxes refer to the picture as it is shown
    rgb.thumbnail((max_side, max_side), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def load_assets(
    sprites: str | Path,
    *,
    split: str = "train",
    photos: Iterable[Photo] = (),
    skimage_data: str | Path | None = None,
    fonts: str | Path = "/usr/share/fonts",
    max_side: int = 160,
) -> Assets:
    """All assets of `draw_scene`, in memory: about 0.2 GB with all sprites and the photo pack."""
    backgrounds = load_photo_backgrounds(photos)
    if skimage_data is not None:
        backgrounds += load_textures(skimage_data)
    return Assets(load_sprites(sprites, split, max_side), tuple(backgrounds), find_scene_fonts(fonts))


def main(argv: Sequence[str] | None = None) -> None:
    """Build the sprites from the packages that `argv` names; None: the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m molmo_edge.data.drawn.sprites", description="Build the sprites.")
    parser.add_argument("--fluent-3d", type=Path, required=True, help="@lobehub/fluent-emoji-3d .tgz")
    parser.add_argument("--iconify", type=Path, action="append", default=[], help="an @iconify-json .tgz (repeatable)")
    parser.add_argument("--stamps", type=Path, help="usr/share/tuxpaint/stamps of tuxpaint-stamps-default")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    index = build_assets(args.fluent_3d, args.stamps, args.out, args.iconify)
    files = sum(len(files) for splits in index.values() for files in splits.values())
    print(f"{len(index)} names, {files} pictures in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Frozen vision features on disk, so that a laptop can train a decoder.

One `.npz` a picture: the ViT's patch features (float16), masks, token layout, and the annotation. A run that
was stopped goes on where it was: pictures already there are skipped, and picture i depends on i alone.

`python -m molmo_edge.training.features --checkpoint START --sprites DIR --photos DIR --out DIR`
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from molmo_edge.data.annotated_photos import Photo, augment, load_photos
from molmo_edge.data.drawn.scenes import draw_scene
from molmo_edge.data.drawn.sprites import Assets, load_assets
from molmo_edge.frontend.crops import ImageProcessor, PreparedImage, load_image
from molmo_edge.modeling import Molmo, load_checkpoint
from molmo_edge.system.log import shown, steps_log
from molmo_edge.training.workers import Loader

Picture = tuple[np.ndarray, dict[str, Any]]  # rgb uint8 [h, w, 3] and its annotation


@dataclass(frozen=True)
class Sample:
    """One cached picture."""

    features: np.ndarray  # float16 [n_crops, patches^2, feature_dim]
    masks: np.ndarray  # float32 [n_crops, patches^2]
    tokens: np.ndarray  # int32 [n], without BOS
    token_index: np.ndarray  # int32 [n_crops, cells^2]
    tiling: tuple[int, int]  # rows, columns of crops
    annotation: dict[str, Any]


def read_sample(path: str | Path) -> Sample:
    with np.load(path) as data:
        annotation = json.loads(data["annotation"].tobytes())
        rows, columns = (int(n) for n in data["tiling"])
        arrays = (data["features"], data["masks"], data["tokens"], data["token_index"])
        return Sample(*arrays, (rows, columns), annotation)


def pictures(
    assets: Assets, photos: list[Photo], scenes: int, copies: int, seed: int
) -> Iterator[tuple[str, Callable[[], Picture]]]:
    """(name, a function that makes the picture), in a random order.

    Each photo comes `copies` times, unchanged the first time and augmented after; scenes are drawn.
    """

    def scene(i: int) -> Picture:
        return draw_scene(np.random.default_rng([seed, 1, i]), assets)

    def photo(n: int, copy: int) -> Picture:
        rgb = load_image(photos[n].path)
        if copy == 0:
            return rgb, photos[n].annotation
        return augment(rgb, photos[n].annotation, np.random.default_rng([seed, 2, n, copy]))

    todo: list[tuple[str, Callable[[], Picture]]] = []
    todo += [(f"scene-{i:06d}", partial(scene, i)) for i in range(scenes)]
    todo += [(f"photo-{n:05d}-{c}", partial(photo, n, c)) for n in range(len(photos)) for c in range(copies)]
    for i in np.random.default_rng(seed).permutation(len(todo)):
        yield todo[i]


class _Prepared(Dataset[tuple[str, PreparedImage, dict[str, Any]]]):
    """Pictures made and cut into crops, in a process beside the one that runs the ViT."""

    def __init__(self, todo: list[tuple[str, Callable[[], Picture]]], processor: ImageProcessor):
        self.todo, self.processor = todo, processor

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, i: int) -> tuple[str, PreparedImage, dict[str, Any]]:
        name, make = self.todo[i]
        rgb, annotation = make()
        return name, self.processor(rgb), annotation


@torch.inference_mode()
def write_features(
    model: Molmo,
    processor: ImageProcessor,
    todo: Iterator[tuple[str, Callable[[], Picture]]],
    out: Path,
    batch: int = 8,
) -> None:
    """Run the ViT, in bfloat16, over what `out` does not hold yet."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [(name, make) for name, make in todo if not (out / f"{name}.npz").exists()]
    vision = model.vision.to(torch.bfloat16)
    device = next(vision.parameters()).device
    started, done = time.monotonic(), 0
    loader = Loader(_Prepared(missing, processor), batch_size=batch, num_workers=1, collate=list)
    for group in loader:
        crops = np.concatenate([prepared.crops for _, prepared, _ in group])
        features = vision(torch.from_numpy(crops).to(device, torch.bfloat16)).half().cpu().numpy()
        start = 0
        for name, prepared, annotation in group:
            end = start + len(prepared.crops)
            _write_sample(out / f"{name}.npz", features[start:end], prepared, annotation)
            start = end
        done += len(group)
        steps_log.info("%d of %d pictures, %.2f a second", done, len(missing), done / (time.monotonic() - started))


def _write_sample(path: Path, features: np.ndarray, prepared: PreparedImage, annotation: dict[str, Any]) -> None:
    """Written aside and renamed, so that a killed run leaves no half file."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(
            file,
            features=features,
            masks=prepared.masks,
            tokens=prepared.tokens,
            token_index=prepared.token_index,
            tiling=np.array(prepared.tiling),
            annotation=np.frombuffer(json.dumps(annotation).encode(), np.uint8),
        )
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--checkpoint", required=True, help="directory in hub layout, e.g. from training.start")
    parser.add_argument("--sprites", required=True, type=Path, help="directory from training.assets")
    parser.add_argument("--photos", type=Path, help="annotated photos: annotations.jsonl and images/")
    parser.add_argument("--skimage-data", type=Path, help="skimage/data of the package scikit-image, for backdrops")
    parser.add_argument("--split", default="train", choices=("train", "val"))
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--copies", type=int, default=2, help="copies of each photo, all but the first augmented")
    parser.add_argument(
        "--max-crops", type=int, help="instead of the model's own; 0: the global view alone, 5 times faster"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    model, tokenizer, config = load_checkpoint(args.checkpoint, device=args.device)
    # Receipts are left out: their lines are a few pixels high on nano's canvas.
    photos = load_photos(args.photos, args.split) if args.photos else []
    photos = [photo for photo in photos if photo.annotation["source"] != "receipts"]
    assets = load_assets(args.sprites, split=args.split, photos=photos, skimage_data=args.skimage_data)
    todo = pictures(assets, photos, args.scenes, args.copies, args.seed)
    image = config.image if args.max_crops is None else replace(config.image, max_crops=args.max_crops)
    with shown():
        write_features(model, ImageProcessor(image, tokenizer.special), todo, args.out)


if __name__ == "__main__":
    main()

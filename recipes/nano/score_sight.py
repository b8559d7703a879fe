"""Scores of stage 1: points from heat maps on annotated photographs, compared with the detector.

The questions of a picture are all names in it and as many absent names. A point is a hit if it is in a box of its name;
points and boxes are matched one to one. `f1` is the mean over questions about names in the picture, `pooled` the F1
over all points and boxes of all questions, and `none` the share of absent names without a point. Model and detector
both use the threshold that is best on these photographs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from molmo_edge.config import ImageConfig
from molmo_edge.data.annotated_photos import Photo
from molmo_edge.data.regions import Box
from molmo_edge.evaluation.pointing import Pointing, score_points
from molmo_edge.frontend.crops import ImageProcessor, Overview, patch_grid
from molmo_edge.frontend.points import Point
from molmo_edge.modeling.conv_tower import ConvTower
from molmo_edge.training.features import encode_pictures
from molmo_edge.training.forward import Trainable
from molmo_edge.training.regions import Names
from recipes.nano.photos import Vocabulary

GROUPS = {"coco": ("coco", "coco2"), "voc": ("voc07", "voc12")}
Found = tuple[np.ndarray, np.ndarray]  # points float [n, 2] in percent, and their scores [n]


@dataclass(frozen=True)
class Question:
    name: str
    boxes: tuple[Box, ...]  # empty for an absent name


def questions(photo: Photo, vocabulary: Vocabulary, rng: np.random.Generator) -> list[Question]:
    """All names in the picture that can be counted, and as many absent names."""
    picture = vocabulary.picture(photo)
    boxes: dict[str, list[Box]] = {}
    for o in photo.annotation.get("objects", ()):
        if not o.get("crowd") and o["boxes"]:
            boxes.setdefault(o["label"], []).extend(tuple(box) for box in o["boxes"])
    labelled = {o["label"] for o in photo.annotation.get("objects", ())} | {name for name, _ in picture.unsure}
    absent = sorted(vocabulary.exhaustive.get(photo.annotation["source"], set()) - labelled)
    drawn = [absent[int(i)] for i in rng.permutation(len(absent))[: len(boxes)]]
    return [Question(name, tuple(b)) for name, b in boxes.items()] + [Question(name, ()) for name in drawn]


def heat_points(model: Trainable, names: Names, processor: ImageProcessor) -> Callable[[np.ndarray], list[Found]]:
    """A function from rgb to the points of each name: local maxima of its heat map, at the chosen patch of a cell."""
    molmo, head = model.molmo, model.heat_maps
    assert head is not None
    table = names.embed(molmo.decoder.embedding)
    config = molmo.config.image

    @torch.no_grad()
    def find(rgb: np.ndarray) -> list[Found]:
        prepared = processor(rgb)
        features = encode_pictures(molmo, [prepared], torch.device("cpu"))
        cells = molmo.connector(features, torch.from_numpy(prepared.masks))
        heat = head.heat(table, cells).sigmoid()  # [crops, cells^2, names]
        patches, _ = patch_grid(config, prepared.tiling, *rgb.shape[:2])
        grid, crop, cell = stitched(prepared.token_index, prepared.tiling, config)
        peaks = local_maxima(heat[crop, cell].T.reshape(-1, *grid.shape))  # [names, rows, columns]
        found = []
        for number, (scores, peak) in enumerate(zip(heat[crop, cell].T, peaks.flatten(1), strict=True)):
            at = (peak & (scores > 0.05)).nonzero()[:, 0]
            centres = torch.stack([crop[at], cell[at], torch.full_like(at, number), torch.zeros_like(at)], 1)
            inside = head.patches(table, features, centres).argmax(-1) if len(at) else at
            found.append((_patch_points(config, patches, centres, inside), scores[at].numpy()))
        return found

    return find


def stitched(token_index: np.ndarray, tiling: tuple[int, int], config: ImageConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The kept cells of the crops, or of the global view without crops, row by row: their grid, crop and cell."""
    rows = tiling[0]
    shape = config.cell_grids(tiling)[-1]
    crop, cell = (token_index[1:] >= 0).nonzero() if rows else (token_index >= 0).nonzero()
    crop = crop + bool(rows)
    order = np.argsort(token_index[crop, cell])
    grid = torch.arange(len(order)).view(*shape)
    return grid, torch.from_numpy(crop[order]), torch.from_numpy(cell[order])


def local_maxima(heat: Tensor) -> Tensor:
    """heat [n, rows, columns] -> bool: whether no neighbour is larger."""
    return heat == F.max_pool2d(heat[:, None], 3, 1, 1)[:, 0]


def _patch_points(config: ImageConfig, patches: np.ndarray, centres: Tensor, inside: Tensor) -> np.ndarray:
    side, p = config.cells, config.pool
    crop, cell = centres[:, 0].numpy(), centres[:, 1].numpy()
    y, x = cell // side * p + inside.numpy() // p, cell % side * p + inside.numpy() % p
    return np.asarray(100 * patches[crop, y * side * p + x])


def detector_points(
    tower: ConvTower, scores: Sequence[tuple[Tensor, Tensor]], boxes: Sequence[tuple[Tensor, Tensor]], size: int
) -> Callable[[np.ndarray], list[Found]]:
    """The detector alone: a function from rgb to the centres of each name's boxes after suppression, with scores."""
    plain = ImageConfig(
        crop_size=224, max_crops=0, overview=size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )

    @torch.no_grad()
    def find(rgb: np.ndarray) -> list[Found]:
        overview: Overview | None = ImageProcessor(plain)(rgb).overview
        assert overview is not None
        scale = size / max(rgb.shape[:2])
        sides = np.array([rgb.shape[1], rgb.shape[0]]) * scale
        every, confident = [], []
        for level, stride, (sw, sb), (bw, bb) in zip(
            tower.pyramid(torch.from_numpy(overview.pixels)[None]), (8, 16, 32), scores, boxes, strict=True
        ):
            x = level[0].permute(1, 2, 0)  # [h, w, dim]
            y0, x0 = torch.meshgrid(*(torch.arange(n) + 0.5 for n in x.shape[:2]), indexing="ij")
            bins = torch.unflatten(F.linear(x, bw, bb), -1, (4, -1)).softmax(-1)
            distance = (bins * torch.arange(bins.shape[-1])).sum(-1)  # left, top, right, bottom in strides
            centre = torch.stack([x0, y0, x0, y0], -1)
            every.append(((centre + distance * torch.tensor([-1.0, -1.0, 1.0, 1.0])) * stride).flatten(0, 1))
            confident.append(F.linear(x, sw, sb).sigmoid().flatten(0, 1))
        box, confidence = torch.cat(every), torch.cat(confident)
        found = []
        for column in confidence.T:
            kept = suppress(box, column, least=0.05)
            points = (box[kept, :2] + box[kept, 2:]) / 2
            found.append((points.numpy() / sides * 100, column[kept].numpy()))
        return found

    return find


def suppress(boxes: Tensor, scores: Tensor, least: float, overlap: float = 0.6) -> Tensor:
    """Non-maximum suppression: indices of boxes [n, 4] with a score above `least`, best first."""
    order = [int(i) for i in scores.argsort(descending=True)[: int((scores > least).sum())]]
    kept: list[int] = []
    for i in order:
        if kept:
            low, high = torch.maximum(boxes[i, :2], boxes[kept, :2]), torch.minimum(boxes[i, 2:], boxes[kept, 2:])
            inner = (high - low).clamp(min=0).prod(-1)
            areas = (boxes[[i, *kept], 2:] - boxes[[i, *kept], :2]).clamp(min=0).prod(-1)
            if (inner / (areas[0] + areas[1:] - inner)).max() > overlap:
                continue
        kept.append(i)
    return torch.tensor(kept, dtype=torch.long)


def evaluate(
    photos: Iterable[Photo],
    vocabulary: Vocabulary,
    find: Callable[[np.ndarray], list[Found]],
    thresholds: Sequence[float] = tuple(np.arange(0.1, 0.6, 0.025)),
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of a group of photographs at the best threshold."""
    asked: list[tuple[Question, Found]] = []
    for number, photo in enumerate(photos):
        found = find(photo.rgb())
        for question in questions(photo, vocabulary, np.random.default_rng([seed, number])):
            asked.append((question, found[vocabulary.numbers[question.name]]))
    best = max((_scores(asked, threshold) for threshold in thresholds), key=lambda s: s["f1"] + s["none"])
    return {"questions": len(asked)} | best


def _scores(asked: list[tuple[Question, Found]], threshold: float) -> dict[str, float]:
    results: list[tuple[Question, Pointing]] = []
    for question, (points, scores) in asked:
        given = [Point(float(x), float(y)) for x, y in points[scores > threshold]]
        results.append((question, score_points(given, list(question.boxes))))
    there = [r for q, r in results if q.boxes]
    absent = [r for q, r in results if not q.boxes]
    hits, points_given, boxes = (sum(getattr(r, key) for _, r in results) for key in ("hits", "points", "boxes"))
    return {
        "threshold": round(float(threshold), 3),
        "f1": round(float(np.mean([r.f1 for r in there])), 4),
        "pooled": round(2 * hits / max(1, points_given + boxes), 4),
        "precision": round(hits / max(1, points_given), 4),
        "recall": round(hits / max(1, boxes), 4),
        "count": round(float(np.mean([r.points == r.boxes for r in there])), 4),
        "none": round(float(np.mean([r.points == 0 for r in absent])), 4),
    }


def report(
    photos: Sequence[Photo], vocabulary: Vocabulary, find: Callable[[np.ndarray], list[Found]]
) -> dict[str, Any]:
    """`evaluate` for each of GROUPS, on photographs with annotated boxes."""
    scores = {}
    for group, sources in GROUPS.items():
        chosen = [p for p in photos if p.annotation["source"] in sources and p.annotation.get("objects")]
        scores[group] = evaluate(chosen, vocabulary, find)
    return scores

"""What the grounding head chooses patches from, computed once for many pictures while the rest of the model is fixed.

For each question about a name, that is the decoder's state before the first choice, which knows the name and not yet
any patch; for each patch its state and the features of its subpatches. Training on them takes milliseconds a step.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from molmo_edge.config import MolmoConfig
from molmo_edge.data.annotation_prompts import COUNTING, POINTING
from molmo_edge.data.drawn.scenes import draw_scene
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.grounded_questions import absent_labels, asked_for
from molmo_edge.data.regions import Box
from molmo_edge.frontend.crops import pointing_grid, select_tiling
from molmo_edge.frontend.grounding_tokens import slot_places
from molmo_edge.frontend.points import Point, format_absent, format_count, format_points
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.frontend.totals import format_total
from molmo_edge.modeling import Molmo
from molmo_edge.system.files import sha256_of
from molmo_edge.training.encoding import Encoder, Encoding, collate
from molmo_edge.training.forward import ForwardConfig, Trainable
from molmo_edge.training.grounding import gather_slots
from recipes.nano.asked_pictures import AskedPictures, follow_ups, photo_annotation

STORED = torch.float16
SEED = 0
NAMES = 20  # that each picture is asked for: those in it first, then absent ones


@dataclass(frozen=True)
class Named:
    """A name and where it is in a picture. Boxes are in percent of width and height."""

    name: str
    boxes: tuple[Box, ...]
    unsure: tuple[Box, ...] = ()  # areas where it may be


@dataclass(frozen=True, eq=False)
class Choices:
    """The first choices of patches of a picture's answers: m questions, n patches that can be chosen."""

    names: np.ndarray  # int64 [m]: the place of the name in the vocabulary
    states: np.ndarray  # float16 [m, d_model], after `x_norm`: before it, some are too large for float16
    cells: np.ndarray  # float16 [n, d_model]: those of the patches
    turns: np.ndarray  # int64 [n]: rotary positions of the patches
    features: np.ndarray  # float16 [n, n_slots, feature_dim] of the towers
    slots: np.ndarray  # bool [n, n_slots]: False for missing subpatches
    places: np.ndarray  # float32 [n, n_slots, 2]: row and column of each subpatch
    shape: np.ndarray  # int64 [2]: rows and columns of subpatches
    classes: np.ndarray  # int64 []: all patches and "no more points", which the scores are divided by the root of
    boxes: np.ndarray  # float32 [k, 4] of the names
    box_names: np.ndarray  # int64 [k]: the question
    sure: np.ndarray  # bool [k]: False for areas where the name may be


def named_in(data: AskedPictures, index: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Named]]:
    """Picture `index` of a set, augmented, and the names that it is asked for."""
    if index >= len(data.photos):
        assert data.assets is not None
        rgb, annotation = draw_scene(rng, data.assets)
        absent = sorted(absent_labels(annotation, list(data.vocabulary.names)))
        unsure: Sequence[tuple[str, Box]] = ()
    else:
        assert data.augmentation is not None
        picture = data.augmentation.picture(data.photos, index, data.vocabulary, rng)
        rgb, annotation = picture.rgb, photo_annotation(picture)
        absent, unsure = annotation["absent"], picture.unsure
    open_names = set(annotation.get("maybe_present", ()))
    present = [o for o in annotation.get("objects", ()) if not o.get("crowd") and o["boxes"]]
    found = [
        Named(
            o["label"],
            tuple(tuple(map(float, box)) for box in o["boxes"]),  # type: ignore[misc]
            tuple(box for name, box in unsure if name == o["label"]),
        )
        for o in present
        if o["label"] not in open_names and o["label"] in data.vocabulary.numbers
    ]
    found = [found[int(i)] for i in rng.permutation(len(found))[: NAMES - 4]]
    return rgb, found + [Named(absent[int(i)], ()) for i in rng.permutation(len(absent))[: NAMES - len(found)]]


def question(named: Named, rng: np.random.Generator) -> Annotation:
    """A question for a name. Its answer has at most one point, since what follows the first choice is not used."""
    counts = rng.random() < 0.5
    text, words = asked_for(rng, named.name, COUNTING if counts else POINTING)
    if not named.boxes:
        tag = format_absent(words)
        return Annotation("demo", (text, format_total(tag, 0) if counts else tag))
    x0, y0, x1, y1 = named.boxes[0]
    point = [Point((x0 + x1) / 2, (y0 + y1) / 2)]
    return Annotation("demo", (text, (format_count if counts else format_points)(point, words)))


class Reader:
    """Computes the choices of pictures with a fixed model."""

    def __init__(self, model: Molmo, tokenizer: Tokenizer):
        self.config: MolmoConfig = model.config
        encoding = Encoding(sequence=2048, shuffle=False)
        self._encoder = Encoder(tokenizer, model.config.image, encoding, config=model.config)
        assert model.point_head is not None
        self._norm = model.point_head.x_norm
        self._trainable = Trainable(model, ForwardConfig(answer_dropout=0.0, recompute=False)).eval()

    @torch.no_grad()
    def __call__(
        self,
        rgb: np.ndarray,
        names: Sequence[tuple[int, Named]],
        asked: Sequence[Annotation],
        rng: np.random.Generator,
    ) -> Choices:
        """`rgb`: uint8 [h, w, 3]; `names`: each with its place in the vocabulary; `asked`: a question for each."""
        sample = self._encoder(Example(rgb, tuple(asked)), rng)
        assert sample.points is not None
        targets = sample.points.patch_targets
        segments = sample.packed.segments[targets[:, 0]]
        # The choice that begins the list of each segment's last answer; earlier turns may have others.
        firsts = [np.flatnonzero((segments == each) & (targets[:, 4] == 1))[-1] for each in np.unique(segments)]
        batch = collate([sample])
        run = self._trainable.run(batch)
        assert batch.pooling is not None
        chosen = torch.from_numpy(sample.points.chosen)
        pooling = batch.pooling[chosen]
        image = self.config.image
        grid = pointing_grid(image, select_tiling(*rgb.shape[:2], image))
        order = segments[firsts] - 1
        boxes = [
            (at, box, sure)
            for at, number in enumerate(order)
            for own, sure in ((names[number][1].boxes, True), (names[number][1].unsure, False))
            for box in own
        ]
        return Choices(
            names=np.array([names[number][0] for number in order]),
            states=self._normed(run.states[torch.from_numpy(targets[firsts, 0])]),
            cells=self._normed(run.states[batch.cells_at[chosen]]),
            turns=sample.points.turns[sample.points.chosen],
            features=gather_slots(run.features, pooling).to(STORED).numpy(),
            slots=(pooling >= 0).numpy(),
            places=slot_places(pooling.numpy(), [grid])[..., 1:],
            shape=np.array(grid.shape),
            classes=np.array(len(sample.points.chosen) + 1),
            boxes=np.array([box for _, box, _ in boxes], np.float32).reshape(-1, 4),
            box_names=np.array([at for at, _, _ in boxes], np.int64),
            sure=np.array([sure for _, _, sure in boxes], bool),
        )

    def _normed(self, states: Tensor) -> np.ndarray:
        return self._norm(states).to(STORED).numpy()


def save(choices: Choices, file: Path) -> None:
    """Write the choices of a picture as an uncompressed .npz."""
    np.savez(file, **{f.name: getattr(choices, f.name) for f in fields(choices)})  # type: ignore[arg-type]


def load(file: Path) -> Choices:
    """Read what `save` wrote."""
    with np.load(file) as arrays:
        return Choices(**{f.name: arrays[f.name] for f in fields(Choices)})


def write_choices(model: Molmo, tokenizer: Tokenizer, data: AskedPictures, folder: Path, pictures: int) -> list[float]:
    """Compute `pictures` pictures of a set, and store each in `folder`; those that are there are not repeated.

    Returns the seconds that each computed picture took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reader, seconds = Reader(model, tokenizer), []
    for number in range(pictures):
        file = _file(folder, number)
        if file.exists():
            continue
        began = time.monotonic()
        rng = np.random.default_rng([SEED, number])
        rgb, names = named_in(data, int(rng.integers(len(data))), rng)
        if not names:
            continue
        asked = follow_ups([question(one, rng) for one in names], rng)
        numbered = [(data.vocabulary.numbers[one.name], one) for one in names]
        part = file.with_suffix(".part.npz")
        save(reader(rgb, numbered, asked, rng), part)
        part.rename(file)
        seconds.append(time.monotonic() - began)
        if not (number + 1) % 100:
            print(f"{number + 1} of {pictures} pictures", flush=True)
    return seconds


def files_of(folder: Path, pictures: int) -> list[Path]:
    """The stored pictures among the first `pictures` of a set: without those in which there is nothing to ask about."""
    return [file for number in range(pictures) if (file := _file(folder, number)).exists()]


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npz"


def identity(model: Path, data: AskedPictures) -> str:
    """A hash of what determines the choices of pictures: the model's weights, and the set."""
    digest = hashlib.sha256(b"rounded" + sha256_of(model / "model.safetensors").encode())
    assets = () if data.assets is None else data.assets.names
    for part in (SEED, str(STORED), data.scenes, data.augmentation, data.vocabulary.names, assets):
        digest.update(repr(part).encode())
    for photo in data.photos:
        digest.update(json.dumps([photo.path.name, photo.annotation], sort_keys=True).encode())
    return digest.hexdigest()[:12]

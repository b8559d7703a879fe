"""Cached pictures as batches of packed training sequences, in an order that a resumed run can take up anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from molmo_edge.config import MolmoConfig
from molmo_edge.data.grounded_questions import QA, grounded_names, write_questions
from molmo_edge.frontend.prompts import build_prompt
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.features import Sample, read_sample
from molmo_edge.training.grounding import NamedRegions, cell_centres, cells_in_box
from molmo_edge.training.packing import Packed, attention_mask, pack

Batch = dict[str, Any]  # tensors by name, see `collate`, and "regions"
IGNORED = -100  # target of what only fills a batch up


class PackedQuestions(Dataset[dict[str, Any]]):
    """Cached pictures as packed training sequences. Item (i, visit): other questions at each visit."""

    def __init__(
        self,
        directories: list[Path],
        tokenizer: Tokenizer,
        config: MolmoConfig,
        questions: int,
        names: list[str],
        seed: int,
    ):
        groups = [sorted(directory.glob("*.npz")) for directory in directories]
        self.paths, self.groups = [path for group in groups for path in group], [len(group) for group in groups]
        if not self.paths:
            raise FileNotFoundError(f"{directories} hold no .npz: run molmo_edge.training.features first")
        self.tokenizer, self.config, self.questions, self.seed = tokenizer, config, questions, seed
        self.names = {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, visit = key
        sample = read_sample(self.paths[index])
        rng = np.random.default_rng([self.seed, index, visit])
        asked = write_questions(sample.annotation, rng, max_questions=self.questions, vocabulary=list(self.names))
        return self.encode(sample, asked)

    def encode(self, sample: Sample, asked: list[QA]) -> dict[str, Any]:
        special = self.tokenizer.special
        messages = [[build_prompt(qa.question), " " + qa.answer] for qa in asked]
        packed = pack(self.tokenizer, sample.tokens, messages)
        at, xy = cell_centres(self.config.image, sample.tokens, special.im_patch, sample.tiling)
        at = at + 1  # BOS
        queries, wanted = [], []
        for qa, start in zip(asked, packed.answer_starts, strict=True):
            if qa.target_boxes is None:
                continue
            for offset, box in zip(self._point_offsets(qa.answer), qa.target_boxes, strict=False):
                queries.append(start + offset - 1)  # the token that predicts the first digit of x
                wanted.append(at[cells_in_box(xy, np.asarray(box))])
        regions = [
            (self.names[label], at[cells_in_box(xy, np.asarray(box), shrink=0.3)])
            for label, box in grounded_names(sample.annotation)
            if label in self.names
        ]
        return {
            "packed": packed,
            "features": sample.features,
            "masks": sample.masks,
            "token_index": np.where(sample.token_index >= 0, sample.token_index + 1, -1),
            "queries": queries,
            "wanted": wanted,
            "regions": regions,
            "kinds": [qa.kind for qa in asked],
        }

    def _point_offsets(self, answer: str) -> Iterator[int]:
        """Token offset within " answer" of the first digit of each point's x. Digits are tokens of their own."""
        text, start = " " + answer, 0
        while (start := text.find(" x", start)) >= 0:
            quote = text.find('="', start)
            if quote < 0:
                return
            if text[start + 2 : quote].isdigit() or quote == start + 2:
                yield len(self.tokenizer.encode(text[: quote + 2]))
            start = quote


def _round_up(n: int, unit: int = 64) -> int:
    """Few different lengths: on a CPU every new shape of a bfloat16 product compiles and keeps a kernel."""
    return -(-n // unit) * unit


def answered_tokens(packed: Packed, offset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions + offset, targets, loss weights) of the tokens that an answer consists of."""
    at = np.flatnonzero(packed.loss_weights)
    return at + offset, packed.targets[at], packed.loss_weights[at]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad to the longest sequence and the most crops; positions of the batch are laid end to end for regions."""
    n = _round_up(max(len(i["packed"].input_ids) for i in items))
    crops = max(len(i["features"]) for i in items)

    def stack(key: str, fill: float, dtype: Any) -> Tensor:
        rows = [
            np.pad(getattr(i["packed"], key), (0, n - len(i["packed"].input_ids)), constant_values=fill) for i in items
        ]
        return torch.from_numpy(np.stack(rows).astype(dtype))

    def pad_crops(key: str, fill: float) -> Tensor:
        rows = [
            np.pad(i[key], [(0, crops - len(i[key]))] + [(0, 0)] * (i[key].ndim - 1), constant_values=fill)
            for i in items
        ]
        return torch.from_numpy(np.stack(rows))

    masks = np.zeros((len(items), 1, n, n), bool)
    for row, item in zip(masks[:, 0], items, strict=True):
        length = len(item["packed"].segments)
        row[:length, :length] = attention_mask(item["packed"].segments)
        row[np.arange(length, n), np.arange(length, n)] = True  # padding looks at itself: no row is empty
    queries = [(b, q) for b, item in enumerate(items) for q in item["queries"]]
    wanted = np.zeros((len(queries), n), bool)
    for row, cells in zip(wanted, (w for item in items for w in item["wanted"]), strict=True):
        row[cells] = True
    regions = [(b, name, cells) for b, item in enumerate(items) for name, cells in item["regions"]]
    weights = np.zeros((len(regions), len(items) * n), np.float32)
    for row, (b, _, cells) in zip(weights, regions, strict=True):
        row[b * n + cells] = 1 / len(cells)
    answers = [answered_tokens(item["packed"], b * n) for b, item in enumerate(items)]
    at, targets, loss_weights = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    spare = _round_up(len(at)) - len(at)
    return {
        "answered": torch.from_numpy(np.pad(at, (0, spare))),
        "targets": torch.from_numpy(np.pad(targets, (0, spare), constant_values=IGNORED).astype(np.int64)),
        "loss_weights": torch.from_numpy(np.pad(loss_weights, (0, spare))),
        "ids": stack("input_ids", 0, np.int64),
        "positions": stack("positions", 0, np.int64),
        "mask": torch.from_numpy(masks),
        "features": pad_crops("features", 0),
        "masks": pad_crops("masks", 1),
        "token_index": pad_crops("token_index", -1).long(),
        "queries": torch.tensor(queries, dtype=torch.long).view(-1, 2),
        "wanted": torch.from_numpy(wanted),
        "regions": NamedRegions(torch.from_numpy(weights), torch.tensor([r[1] for r in regions], dtype=torch.long)),
    }


class Visits(Sampler[list[tuple[int, int]]]):
    """Batches of (index, visit), shuffled anew at each visit; starts at any step, so that a run resumes exactly.

    A batch comes from one group (one feature directory), whose pictures have sequences of a like length.
    """

    def __init__(self, groups: list[int], batch: int, first: int, steps: int, seed: int):
        self.groups, self.batch, self.first, self.steps, self.seed = groups, batch, first, steps, seed

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        visit, batches = -1, self._batches(0)
        for step in range(self.first, self.steps):
            wanted, place = divmod(step, len(batches))
            if wanted != visit:
                visit, batches = wanted, self._batches(wanted)
            yield [(int(i), visit) for i in batches[place]]

    def _batches(self, visit: int) -> np.ndarray:
        """int [n, batch]: every picture once, but for what does not fill a batch."""
        rng, start, rows = np.random.default_rng([self.seed, visit]), 0, []
        for size in self.groups:
            whole = size // self.batch * self.batch
            rows.append(start + rng.permutation(size)[:whole].reshape(-1, self.batch))
            start += size
        batches = np.concatenate(rows)
        if not len(batches):
            raise ValueError(
                f"{sum(self.groups)} pictures do not fill one batch of {self.batch}: make more, or lower it"
            )
        return rng.permutation(batches)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    moved = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
    regions = batch["regions"]
    return moved | {"regions": NamedRegions(regions.weights.to(device), regions.names.to(device))}

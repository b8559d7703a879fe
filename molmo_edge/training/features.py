"""Cached features of frozen vision towers: each picture is encoded once, and training reads the features from disk.

One safetensors file per picture, ROOT/FINGERPRINT/ab/abcdef....safetensors. The fingerprint is a hash of the towers'
weights, of the configuration of towers and crops, and of the dtype; a file is named by a hash of the picture's pixels.
Files are written atomically, so an interrupted run can be resumed. In float32 a run on cached features
equals a run without them up to the rounding of matrix products of another batch size; in bfloat16 the features are
rounded to bfloat16. A convolutional tower sees each picture alone, as at inference; a batch without cached features
pads smaller pictures.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from molmo_edge.checkpoints.tensor_names import hub_layout
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import ImageConfig, MolmoConfig
from molmo_edge.data.examples import DataSet
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.crops import ImageProcessor, PreparedImage
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.tokenizer import MOLMOE_SPECIAL_IDS, SpecialIds
from molmo_edge.modeling.model import Molmo
from molmo_edge.modeling.weights import load_part
from molmo_edge.system.files import atomic_write
from molmo_edge.system.log import steps_log
from molmo_edge.training.workers import Loader

TOWERS = ("vision", "extra_vision", "conv_tower")  # parts of a `Molmo`
_LOG_EVERY = 30.0  # seconds
_WAIT_EVERY = 32  # batches


class FeatureError(MolmoEdgeError):
    """Cached features that are missing or cannot be used."""


@dataclass(frozen=True)
class FeatureCache:
    """The cached features of a model's towers, for one crop geometry and one dtype."""

    directory: Path  # with the fingerprint as its name
    shape: tuple[int, int]  # patches^2, feature_dim
    dtype: torch.dtype

    def path(self, rgb: np.ndarray) -> Path:
        """The file of a picture uint8 [h, w, 3]."""
        key = hashlib.blake2b(
            np.ascontiguousarray(rgb).data, digest_size=20, person=b"%dx%d" % rgb.shape[:2]
        ).hexdigest()
        return self.directory / key[:2] / f"{key}.safetensors"

    def read(self, rgb: np.ndarray | None) -> Tensor:
        """[n_crops, patches^2, feature_dim]; without a picture no crops. Raises FeatureError."""
        if rgb is None:
            return torch.zeros(0, *self.shape, dtype=self.dtype)
        path = self.path(rgb)
        try:
            return load_file(path)["features"]
        except FileNotFoundError:
            raise FeatureError(
                f"{path} is missing: was it deleted during the run, or does the data set change its pictures from "
                "epoch to epoch? Features of such pictures cannot be cached"
            ) from None
        except (OSError, SafetensorError, KeyError) as error:
            raise FeatureError(f"{path} cannot be read ({error}): delete it, and start the run again") from None

    def write(self, path: Path, features: Tensor) -> None:
        """Write features [n_crops, patches^2, feature_dim] to `path` atomically, in the dtype of the cache."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(save({"features": features.to(self.dtype).cpu().contiguous()}))


def open_features(
    root: Path, config: MolmoConfig, source: TensorSource, image: ImageConfig, dtype: torch.dtype
) -> FeatureCache:
    """The cache below `root` for the towers of a checkpoint. image: the geometry of crops in training."""
    settings = [asdict(c) for c in (image, *config.vits, config.conv_tower) if c is not None]
    fingerprint = hashlib.sha256(json.dumps([1, str(dtype), *settings]).encode())
    for name, slot in hub_layout(config).items():
        if name.partition(".")[0] in TOWERS:
            for hub in slot:
                fingerprint.update(np.ascontiguousarray(source.raw(hub)).view(np.uint8).data)
    return FeatureCache(root / fingerprint.hexdigest()[:20], (image.patches**2, config.feature_dim), dtype)


def write_features(
    cache: FeatureCache,
    config: MolmoConfig,
    source: TensorSource,
    image: ImageConfig,
    sets: Sequence[DataSet],
    seed: int,
    device: torch.device,
    *,
    special: SpecialIds = MOLMOE_SPECIAL_IDS,
    rank: int = 0,
    ranks: int = 1,
    wait: Callable[[], None] | None = None,
    batch: int = 8,
    workers: int = 0,
) -> None:
    """Encode the pictures of `sets` that `cache` does not hold yet, those of one rank.

    Every example is read once to find what is missing, drawn with `seed` as `loader.Samples` draws it. Damaged examples
    are skipped: the run replaces them. wait: a barrier over the ranks, called regularly, so that no
    rank exceeds the timeout of the process group at the end.
    """
    every = [(s, i) for s, data in enumerate(sets) for i in range(len(data))]
    numbers = every[rank::ranks]
    if len(numbers) * ranks < len(every):  # all ranks have equally many batches
        numbers.append(every[0])
    towers = load_towers(config, source, device)
    loader = Loader(
        _Missing(sets, seed, numbers, cache, ImageProcessor(image, special)),
        batch_size=batch,
        num_workers=workers,
        collate=_without_nothing,
    )
    started = logged = time.monotonic()
    written = 0
    for n, group in enumerate(loader, start=1):
        if group:
            with torch.autocast(device.type, cache.dtype, enabled=cache.dtype != torch.float32):
                features = encode_pictures(towers, [prepared for _, prepared in group], device)
            counts = [len(prepared.crops) for _, prepared in group]
            for (path, _), own in zip(group, torch.split(features, counts), strict=True):
                cache.write(path, own)
            written += len(group)
        if wait is not None and n % _WAIT_EVERY == 0:
            wait()
        if time.monotonic() - logged > _LOG_EVERY:
            logged = time.monotonic()
            steps_log.info(
                "features: %d of %d pictures read, %d encoded, %.1f a second",
                min(n * batch, len(numbers)), len(numbers), written, written / (logged - started),
            )  # fmt: skip


def load_towers(config: MolmoConfig, source: TensorSource, device: torch.device) -> Molmo:
    """A `Molmo` in which only the towers have weights; everything else stays on the meta device."""
    with torch.device("meta"):
        molmo = Molmo(config)
    for part in TOWERS:
        if getattr(molmo, part) is not None:
            setattr(molmo, part, load_part(config, source, part).to(device))
    return molmo


@torch.no_grad()
def encode_pictures(molmo: Molmo, pictures: Sequence[PreparedImage], device: torch.device) -> Tensor:
    """Features of all towers, [crops of all pictures, patches^2, feature_dim]."""
    features = molmo.vit_features(torch.from_numpy(np.concatenate([p.crops for p in pictures])).to(device))
    views = [p.overview for p in pictures if p.overview is not None]
    if molmo.conv_tower is None or not views:
        return features
    sampled = [
        molmo.conv_tower(torch.from_numpy(view.pixels)[None].to(device), [torch.from_numpy(view.positions).to(device)])
        for view in views
    ]
    return torch.cat([features, torch.cat(sampled).to(features.dtype)], dim=-1)


class _Missing(Dataset[Any]):
    """(file, prepared picture) of each example whose picture has no file yet, else None."""

    def __init__(
        self,
        sets: Sequence[DataSet],
        seed: int,
        numbers: Sequence[tuple[int, int]],
        cache: FeatureCache,
        processor: ImageProcessor,
    ):
        self.sets, self.seed, self.numbers = sets, seed, numbers
        self.cache, self.processor = cache, processor

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, n: int) -> tuple[Path, PreparedImage] | None:
        number, index = self.numbers[n]
        rng = np.random.default_rng([self.seed, number, index, 0])
        try:
            image = self.sets[number].example(index, rng).image
            if image is None:
                return None
            rgb = load_image(image)
        except MolmoEdgeError:
            return None
        path = self.cache.path(rgb)
        return None if path.exists() else (path, self.processor(rgb))


def _without_nothing(items: list[tuple[Path, PreparedImage] | None]) -> list[tuple[Path, PreparedImage]]:
    return [item for item in items if item is not None]

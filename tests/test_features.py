"""Cached features: training on them equals training on crops, and a cache is resumed, complete and never mixed up."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from small_checkpoints import GOLDEN, a_recipe, write_checkpoint
from test_conv_tower import CONFIG

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.training.encoding import Encoder, Encoding, collate
from molmo_edge.training.features import FeatureCache, FeatureError, open_features, write_features
from molmo_edge.training.flops import cost
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.trainer import Data, Trainer, build, cache_features

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Noise with questions, one damaged example and one text without a picture."""

    size: int = 8
    changing: bool = False  # another picture at every visit
    name: str = "pictures"

    def __len__(self) -> int:
        return self.size

    def example(self, index: int, rng: np.random.Generator) -> Example:
        if index == 3:
            raise MolmoEdgeError("example 3 is damaged")
        asked = (Annotation("demo", (f"What is {rng.integers(9)}?", f"It is {index}.")),)
        if index == 5:
            return Example(None, asked)
        drawn = rng if self.changing else np.random.default_rng(index)
        return Example(drawn.integers(0, 256, (60 + 20 * (index % 3), 90, 3), dtype=np.uint8), asked)


@pytest.fixture(scope="module")
def with_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a convolutional tower beside its ViT."""
    directory = tmp_path_factory.mktemp("tower")
    model = Molmo(CONFIG).init_weights(std=0.15, generator=torch.Generator().manual_seed(0))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", directory)
    return directory


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), "experts")


def recipe(**changes: Any) -> Recipe:
    return a_recipe(frozen=("vision",), **changes)


def open_cache(root: Path, checkpoint: Path, dtype: torch.dtype = torch.float32) -> tuple[FeatureCache, MolmoConfig]:
    config = read_config(checkpoint)
    return open_features(root, config, open_tensors(checkpoint), recipe().image(config), dtype), config


def fill(cache: FeatureCache, checkpoint: Path, data: Pictures, **options: Any) -> None:
    config = read_config(checkpoint)
    write_features(cache, config, open_tensors(checkpoint), recipe().image(config), [data], 0, CPU, **options)


def train(checkpoint: Path, run: Path, features: Path | None, data: Pictures | None = None, **changes: Any) -> Trainer:
    config, source = read_config(checkpoint), open_tensors(checkpoint)
    tokenizer, used = Tokenizer.from_file(checkpoint / "tokenizer.json"), recipe(**changes)
    sets = Data([data or Pictures()], [1.0], [Pictures(4)])
    with world("cpu") as here:
        cache = cache_features(features, config, source, sets, used, here) if features else None
        model = build(config, source, str(checkpoint), used, here)
        trainer = Trainer(model, tokenizer, sets, used, run, here, cache)
        trainer.train()
    return trainer


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "validation_loss") if key in line]


def test_training_on_cached_features_equals_training_on_crops(plain: Path, tmp_path: Path) -> None:
    """Float32: up to the rounding of matrix products of another batch size."""
    changes = {"steps": 10, "validate_every": 5}
    crops = train(plain, tmp_path / "crops", None, **changes)
    cached = train(plain, tmp_path / "cached", tmp_path / "features", **changes)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "crops"), rel=1e-5)
    for (name, ours), (_, theirs) in zip(cached.model.named_parameters(), crops.model.named_parameters(), strict=True):
        if not name.endswith("wk.bias"):  # a softmax does not see it: its gradient is rounding, which Adam enlarges
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)
    example = Pictures().example(0, np.random.default_rng(0))
    batches = [collate([t.encoder(example, np.random.default_rng(0))]) for t in (cached, crops)]
    assert batches[0].features is not None
    assert not batches[0].crops.numel(), "no crop is read"
    own = [cost(read_config(plain)).forward(batch) for batch in batches]
    assert own[0] < own[1], "what the ViT would cost is not counted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_features_are_those_of_both_towers(with_tower: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    molmo, tokenizer, config = load_checkpoint(with_tower)
    cache, _ = open_cache(tmp_path, with_tower, dtype)
    fill(cache, with_tower, Pictures(), batch=3)
    image = recipe().image(config)
    for index in (0, 1, 7):
        example = Pictures().example(index, np.random.default_rng(0))
        prepared = ImageProcessor(image, tokenizer.special)(example.image)
        assert prepared.overview is not None
        crops, positions = (torch.from_numpy(a) for a in (prepared.crops, prepared.overview.positions))
        with torch.no_grad():
            features = molmo.vision(crops)
            tower = molmo.conv_tower(torch.from_numpy(prepared.overview.pixels)[None], [positions])
        expected = torch.cat([features, tower], dim=-1)
        ours = cache.read(example.image)
        assert ours.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.02 * float(expected.abs().max())
        torch.testing.assert_close(ours.float(), expected, rtol=1e-5, atol=tolerance)
    assert cache.read(None).shape == (0, image.patches**2, config.feature_dim)


def test_a_subset_of_crops_has_its_own_features(with_tower: Path, tmp_path: Path) -> None:
    """Of a picture with regions alone, as many crops as the encoding says are drawn."""
    from molmo_edge.data.regions import Regions

    cache, config = open_cache(tmp_path, with_tower)
    fill(cache, with_tower, Pictures())
    rgb = Pictures().example(0, np.random.default_rng(0)).image
    example = Example(rgb, regions=Regions((), np.array([True])))
    tokenizer = Tokenizer.from_file(with_tower / "tokenizer.json")
    encode = Encoder(tokenizer, recipe().image(config), Encoding(crops=0), cache)
    batch = collate([encode(example, np.random.default_rng(0))])
    assert batch.features is not None
    assert torch.equal(batch.features, cache.read(rgb)[:1])
    assert batch.overviews is None


def test_a_filled_cache_is_not_written_again(plain: Path, tmp_path: Path) -> None:
    cache, _ = open_cache(tmp_path, plain)
    fill(cache, plain, Pictures(4))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(before) == 3, "a damaged example has no features"
    gone = min(before)
    gone.unlink()
    fill(cache, plain, Pictures(8), workers=1)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(after) == 6, "neither has a text without a picture"
    assert {path for path in before if after[path] != before[path]} == {gone}


def test_ranks_encode_what_is_theirs(plain: Path, tmp_path: Path) -> None:
    cache, _ = open_cache(tmp_path, plain)
    counts = []
    for rank in range(3):
        fill(cache, plain, Pictures(), rank=rank, ranks=3)
        counts.append(len(list(tmp_path.rglob("*.safetensors"))))
    assert counts == [2, 5, 6]


def test_other_weights_geometry_or_dtype_have_another_cache(plain: Path, with_tower: Path, tmp_path: Path) -> None:
    config, source = read_config(plain), open_tensors(plain)
    other = write_checkpoint(tmp_path / "other", "experts", seed=1)
    fewer = dataclasses.replace(config.image, max_crops=1)
    caches = [
        open_cache(tmp_path, plain)[0],
        open_cache(tmp_path, other)[0],
        open_cache(tmp_path, with_tower)[0],
        open_cache(tmp_path, plain, torch.bfloat16)[0],
        open_features(tmp_path, config, source, dataclasses.replace(fewer, resize="dino"), torch.float32),
    ]
    assert len({cache.directory for cache in caches}) == len(caches)
    assert open_cache(tmp_path, plain)[0] == caches[0]


def test_what_cannot_be_read_is_named(plain: Path, tmp_path: Path) -> None:
    cache, _ = open_cache(tmp_path, plain)
    fill(cache, plain, Pictures())
    rgb = Pictures().example(0, np.random.default_rng(0)).image
    with pytest.raises(FeatureError, match="is missing"):
        cache.read(rgb[::-1])
    turned = np.ascontiguousarray(rgb.reshape(rgb.shape[1], rgb.shape[0], 3))
    assert cache.path(turned) != cache.path(rgb), "the same bytes with other sides are another picture"
    cache.path(rgb).write_bytes(b"short")
    with pytest.raises(FeatureError, match="delete it"):
        cache.read(rgb)


def test_pictures_that_change_from_epoch_to_epoch_are_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="from epoch to epoch"):
        train(plain, tmp_path / "run", tmp_path / "features", Pictures(changing=True))


def test_towers_that_are_trained_are_refused(plain: Path, tmp_path: Path) -> None:
    cache, config = open_cache(tmp_path, plain)
    with world("cpu") as here:
        model = build(config, open_tensors(plain), str(plain), a_recipe(), here)
        with pytest.raises(FeatureError, match="frozen"):
            Trainer(model, None, Data([], []), a_recipe(), tmp_path / "run", here, cache)  # type: ignore[arg-type]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_features import Pictures, fill, open_cache
from molmo_edge.training.features import FeatureCache
checkpoint, root = Path(sys.argv[1]), Path(sys.argv[2])
cache, _ = open_cache(root, checkpoint)
write, replace, written = FeatureCache.write, os.replace, []
def killed(*arguments):
    written.append(arguments)
    if len(written) == 4:  # the file is complete, and has not got its name yet
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
os.replace = killed
fill(cache, checkpoint, Pictures())
"""


def test_a_killed_process_leaves_whole_files_alone(plain: Path, tmp_path: Path) -> None:
    root = tmp_path / "features"
    command = [sys.executable, "-c", KILLED, str(plain), str(root), str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, check=False, timeout=200).returncode == -signal.SIGKILL
    assert len([path for path in root.rglob("*.safetensors") if not path.name.startswith(".")]) == 3
    cache, _ = open_cache(root, plain)
    fill(cache, plain, Pictures())
    whole, _ = open_cache(tmp_path / "whole", plain)
    fill(whole, plain, Pictures())
    for index in (0, 1, 2, 4, 6, 7):
        rgb = Pictures().example(index, np.random.default_rng(0)).image
        torch.testing.assert_close(cache.read(rgb), whole.read(rgb), rtol=1e-5, atol=1e-6)

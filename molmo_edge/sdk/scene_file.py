"""The file of a scene: its images, embeddings, keys and values, and which model it belongs to."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from molmo_edge.errors import EngineError, MolmoEdgeError
from molmo_edge.runtimes.grounding import GroundingInputs
from molmo_edge.sdk.shown import Shown
from molmo_edge.system.tensor_files import TensorFileError, read_arrays, read_metadata, write_arrays

if TYPE_CHECKING:
    from molmo_edge.runtimes.protocol import Cache, GappedRuntime, PointRuntime, Runtime, StoredCache, StoringRuntime

FORMAT = "molmo-edge-scene"
FORMAT_VERSION = 1
WITH_GAPS = 2  # the version of a scene without some of its image tokens, which older versions would misplace

_GROUNDING = ("ids", "positions", "patch_features", "pooling", "features", "pointable", "states", "rows")


class SceneFileError(MolmoEdgeError):
    """A file of a scene that cannot be used: damaged, of another kind, version, model or engine."""


@dataclass(frozen=True, eq=False)
class StoredScene:
    """The parts of a scene that its file holds."""

    shown: Shown
    crops: int
    embeddings: np.ndarray  # float32 [n, d_model]
    flags: np.ndarray  # bool [n]
    grounding: GroundingInputs | None
    cache: Cache  # filled with `embeddings`
    positions: np.ndarray | None = None  # int64 [n], where there are gaps
    dropped: int = 0  # image tokens that were left out


def write_scene(path: Path, scene: StoredScene, runtime: Runtime, model: str) -> None:
    """Write `scene` to `path`. `model`: its `model_identity`. Raises OSError; `path` is then unchanged."""
    arrays = {"embeddings": scene.embeddings, "flags": scene.flags}
    arrays |= {f"image.{index}": image for index, image in enumerate(scene.shown.images)}
    arrays |= {f"cache.{name}": array for name, array in cast("StoredCache", scene.cache).arrays().items()}
    facts: dict[str, Any] = {
        "crops": scene.crops,
        "images": len(scene.shown.images),
        "times": scene.shown.times,
        "frame_size": scene.shown.frame_size,
        "grounding": None,
    }
    if scene.positions is not None:
        arrays["positions"] = scene.positions.astype(np.int64)
    if scene.dropped:
        facts["dropped"] = scene.dropped
    if (grounding := scene.grounding) is not None:
        given = {name: getattr(grounding, name) for name in _GROUNDING}
        grids = {f"grid.{index}": grid for index, grid in enumerate(grounding.grids)}
        arrays |= {f"grounding.{name}": array for name, array in (given | grids).items() if array is not None}
        facts["grounding"] = {
            "indexable": grounding.indexable,
            "grids": len(grounding.grids),
            "frames": [[float(value) for value in frame] for frame in grounding.frames],
        }
    metadata = {
        "format": FORMAT,
        "format_version": str(WITH_GAPS if scene.dropped else FORMAT_VERSION),
        "model": model,
        "engine": cast("StoringRuntime", runtime).cache_format,
        "scene": json.dumps(facts),
    }
    write_arrays(path, arrays, metadata)


def read_scene(path: Path, runtime: Runtime, model: str, *, room: int) -> StoredScene:
    """Read what `write_scene` wrote. `room`: positions to keep free in its cache, where the context allows it.

    Raises SceneFileError that names the file and the problem.
    """
    with _errors(path):
        _check(read_metadata(path), runtime, model)  # before the arrays are read
        arrays, metadata = read_arrays(path)
        return _scene(_Arrays(arrays), json.loads(metadata["scene"]), runtime, room)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    again = "save the scene again"
    try:
        yield
    except SceneFileError as error:
        raise SceneFileError(f"{path}: {error}") from None
    except TensorFileError as error:
        raise SceneFileError(f"{path} is not a usable scene: {error}; {again}") from None
    except OSError as error:
        raise SceneFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise SceneFileError(f"{path} is not a usable scene: it is incomplete or damaged; {again}") from None
    except EngineError as error:
        raise SceneFileError(f"{path} does not fit this model: {error}; {again}") from error


def _check(metadata: Mapping[str, str], runtime: Runtime, model: str) -> None:
    if metadata.get("format") != FORMAT:
        raise SceneFileError("this is not the file of a scene; Scene.save writes one")
    version = metadata.get("format_version", "")
    if version not in (str(FORMAT_VERSION), str(WITH_GAPS)):
        newer = version.isdecimal() and int(version[:9]) > WITH_GAPS
        advice = "pip install --upgrade molmo-edge" if newer else "save the scene again"
        raise SceneFileError(
            f"it has format version {version}, this molmo-edge reads {FORMAT_VERSION} and {WITH_GAPS}: {advice}"
        )
    if metadata.get("model") != model:
        raise SceneFileError("this scene was saved with another model, or before the model was changed: encode it anew")
    engine = cast("StoringRuntime", runtime).cache_format
    if metadata.get("engine") != engine:
        raise SceneFileError(
            f"this scene was saved with {metadata.get('engine')}, and the model runs on {engine}: encode it anew"
        )


class _Arrays:
    """Arrays of a file by name, whose dtype and number of dimensions are checked."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.all = arrays

    def get(self, name: str, kinds: str, ndim: int) -> np.ndarray:
        """`kinds`: accepted `dtype.kind`s. Raises KeyError or ValueError."""
        array = self.all[name]
        if array.dtype.kind not in kinds or array.ndim != ndim:
            raise ValueError(name)
        return array

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Those whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): array for name, array in self.all.items() if name.startswith(prefix)}


def _scene(arrays: _Arrays, facts: dict[str, Any], runtime: Runtime, room: int) -> StoredScene:
    embeddings, flags = arrays.get("embeddings", "f", 2), arrays.get("flags", "b", 1)
    length, context = len(embeddings), runtime.config.decoder.max_position_embeddings
    if embeddings.shape[1] != runtime.config.decoder.d_model or len(flags) != length or not 0 < length <= context:
        raise ValueError
    images = tuple(arrays.get(f"image.{index}", "u", 3) for index in range(_count(facts["images"])))
    times = None if facts["times"] is None else _numbers(facts["times"])
    if any(image.shape[2] != 3 or image.dtype != np.uint8 for image in images):
        raise ValueError
    if times is not None and len(times) != len(images):
        raise ValueError
    size = None
    if facts["frame_size"] is not None:
        height, width = facts["frame_size"]
        size = _count(height), _count(width)
    shown = Shown(images, times, size)
    grounding = None
    if (runtime.config.point_head is not None) is not (facts["grounding"] is not None):
        raise ValueError
    if facts["grounding"] is not None:
        grounding = _grounding(arrays, facts["grounding"], runtime, times)
    positions, dropped, end = None, _count(facts.get("dropped", 0)), length
    if "positions" in arrays.all:
        positions = arrays.get("positions", "i", 1)
        end = int(positions[-1]) + 1
        if len(positions) != length or (np.diff(positions) < 1).any() or positions[0] < 0 or end > context:
            raise ValueError
    stored, capacity = arrays.under("cache."), min(length + room, context - (end - length))
    if positions is None:
        cache = cast("StoringRuntime", runtime).load_cache(stored, length, capacity)
    else:
        cache = cast("GappedRuntime", runtime).load_cache(stored, length, capacity, positions)
    rows = np.asarray(embeddings, np.float32)
    return StoredScene(shown, _count(facts["crops"]), rows, flags, grounding, cache, positions, dropped)


def _grounding(
    arrays: _Arrays, facts: dict[str, Any], runtime: Runtime, times: tuple[float, ...] | None
) -> GroundingInputs:
    found = arrays.under("grounding.")
    given = {name: found.get(name) for name in _GROUNDING}
    inputs = GroundingInputs(
        head=cast("PointRuntime", runtime),
        indexable=_count(facts["indexable"]),
        grids=tuple(arrays.get(f"grounding.grid.{index}", "i", 2) for index in range(_count(facts["grids"]))),
        times=times,
        frames=tuple(_numbers(frame) for frame in facts["frames"]),
        **cast("dict[str, Any]", given),
    )
    _check_grounding(inputs)
    return inputs


def _check_grounding(inputs: GroundingInputs) -> None:
    """Raise ValueError for arrays that do not fit each other."""
    n, patches = len(inputs.positions), len(inputs.patch_features)
    shapes = {
        "ids": 1,
        "positions": 1,
        "patch_features": 2,
        "pooling": 2,
        "features": 2,
        "pointable": 1,
        "states": 2,
        "rows": 1,
    }
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if field.name in shapes and value is not None and value.ndim != shapes[field.name]:
            raise ValueError(field.name)
    if len(inputs.pooling) != n or len(inputs.features) != n or len(inputs.frames) > len(inputs.grids):
        raise ValueError
    if any(array is not None and len(array) != n for array in (inputs.pointable, inputs.rows)):
        raise ValueError
    states = len(inputs.ids) if inputs.states is None else len(inputs.states)
    for indexes, least, most in (
        (inputs.positions, 0, len(inputs.ids) if inputs.rows is not None else min(len(inputs.ids), states)),
        *([] if inputs.rows is None else [(inputs.rows, -1, states)]),
        (inputs.pooling, -1, patches),
        *((grid, -1, patches) for grid in inputs.grids),
    ):
        if indexes.size and not least <= int(indexes.min()) <= int(indexes.max()) < most:
            raise ValueError


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _numbers(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise ValueError
    return tuple(float(value) for value in cast("Sequence[float]", values))

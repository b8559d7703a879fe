"""The engines behind one protocol (imported as `molmo_edge.runtimes`): numpy in, numpy out.

A runtime never sees a question, the SDK never sees a tensor library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from molmo_edge.checkpoints.bundle import is_bundle, open_bundle
from molmo_edge.checkpoints.hub_config import is_checkpoint
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.cores import choose_threads
from molmo_edge.system.extras import pip_command

if TYPE_CHECKING:
    from molmo_edge.frontend.crops import Overview
    from molmo_edge.runtimes.llama import LlamaRuntime
    from molmo_edge.runtimes.llama_options import LlamaOptions
    from molmo_edge.runtimes.onnx import OnnxRuntime

DEVICES = ("auto", "cpu", "cuda", "mps", "tensorrt", "coreml", "vulkan")


class EngineError(MolmoEdgeError):
    """An engine that failed at loading or at running."""


class Unavailable(EngineError):  # noqa: N818 (a state, not a mistake)
    """An engine, a device or a component that this installation, or this version, does not have."""


class Cache(Protocol):
    """Keys and values of one sequence."""

    length: int  # positions filled; setting it lower forgets the last ones

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        ...

    def copy(self, capacity: int | None = None) -> Cache:
        """An independent copy: a scene is prefilled once and asked many times.

        `capacity`: positions that fit into the copy, at least `length`; None: as many as here. A conversation that
        outgrows its cache continues in a larger copy. Raises EngineError for a smaller capacity.
        """
        ...


class Runtime(Protocol):
    """One loaded model. Every array is float32 unless it says otherwise."""

    @property
    def config(self) -> MolmoConfig: ...

    @property
    def engine(self) -> str:
        """What runs the decoder, for people to read: "onnxruntime", "llama.cpp", "pytorch bf16"."""
        ...

    def encode_image(self, crops: np.ndarray, masks: np.ndarray, overview: Overview | None = None) -> np.ndarray:
        """crops [n, patches^2, patch_size^2 * 3], masks [n, patches^2] -> image features [n, cells^2, d_model].

        `overview`: of the same image, for a model with a convolutional tower; others do not look at it.
        """
        ...

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """Integer ids [n] -> [n, d_model]."""
        ...

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for `capacity` positions. Raises EngineError past what the model has positions for."""
        ...

    def forward(self, embeddings: np.ndarray, cache: Any) -> np.ndarray:
        """Append embeddings [n, d_model] at `cache.length`; -> logits [embedding_size] of the last position.

        `cache` is one that this runtime made.
        """
        ...

    def close(self) -> None: ...


class PartedRuntime(Runtime, Protocol):
    """A runtime that shows what lies between vision tower and connector: all of ours."""

    def encode_crops(self, crops: np.ndarray, overview: Overview | None = None) -> np.ndarray:
        """crops [n, patches^2, patch_size^2 * 3] -> patch features [n, patches^2, feature_dim], of all towers."""
        ...

    def connect(self, features: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """Patch features and masks [n, patches^2] -> image features [n, cells^2, d_model], as `encode_image` does."""
        ...


def check_capacity(capacity: int, config: MolmoConfig) -> None:
    """Raise EngineError for a cache that has no positions, or more than the model."""
    most = config.decoder.max_position_embeddings
    if not 0 < capacity <= most:
        raise EngineError(
            f"{capacity} positions were asked for, this model has {most}: "
            "use fewer crops, a shorter question or a smaller max_new_tokens"
        )


def check_copy(cache: Cache, capacity: int | None) -> int:
    """The capacity of a copy of `cache`. Raises EngineError where what it holds does not fit."""
    if capacity is not None and capacity < cache.length:
        raise EngineError(f"{cache.length} positions are filled: they do not fit into a copy of {capacity}")
    return cache.capacity if capacity is None else capacity


def check_overview(overview: Overview | None, config: MolmoConfig) -> Overview | None:
    """The overview that a convolutional tower sees, None without such a tower.

    Raises EngineError where the model has a tower and the overview is missing.
    """
    if config.conv_tower is None:
        return None
    if overview is None:
        raise EngineError("this model has a convolutional tower: it needs the overview of the image, not crops alone")
    return overview


def check_rows(embeddings: np.ndarray, cache: Cache) -> np.ndarray:
    """The rows to append, as one block of float32. Raises EngineError for none, or for more than fit into `cache`."""
    if not len(embeddings):
        raise EngineError("there is nothing to run: no embeddings were given")
    if cache.length + len(embeddings) > cache.capacity:
        raise EngineError(f"{len(embeddings)} positions do not fit: {cache.length} of {cache.capacity} are filled")
    return np.ascontiguousarray(embeddings, np.float32)


class BatchRuntime(Runtime, Protocol):
    """A runtime that answers several prompts in one go; see `molmo_edge.runtimes.torch.TorchRuntime`."""

    def prefill_batch(self, prompts: Sequence[np.ndarray], room: int) -> tuple[np.ndarray, Any]:
        """Prompts [n_i, d_model], each with room for `room` tokens -> logits [batch, embedding_size], and a cache."""
        ...

    def forward_batch(self, embeddings: np.ndarray, batch: Any) -> np.ndarray:
        """One token for each prompt, [batch, d_model] -> logits [batch, embedding_size]."""
        ...


def open_runtime(
    directory: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    llama: LlamaOptions | str | None = None,
) -> PartedRuntime:
    """Open a bundle on ONNX Runtime, its decoder on llama.cpp where it is a GGUF, or a checkpoint on PyTorch.

    `precision`: of a checkpoint's weights, "fp32", "bf16", "int8", "nf4", or "auto" (modeling/precision.py); a bundle
    has its own. `threads`: None leaves the number to the engine, which takes the physical cores; in a container,
    its quota. More than there are cores are refused. `llama`: how
    llama.cpp runs, LlamaOptions or their text (molmo_edge.runtimes.llama_options).
    Raises MolmoEdgeError: Unavailable for a device or an engine that is not here, BundleError for a damaged bundle,
    PrecisionError for weights that do not fit into memory.
    """
    directory = Path(directory)
    if device not in DEVICES:
        raise Unavailable(f'device "{device}" is not known; known are {", ".join(DEVICES)}')
    choose_threads(threads)
    if is_bundle(directory):
        if precision != "auto":
            raise EngineError(f'{directory} is a bundle, whose precision was chosen at its export, not "{precision}"')
        bundle = open_bundle(directory)
        if bundle.components["decoder"].engine == "gguf":
            from molmo_edge.runtimes.llama import open_llama_runtime

            return open_llama_runtime(bundle, device=device, threads=threads, options=_llama_options(llama))
        if llama is not None:
            raise EngineError(f"{directory} has no GGUF, so llama.cpp's options are not for it")
        from molmo_edge.runtimes.onnx import open_bundle_runtime

        return open_bundle_runtime(bundle, device=device, threads=threads)
    if llama is not None:
        raise EngineError(f"{directory} is a checkpoint, which does not run on llama.cpp: export it first")
    if is_checkpoint(directory):
        return _pytorch(directory).TorchRuntime(directory, device=device, precision=precision, threads=threads)
    raise EngineError(f"{directory} holds neither a bundle (molmo_edge.json) nor a checkpoint (config.json)")


def check_model_room(directory: str | Path, *, device: str = "auto", precision: str = "auto") -> None:
    """Raise MolmoEdgeError where a bundle or a checkpoint does not fit into the memory that is free.

    `open_runtime` looks by itself; this is for a command that opens several models, before it opens the first.
    """
    if is_bundle(directory):
        from molmo_edge.runtimes.onnx import check_bundle_room, place_bundle

        bundle = open_bundle(directory)
        check_bundle_room(bundle, place_bundle(bundle, device, insist=False))
    else:
        _pytorch(directory).check_checkpoint_room(directory, device=device, precision=precision)


def _pytorch(directory: str | Path) -> Any:
    """molmo_edge.runtimes.torch. Raises Unavailable without PyTorch."""
    try:
        from molmo_edge.runtimes import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise Unavailable(
            f"{directory} is a checkpoint, which runs on PyTorch: {pip_command('torch')}, or export it"
        ) from None
    return torch


def _llama_options(given: Any) -> LlamaOptions:
    from molmo_edge.runtimes.llama_options import LlamaOptions

    if isinstance(given, str):
        return LlamaOptions.parse(given)
    if given is not None and not isinstance(given, LlamaOptions):
        raise EngineError(f"llama must be LlamaOptions, or a text like 'cache=q8_0', it is {type(given).__name__}")
    return given or LlamaOptions()


def open_files(config: MolmoConfig, files: dict[str, Path], *, mapped: bool = False) -> OnnxRuntime | LlamaRuntime:
    """A runtime over the components of a bundle that is not whole yet; none of them is verified.

    `files`: by component; a decoder may be a .gguf, or be left out where nothing is asked of it. `mapped`: weights stay
    in their files, slower, and in next to no memory.
    """
    from molmo_edge.runtimes.onnx import OnnxRuntime

    decoder = files.get("decoder")
    if decoder is None or decoder.suffix != ".gguf":
        return OnnxRuntime(config, files, mapped=mapped)
    from molmo_edge.runtimes.llama import LlamaRuntime

    graphs = OnnxRuntime(config, {name: path for name, path in files.items() if name != "decoder"}, mapped=mapped)
    return LlamaRuntime(config, graphs, decoder)

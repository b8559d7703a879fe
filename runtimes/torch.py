"""A checkpoint, or the weights of a bundle, on PyTorch: the reference for the other engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar, cast

import numpy as np
import torch

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import EngineError, Unavailable
from molmo_edge.frontend.crops import Overview
from molmo_edge.modeling import KVCache, Molmo
from molmo_edge.modeling.decoder import image_attention_mask
from molmo_edge.modeling.point_head import PointHead
from molmo_edge.modeling.precision import choose_precision, compute_dtype
from molmo_edge.modeling.weights import build_model
from molmo_edge.runtimes.protocol import (
    check_arrays,
    check_capacity,
    check_causal,
    check_copy,
    check_image_flags,
    check_overview,
    check_pooling,
    check_rows,
    check_stored,
)
from molmo_edge.runtimes.slot_positions import check_positions, slot_positions
from molmo_edge.system import forks
from molmo_edge.system.cores import choose_threads
from molmo_edge.system.memory import available_memory

P = ParamSpec("P")
T = TypeVar("T")

_CROPS = 4  # crops per run of the vision tower; bounds the memory of activations


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn PyTorch's errors about missing memory, on a GPU or a CPU, into EngineError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        raise EngineError(
            "there is not enough memory: use fewer crops, smaller batches or a smaller precision"
        ) from error


def _inference(method: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        forks.check(cast(TorchRuntime, args[0]).born, "this checkpoint")
        with torch.inference_mode(), _memory_errors():
            return method(*args, **kwargs)

    return run


@dataclass
class TorchCache:
    """A `modeling.KVCache` of batch 1 as a `molmo_edge.runtimes.Cache`."""

    inner: KVCache
    states: np.ndarray | None = None  # see PointRuntime
    positions: np.ndarray | None = None  # see GappedRuntime

    @property
    def capacity(self) -> int:
        """The number of positions that fit."""
        return self.inner.keys.shape[3]

    @property
    def length(self) -> int:
        """The number of filled positions; lowering it forgets the last ones."""
        return self.inner.length

    @length.setter
    def length(self, value: int) -> None:
        self.inner.length = value

    def copy(self, capacity: int | None = None) -> TorchCache:
        """`capacity`: see `molmo_edge.runtimes.Cache`."""
        return TorchCache(self.inner.copy(check_copy(self, capacity)), positions=self.positions)

    def arrays(self) -> dict[str, np.ndarray]:
        """See `molmo_edge.runtimes.protocol.StoredCache`. bfloat16 as int16, because numpy lacks it."""
        return {name: _numpy(tensor[:, :, :, : self.length]) for name, tensor in self._tensors().items()}

    def fill(self, arrays: dict[str, np.ndarray], length: int) -> None:
        """Load what `arrays` returned with `length` positions into an empty cache. Raises EngineError."""
        tensors = {name: tensor[:, :, :, :length] for name, tensor in self._tensors().items()}
        check_arrays(arrays, {name: _numpy(tensor) for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(arrays[name]).view(tensor.dtype))
        self.length = length

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"keys": self.inner.keys, "values": self.inner.values}


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    here = tensor.cpu().contiguous()
    array: np.ndarray = (here.view(torch.int16) if here.dtype == torch.bfloat16 else here).numpy()
    return array


@dataclass
class TorchBatch:
    """Prompts of different lengths, padded at the end to the longest, which the generated tokens follow."""

    inner: KVCache
    lengths: torch.Tensor  # int [batch], of the prompts
    prompt: int  # the length of the longest


class TorchRuntime:
    """A PartedRuntime, BatchRuntime and ImageBlockRuntime over `modeling.Molmo`.

    In a forked child every call raises EngineError, because neither OpenMP nor CUDA works there.
    """

    cache_settings = ""  # see `molmo_edge.runtimes.protocol.StoringRuntime`
    no_gaps = None  # see `molmo_edge.runtimes.protocol.GappedRuntime`

    def __init__(
        self, checkpoint: str | Path, *, device: str = "auto", precision: str = "auto", threads: int | None = None
    ) -> None:
        """Load a checkpoint directory, in hub layout or the reference's own.

        Raises CheckpointError, Unavailable if there is no such device, and PrecisionError if the weights do not fit
        into free memory.
        """
        kind, precision = check_checkpoint_room(checkpoint, device=device, precision=precision)
        config = read_config(checkpoint)
        tensors = open_tensors(checkpoint)
        with _memory_errors():
            model = build_model(config, tensors, where=str(checkpoint), precision=precision, device=kind)
        self._take(model, threads)

    @classmethod
    def from_model(cls, model: Molmo, *, threads: int | None = None) -> TorchRuntime:
        """Wrap a loaded model, which is shared, not copied."""
        runtime = cls.__new__(cls)
        cls._take(runtime, model.eval(), threads)
        return runtime

    def _take(self, model: Molmo, threads: int | None) -> None:
        self.born = forks.generation()  # see molmo_edge.system.forks
        self._threads_before = torch.get_num_threads()  # a setting of the process
        threads = choose_threads(threads)
        if threads is not None:
            torch.set_num_threads(threads)
        self._model: Molmo | None = model
        self.config: MolmoConfig = model.config
        self.device = next(model.parameters()).device

    @property
    def model(self) -> Molmo:
        """Raises EngineError after `close`."""
        if self._model is None:
            raise EngineError("this runtime was closed")
        return self._model

    @property
    def engine(self) -> str:
        """The engine and the precision of the weights, to display."""
        return f"pytorch {self.precision}"

    @property
    def precision(self) -> str:
        """The precision of the weights, "auto" resolved."""
        return self.model.precision

    @_inference
    def encode_image(
        self,
        crops: np.ndarray,
        masks: np.ndarray,
        overview: Overview | None = None,
        pooling: np.ndarray | None = None,
    ) -> np.ndarray:
        """crops float32 [n, patches^2, 588], masks float32 [n, patches^2] -> float32 [n, cells^2, d_model]."""
        if check_overview(overview, self.config) is None and check_pooling(pooling, self.config) is None:
            return self._in_parts(self.model.encode_image, crops, masks)
        return self._connect(self._all_towers(crops, overview), masks, pooling)

    @_inference
    def encode_crops(self, crops: np.ndarray, overview: Overview | None = None) -> np.ndarray:
        """crops float32 [n, patches^2, 588] -> patch features float32 [n, patches^2, feature_dim]."""
        return self._all_towers(crops, overview)

    def _all_towers(self, crops: np.ndarray, overview: Overview | None) -> np.ndarray:
        features = self._in_parts(self.model.vit_features, crops)
        if (seen := check_overview(overview, self.config)) is None or self.model.conv_tower is None:
            return features
        sampled = self.model.conv_tower(self._tensor(seen.pixels[None]), [self._tensor(seen.positions)])
        return np.concatenate([features, sampled.float().cpu().numpy()], axis=-1)

    @_inference
    def connect(self, features: np.ndarray, masks: np.ndarray, pooling: np.ndarray | None = None) -> np.ndarray:
        """float32 [n, patches^2, feature_dim] and [n, patches^2] -> image features [n, cells^2, d_model]."""
        return self._connect(features, masks, pooling)

    def _connect(self, features: np.ndarray, masks: np.ndarray, pooling: np.ndarray | None) -> np.ndarray:
        if (cells := check_pooling(pooling, self.config)) is None:
            return self._in_parts(self.model.connector, features, masks)
        # A cell may have patches of several crops, so all of them go through the connector at once.
        index = self._tensor(cells).long()
        return self.model.connector(self._tensor(features), self._tensor(masks), index).float().cpu().numpy()

    def _in_parts(self, module: Callable[..., torch.Tensor], *arrays: np.ndarray) -> np.ndarray:
        """Run `module` on _CROPS crops at a time."""
        parts = [
            module(*(self._tensor(array[i : i + _CROPS]) for array in arrays)).float().cpu().numpy()
            for i in range(0, len(arrays[0]), _CROPS)
        ]
        return np.concatenate(parts)

    @_inference
    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int [n] -> float32 [n, d_model]."""
        ids = torch.as_tensor(np.asarray(token_ids), dtype=torch.long, device=self.device)
        return self.model.decoder.embed(ids).cpu().numpy()

    def new_cache(self, capacity: int, positions: np.ndarray | None = None) -> TorchCache:
        """Implement `GappedRuntime.new_cache`."""
        forks.check(self.born, "this checkpoint")
        check_capacity(capacity, self.config)
        return TorchCache(self._cache(1, capacity), positions=check_positions(positions, self.config))

    @property
    def cache_format(self) -> str:
        """See `molmo_edge.runtimes.protocol.StoringRuntime`."""
        return self.engine

    @_inference
    def load_cache(
        self, arrays: dict[str, np.ndarray], length: int, capacity: int, positions: np.ndarray | None = None
    ) -> TorchCache:
        """See `molmo_edge.runtimes.protocol.StoringRuntime` and `GappedRuntime`."""
        check_stored(length, capacity)
        cache = self.new_cache(capacity, positions)
        cache.fill(arrays, length)
        return cache

    @_inference
    def forward(self, embeddings: np.ndarray, cache: TorchCache) -> np.ndarray:
        """Append float32 [n, d_model]; -> float32 [embedding_size], the logits of the last position."""
        check_causal(self.config, cache)
        return self._append(embeddings, cache)

    @_inference
    def prefill_image(self, embeddings: np.ndarray, image: np.ndarray, cache: TorchCache) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.ImageBlockRuntime`."""
        flags = self._tensor(check_image_flags(image, embeddings))
        if not self.config.decoder.bidirectional_images:
            return self._append(embeddings, cache)
        return self._append(embeddings, cache, image_attention_mask(flags[None], cache.length))

    @property
    def drafts(self) -> Literal["", "rounded"]:
        """See `molmo_edge.runtimes.protocol.DraftRuntime`. A row of a product may round differently from a vector."""
        return "rounded" if self.config.point_head is None else ""

    @_inference
    def forward_each(self, embeddings: np.ndarray, cache: TorchCache) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.DraftRuntime`."""
        check_causal(self.config, cache)
        return self._logits(self.model.decoder.ln_f(self._states(embeddings, cache)))

    def _append(self, embeddings: np.ndarray, cache: TorchCache, mask: torch.Tensor | None = None) -> np.ndarray:
        states = self._states(embeddings, cache, mask)
        if self.config.point_head is not None:
            cache.states = states.float().cpu().numpy()
        return self._logits(self.model.decoder.ln_f(states[-1]))

    def _states(self, embeddings: np.ndarray, cache: TorchCache, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Append [n, d_model]; -> the states before the final norm, of the same shape."""
        rows, where = self._tensor(check_rows(embeddings, cache)), None
        if cache.positions is not None:
            where = self._tensor(slot_positions(cache.positions, cache.length, cache.length + len(rows)))[None]
        return self.model.decoder.states(rows[None], where, mask, cache.inner)[0]

    @property
    def no_more(self) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        return self._point_head.no_more.detach().float().cpu().numpy()

    @_inference
    def project(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        query, key, slot_query, location = self._point_head.project(self._tensor(states))
        return tuple(part.float().cpu().numpy() for part in (query, key, slot_query, location))  # type: ignore[return-value]

    @_inference
    def project_features(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        keys, rows = self._point_head.project_features(self._tensor(features))
        return keys.float().cpu().numpy(), rows.float().cpu().numpy()

    @_inference
    def vote_queries(self, states: np.ndarray) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        return self._point_head.vote_queries(self._tensor(states)).float().cpu().numpy()

    @_inference
    def vote_keys(self, features: np.ndarray) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        return self._point_head.vote_keys(self._tensor(features)).float().cpu().numpy()

    @property
    def _point_head(self) -> PointHead:
        head = self.model.point_head
        if head is None:
            raise EngineError("this model has no grounding head")
        return head

    @_inference
    def prefill_batch(self, prompts: Sequence[np.ndarray], room: int) -> tuple[np.ndarray, TorchBatch]:
        """Run prompts, float32 [n_i, d_model] -> the logits [batch, embedding_size] of their last positions, a cache.

        `room`: tokens that can follow each. Short prompts are padded at the end, which causal attention never reaches.
        """
        if self.config.decoder.bidirectional_images:
            raise EngineError("prompts of this model cannot be prefilled in a batch: its image tokens are not causal")
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        longest = int(lengths.max())
        x = torch.zeros(len(prompts), longest, prompts[0].shape[1], device=self.device)
        for row, prompt in zip(x, prompts, strict=True):
            row[: len(prompt)] = self._tensor(prompt)
        cache = self._cache(len(prompts), longest + room)
        hidden = self.model.decoder(x, cache=cache)
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]
        return self._logits(last), TorchBatch(cache, lengths, longest)

    @_inference
    def forward_batch(self, embeddings: np.ndarray, batch: TorchBatch) -> np.ndarray:
        """Append one token to each prompt: float32 [batch, d_model] -> float32 logits [batch, embedding_size]."""
        cache, end = batch.inner, batch.inner.length + 1
        slots = torch.arange(end, device=self.device)
        real = (slots < batch.lengths[:, None]) | (slots >= batch.prompt)  # [batch, keys]; padding lies between
        positions = (batch.lengths + cache.length - batch.prompt)[:, None]
        mask = real[:, None, None]  # [batch, 1, 1, keys]
        hidden = self.model.decoder(self._tensor(embeddings)[:, None], positions, mask, cache)
        return self._logits(hidden[:, 0])

    def close(self) -> None:
        """Release the model; its memory is freed unless the caller of `from_model` keeps it."""
        if self._model is not None and self.born == forks.generation():
            torch.set_num_threads(self._threads_before)
        self._model = None

    def _cache(self, batch: int, capacity: int) -> KVCache:
        like = torch.empty(0, dtype=compute_dtype(self.precision), device=self.device)
        return KVCache.empty(self.config.decoder, batch, capacity, like)

    def _logits(self, hidden: torch.Tensor) -> np.ndarray:
        return self.model.decoder.logits(hidden).float().cpu().numpy()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def check_checkpoint_room(directory: str | Path, *, device: str, precision: str) -> tuple[str, str]:
    """Resolve "auto" for device and precision. Raises Unavailable, and PrecisionError if the weights do not fit."""
    kind = _pick_device(device)
    return kind, choose_precision(read_config(directory), precision, kind, _free_memory(kind))


def _pick_device(device: str) -> str:
    if device in ("tensorrt", "coreml", "vulkan"):
        makes = "--engine gguf" if device == "vulkan" else f"--target {device}"
        raise Unavailable(f'"{device}" runs bundles, not checkpoints: molmo-edge export {makes}')
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if here[name])
    if not here[device]:
        raise Unavailable(f"no {device.upper()} device is available to PyTorch: use device='cpu'")
    return device


def _free_memory(device: str) -> int | None:
    """Free memory in bytes. The GPUs of Macs and Jetsons share the system's memory, which cached files can give up."""
    if device != "cuda":
        return available_memory()
    # PyTorch keeps the memory of earlier models.
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    shared = getattr(torch.cuda.get_device_properties(0), "is_integrated", False)
    return max(free, available_memory() or 0) if shared else free

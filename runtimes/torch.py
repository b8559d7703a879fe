"""A checkpoint, or a bundle's weights, on PyTorch: the yardstick that the other engines are held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from molmo_edge.config import MolmoConfig
from molmo_edge.modeling import KVCache, Molmo, load_checkpoint
from molmo_edge.runtimes import EngineError, Unavailable


@dataclass
class TorchCache:
    """A `modeling.KVCache` of batch 1 behind the Cache protocol."""

    inner: KVCache

    @property
    def capacity(self) -> int:
        return self.inner.keys.shape[3]

    @property
    def length(self) -> int:
        return self.inner.length

    @length.setter
    def length(self, value: int) -> None:
        self.inner.length = value

    def copy(self) -> TorchCache:
        return TorchCache(self.inner.copy())


class TorchRuntime:
    """Runtime protocol over `modeling.Molmo`, float32."""

    def __init__(self, checkpoint: str | Path, *, device: str = "auto", threads: int | None = None) -> None:
        """Load a checkpoint directory in hub layout. Raises CheckpointError, or Unavailable without the device."""
        model, _, _ = load_checkpoint(checkpoint, device=_pick_device(device))
        self._take(model, threads)

    @classmethod
    def from_model(cls, model: Molmo, *, threads: int | None = None) -> TorchRuntime:
        """Over a model that is loaded already; it is shared, not copied."""
        runtime = cls.__new__(cls)
        runtime._take(model.eval(), threads)
        return runtime

    def _take(self, model: Molmo, threads: int | None) -> None:
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

    @torch.inference_mode()
    def encode_image(self, crops: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """crops float32 [n, patches^2, 588], masks float32 [n, patches^2] -> float32 [n, cells^2, d_model]."""
        return self.model.encode_image(self._tensor(crops), self._tensor(masks)).float().cpu().numpy()

    @torch.inference_mode()
    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int [n] -> float32 [n, d_model]."""
        ids = torch.as_tensor(np.asarray(token_ids), dtype=torch.long, device=self.device)
        return self.model.decoder.embed(ids).float().cpu().numpy()

    def new_cache(self, capacity: int) -> TorchCache:
        decoder = self.config.decoder
        if capacity > decoder.max_position_embeddings:
            raise EngineError(
                f"the model has {decoder.max_position_embeddings} positions, a cache of {capacity} was asked for"
            )
        return TorchCache(KVCache.empty(decoder, 1, capacity, like=self.model.decoder.embedding.detach()))

    @torch.inference_mode()
    def forward(self, embeddings: np.ndarray, cache: TorchCache) -> np.ndarray:
        """Append float32 [n, d_model]; -> float32 [embedding_size], the logits of the last position."""
        if cache.length + len(embeddings) > cache.capacity:
            raise EngineError(
                f"the cache holds {cache.capacity} positions, {cache.length + len(embeddings)} are needed"
            )
        hidden = self.model.decoder(self._tensor(embeddings)[None], cache=cache.inner)
        return self.model.decoder.logits(hidden[0, -1]).float().cpu().numpy()

    def close(self) -> None:
        """Let go of the model: its memory is free unless the caller of `from_model` keeps it."""
        self._model = None

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _pick_device(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("no CUDA device is available to PyTorch: use device='cpu'")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device

"""The protocol that every engine implements, and the checks that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from molmo_edge.errors import EngineError

if TYPE_CHECKING:
    from molmo_edge.config import MolmoConfig
    from molmo_edge.frontend.crops import Overview


DRAFT_ROWS = 16  # the most positions of `DraftRuntime.forward_each`


class Cache(Protocol):
    """Keys and values of one sequence."""

    length: int  # positions filled; lowering it forgets the last ones

    @property
    def capacity(self) -> int:
        """The number of positions that fit."""
        ...

    def copy(self, capacity: int | None = None) -> Cache:
        """Return an independent copy, with the same capacity unless `capacity` is given.

        Raises EngineError if `capacity` is below `length`.
        """
        ...


class Runtime(Protocol):
    """A loaded model. Arrays are float32 unless stated otherwise."""

    @property
    def config(self) -> MolmoConfig:
        """The configuration of the model."""
        ...

    @property
    def engine(self) -> str:
        """The decoder's engine, to display: "onnxruntime", "llama.cpp", "pytorch bf16"."""
        ...

    def encode_image(
        self,
        crops: np.ndarray,
        masks: np.ndarray,
        overview: Overview | None = None,
        pooling: np.ndarray | None = None,
    ) -> np.ndarray:
        """crops [n, patches^2, patch_size^2 * 3], masks [n, patches^2] -> image features [n, cells^2, d_model].

        `overview`: the same image for a convolutional tower; ignored by models without one. `pooling`: int
        [n_cells, pool^2], for a model that pools across crops (see PreparedImage), which gives [n_cells, d_model].
        """
        ...

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """Integer ids [n] -> embeddings [n, d_model]."""
        ...

    def new_cache(self, capacity: int) -> Cache:
        """Return an empty cache. Raises EngineError if `capacity` exceeds the model's context."""
        ...

    def forward(self, embeddings: np.ndarray, cache: Any) -> np.ndarray:
        """Append embeddings [n, d_model] at `cache.length`; -> logits [embedding_size] of the last position.

        `cache` must come from this runtime.
        """
        ...

    def close(self) -> None:
        """Release the model. Later calls raise EngineError."""
        ...


class PartedRuntime(Runtime, Protocol):
    """A runtime that also runs vision tower and connector separately, as all runtimes of this package do."""

    def encode_crops(self, crops: np.ndarray, overview: Overview | None = None) -> np.ndarray:
        """crops [n, patches^2, patch_size^2 * 3] -> patch features [n, patches^2, feature_dim] of all towers."""
        ...

    def connect(self, features: np.ndarray, masks: np.ndarray, pooling: np.ndarray | None = None) -> np.ndarray:
        """Patch features, and masks [n, patches^2] -> image features [n, cells^2, d_model], as `encode_image`."""
        ...


class ImageBlockRuntime(Runtime, Protocol):
    """A runtime for decoders whose image tokens attend to each other in both directions (`bidirectional_images`)."""

    def prefill_image(self, embeddings: np.ndarray, image: np.ndarray, cache: Any) -> np.ndarray:
        """As `forward`; `image`, bool [n], is True for image tokens: they attend to each other, the rest is causal.

        Pass all images of a prompt in one call, because an image token does not attend to those of a later call.
        Append text with `forward`. For a causal decoder this method is equal to `forward`.
        """
        ...


class PointRuntime(PartedRuntime, Protocol):
    """A runtime for models with a grounding head (MolmoPoint). Its caches have `states`.

    `states` are the hidden states before the final norm of the positions of the last run, [n, d_model].
    """

    @property
    def no_more(self) -> np.ndarray:
        """The key of "no more points", [dim]."""
        ...

    def project(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """States [n, d_model] -> queries and keys of patches, queries of slots [n, dim], location logits [n, 9]."""
        ...

    def project_features(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ViT features of patches [n, feature_dim] -> keys [n, dim], embeddings as tokens [n, d_model]."""
        ...

    def vote_queries(self, states: np.ndarray) -> np.ndarray:
        """States [n, d_model] -> queries of votes and an offset [n, votes * vote_dim + 1], of a head with votes."""
        ...

    def vote_keys(self, features: np.ndarray) -> np.ndarray:
        """ViT features of patches [n, feature_dim] -> keys of votes [n, votes * vote_dim]."""
        ...


class StoredCache(Cache, Protocol):
    """A cache that can be written to a file."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return keys and values of the filled positions, for `StoringRuntime.load_cache`. Copies, or views."""
        ...


class StoringRuntime(Runtime, Protocol):
    """A runtime whose caches can be written to a file and read again, as all runtimes of this package do.

    Where a copy of a cache occupies the memory of the other one, the runtime has `caches_share_memory`, which is True.
    """

    @property
    def cache_format(self) -> str:
        """Who can read the arrays of its caches: the engine, with the precision or version that they depend on."""
        ...

    @property
    def cache_settings(self) -> str:
        """The options that the arrays depend on as well; empty if there are none."""
        ...

    def load_cache(self, arrays: dict[str, np.ndarray], length: int, capacity: int) -> Cache:
        """Return a cache from what `StoredCache.arrays` returned when it had `length` positions.

        Raises EngineError for arrays that do not fit this model or `capacity`.
        """
        ...


class GappedRuntime(StoringRuntime, Protocol):
    """A runtime whose caches can have gaps between their positions, where tokens of an image were left out.

    `positions`: int [n], rising, those of the first n embeddings of the cache; later ones continue from the last.
    None: without gaps. `length` and `capacity` of a cache count embeddings. Copies have the same positions.
    """

    @property
    def no_gaps(self) -> str | None:
        """Why there cannot be gaps, as a sentence; None: there can be."""
        ...

    def new_cache(self, capacity: int, positions: np.ndarray | None = None) -> Cache:
        """As `Runtime.new_cache`. Raises EngineError for positions that do not rise, or without support for gaps."""
        ...

    def load_cache(
        self, arrays: dict[str, np.ndarray], length: int, capacity: int, positions: np.ndarray | None = None
    ) -> Cache:
        """As `StoringRuntime.load_cache`."""
        ...


class DraftRuntime(Runtime, Protocol):
    """A runtime that can give the logits of several positions of one run, as all runtimes of this package do."""

    @property
    def drafts(self) -> Literal["", "rounded", "exact"]:
        """How far `forward_each` can be used.

        "": not with this model. "rounded": its logits differ from those of single runs in rounding. "exact": they have
        the same bits, if the kernels of this machine compute rows independently of each other.
        """
        ...

    def forward_each(self, embeddings: np.ndarray, cache: Any) -> np.ndarray:
        """Append embeddings [n, d_model], n <= DRAFT_ROWS, like `forward`; -> logits [n, embedding_size] of all."""
        ...


class BatchRuntime(Runtime, Protocol):
    """A runtime that decodes several prompts in one batch (`molmo_edge.runtimes.torch.TorchRuntime`)."""

    def prefill_batch(self, prompts: Sequence[np.ndarray], room: int) -> tuple[np.ndarray, Any]:
        """Prompts [n_i, d_model], each with room for `room` new tokens -> logits [batch, embedding_size], a cache."""
        ...

    def forward_batch(self, embeddings: np.ndarray, batch: Any) -> np.ndarray:
        """One token per prompt, [batch, d_model] -> logits [batch, embedding_size]."""
        ...


def check_capacity(capacity: int, config: MolmoConfig) -> None:
    """Raise EngineError unless `capacity` is between 1 and the model's context length."""
    most = config.decoder.max_position_embeddings
    if not 0 < capacity <= most:
        raise EngineError(
            f"a cache of {capacity} positions was requested, but the model's context has {most}: "
            "use fewer crops, a shorter question or a smaller max_new_tokens"
        )


def check_copy(cache: Cache, capacity: int | None) -> int:
    """Return the capacity of a copy of `cache`. Raises EngineError if its contents do not fit."""
    if capacity is not None and capacity < cache.length:
        raise EngineError(f"the cache holds {cache.length} positions: they do not fit into a copy of {capacity}")
    return cache.capacity if capacity is None else capacity


def check_stored(length: int, capacity: int) -> None:
    """Raise EngineError unless `length` positions from a file fit into `capacity`."""
    if not 0 <= length <= capacity:
        raise EngineError(f"{length} stored positions do not fit into a cache of {capacity}")


def check_arrays(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Raise EngineError unless `arrays` have the names, shapes and dtypes of `expected`."""
    found, needed = ({n: (a.dtype, a.shape) for n, a in some.items()} for some in (arrays, expected))
    if found != needed:
        raise EngineError("these keys and values are not of this model, or have another precision")


def check_overview(overview: Overview | None, config: MolmoConfig) -> Overview | None:
    """Return the overview for the convolutional tower, or None for a model without one.

    Raises EngineError if the model has such a tower and the overview is missing.
    """
    if config.conv_tower is None:
        return None
    if overview is None:
        raise EngineError("this model has a convolutional tower: pass the overview of the image with its crops")
    return overview


def check_pooling(pooling: np.ndarray | None, config: MolmoConfig) -> np.ndarray | None:
    """Return the patches of each cell, or None for a model that pools within crops. Raises EngineError if missing."""
    if not config.image.pools_across_crops:
        return None
    if pooling is None:
        raise EngineError("this model pools patches across crops: pass the pooling of the image with its crops")
    return pooling


def check_causal(config: MolmoConfig, cache: Cache) -> None:
    """Raise EngineError if `forward` would start the cache of a decoder that needs `prefill_image`."""
    if config.decoder.bidirectional_images and cache.length == 0:
        raise EngineError(
            "the image tokens of this model attend to each other in both directions: start its cache with prefill_image"
        )


def check_image_flags(image: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Return `image` as bool [n]. Raises EngineError unless it has one value per embedding."""
    if np.shape(image) != (len(embeddings),):
        raise EngineError(f"{len(embeddings)} embeddings need as many image flags, they have shape {np.shape(image)}")
    return np.asarray(image, bool)


def check_rows(embeddings: np.ndarray, cache: Cache) -> np.ndarray:
    """Return `embeddings` as contiguous float32. Raises EngineError if there are none, or they do not fit."""
    if not len(embeddings):
        raise EngineError("forward needs at least one embedding")
    if cache.length + len(embeddings) > cache.capacity:
        raise EngineError(
            f"{len(embeddings)} positions do not fit into the cache: {cache.length} of {cache.capacity} are filled"
        )
    return np.ascontiguousarray(embeddings, np.float32)

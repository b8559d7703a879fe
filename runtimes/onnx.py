"""A bundle on ONNX Runtime, on the CPU or with the providers of molmo_edge.runtimes.providers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from molmo_edge.checkpoints.bundle import Bundle
from molmo_edge.checkpoints.manifest import GRAPHS, POINT_HEAD
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import EngineError, Unavailable, first_line
from molmo_edge.frontend.crops import Overview
from molmo_edge.runtimes.bundle_room import check_bundle_room, memory_is_scarce
from molmo_edge.runtimes.memory_plan import CHUNK, SCARCE_CHUNK
from molmo_edge.runtimes.onnx_cache import OnnxCache
from molmo_edge.runtimes.onnx_sessions import import_onnxruntime, is_large, load_session, version_numbers
from molmo_edge.runtimes.protocol import (
    Cache,
    check_capacity,
    check_causal,
    check_image_flags,
    check_overview,
    check_pooling,
    check_rows,
    check_stored,
)
from molmo_edge.runtimes.providers import Placement, place
from molmo_edge.runtimes.rotary_inputs import table_names
from molmo_edge.runtimes.slot_positions import check_positions
from molmo_edge.system import forks
from molmo_edge.system.cores import available_cores, choose_threads
from molmo_edge.system.memory import give_back

_T = TypeVar("_T")

_SMALL_CROPS = 8  # crops per run of a small vision tower


def open_bundle_runtime(
    bundle: Bundle,
    *,
    device: str = "auto",
    threads: int | None = None,
    gaps: bool = False,
    max_crops: int | None = None,
    image_tokens: float | None = None,
) -> OnnxRuntime:
    """Open a verified bundle. `gaps`: see OnnxRuntime. `max_crops`, `image_tokens`: see open_runtime.

    Raises EngineError or Unavailable.
    """
    check_components(bundle, (*GRAPHS, *_point_head(bundle)))
    placement = place_bundle(bundle, device)
    weights = check_bundle_room(bundle, placement)
    files = {name: bundle.path(name) for name in (*GRAPHS, *_point_head(bundle))}
    drafting = bundle.components["decoder"].drafting
    return OnnxRuntime(
        bundle.config,
        files,
        threads=threads,
        placement=placement,
        gaps=gaps,
        drafting=drafting,
        scarce=memory_is_scarce(bundle.config, weights, max_crops=max_crops, image_tokens=image_tokens),
    )


def _point_head(bundle: Bundle) -> tuple[str, ...]:
    return () if bundle.config.point_head is None else (POINT_HEAD,)


def check_components(bundle: Bundle, names: Sequence[str]) -> None:
    """Raise Unavailable for a component of another engine, or one that needs a newer onnxruntime."""
    for name in names:
        component = bundle.components[name]
        if component.engine != "onnx":
            raise Unavailable(
                f'{bundle.directory}: {name} needs the engine "{component.engine}", which this version does not have'
            )
        needed, onnxruntime = component.onnxruntime, import_onnxruntime()
        if needed and version_numbers(onnxruntime.__version__) < version_numbers(needed):
            raise Unavailable(
                f"{bundle.directory}: {component.file} needs onnxruntime {needed} or later, "
                f"{onnxruntime.__version__} is installed: pip install --upgrade onnxruntime"
            )


def place_bundle(bundle: Bundle, device: str, *, insist: bool = True) -> Placement:
    """Choose providers. If this onnxruntime lacks the device: raise Unavailable, or without `insist` use the CPU."""
    identity = bundle.components["vision_encoder"].sha256[:16] + bundle.components["connector"].sha256[:16]
    try:
        return place(device, bundle.device, import_onnxruntime().get_available_providers(), bundle.config, identity)
    except Unavailable:
        if insist:
            raise
        return Placement()


class OnnxRuntime:
    """The four graphs of a bundle; `files` maps GRAPHS to paths. They load in parallel in the background.

    A forked child loads a graph again when it first uses it.
    """

    engine = "onnxruntime"
    cache_format = "onnxruntime"
    cache_settings = ""

    def __init__(
        self,
        config: MolmoConfig,
        files: dict[str, Path],
        *,
        threads: int | None = None,
        mapped: bool = False,
        placement: Placement = Placement(),  # noqa: B008 (frozen)
        gaps: bool = False,
        drafting: bool = False,
        scarce: bool = False,
    ) -> None:
        """`mapped`: leave weights in their files, which is slower but uses almost no memory.

        `scarce`: the decoder's mapped weights do not fit into the memory that is left. Then the vision tower is closed
        after each image, and loaded again for the next one, and long prompts run in larger parts.

        `gaps`: load the decoder so that positions can have gaps, see GappedRuntime. `drafting`: the decoder was
        exported with this option, see molmo_edge.export.decoder_graph.
        """
        self.config = config
        self.drafts: Literal["", "exact"] = "exact" if drafting else ""  # see DraftRuntime
        self._replaced = table_names(config.decoder) if gaps else ()  # initializers of the decoder
        self._files, self._mapped, self._placement = files, mapped, placement
        self._scarce, self._chunk = scarce, SCARCE_CHUNK if scarce else CHUNK
        self._threads = choose_threads(threads)
        # One crop of a large tower keeps all cores busy. In a small tower operators are so short that waking the
        # threads takes as long: batching nano's crops is an eighth faster.
        small = "vision_encoder" in files and not is_large(files["vision_encoder"])
        self._crops_at_once = max(placement.crops_at_once, _SMALL_CROPS if small else 1)
        self._lock = threading.Lock()  # for the two below
        self._pool: ThreadPoolExecutor | None = None
        # None: not loading yet; empty: closed. A session that was released, or did not load, is None.
        self._sessions: dict[str, Future[Any] | None] | None = None
        self._begin()
        forks.on_fork(self)

    def _begin(self) -> dict[str, Future[Any] | None]:
        """Start to load all sessions; their first use waits for them."""
        order = sorted(self._files, key=lambda name: self._files[name].stat().st_size, reverse=True)
        # Largest first. Loading keeps a core busy: more parallel loads than cores would not be faster, and `close`
        # could cancel fewer.
        self._pool = ThreadPoolExecutor(min(len(order), available_cores()), thread_name_prefix="molmo-edge-load")
        self._sessions = {name: self._pool.submit(self._load, name) for name in order}
        for load in self._sessions.values():
            assert load is not None
            forks.watch_load(load)
        self._pool.shutdown(wait=False)  # its threads end after the last load
        return self._sessions

    def _load(self, name: str) -> Any:
        return load_session(
            self._files[name],
            1 if name == "embed_tokens" else self._threads,
            self._placement.of(name),
            mapped=self._mapped,
            spin=name == "decoder" and is_large(self._files[name]),
            replaced=self._replaced if name == "decoder" else (),
        )

    def forked(self) -> None:
        """See molmo_edge.system.forks."""
        self._lock, self._pool = threading.Lock(), None
        if self._sessions:
            self._sessions = None

    def encode_image(
        self,
        crops: np.ndarray,
        masks: np.ndarray,
        overview: Overview | None = None,
        pooling: np.ndarray | None = None,
    ) -> np.ndarray:
        """Implement `Runtime.encode_image`."""
        return self.connect(self.encode_crops(crops, overview), masks, pooling)

    def encode_crops(self, crops: np.ndarray, overview: Overview | None = None) -> np.ndarray:
        """crops [n, patches^2, patch_size^2 * 3] -> patch features [n, patches^2, feature_dim]."""
        try:
            return self._encode(crops, overview)
        finally:  # also after an error: the decoder needs the memory
            if self._scarce:
                self._release("vision_encoder")

    def _encode(self, crops: np.ndarray, overview: Overview | None) -> np.ndarray:
        crops, some = np.ascontiguousarray(crops, np.float32), self._crops_at_once
        if (seen := check_overview(overview, self.config)) is not None:
            # All crops at once, so that the convolutional tower runs once.
            whole = {"pixels": seen.pixels[None], "positions": seen.positions}
            return self._run("vision_encoder", {"crops": crops, **whole})
        parts = (crops[i : i + some] for i in range(0, len(crops), some))
        return np.concatenate([self._run("vision_encoder", {"crops": part}) for part in parts])

    def connect(self, features: np.ndarray, masks: np.ndarray, pooling: np.ndarray | None = None) -> np.ndarray:
        """features [n, patches^2, feature_dim], masks [n, patches^2] -> image features [n, cells^2, d_model]."""
        inputs = {"features": np.ascontiguousarray(features, np.float32)}
        if self.config.pad_embed:
            inputs["masks"] = np.ascontiguousarray(masks, np.float32)
        if (cells := check_pooling(pooling, self.config)) is not None:
            inputs["pooling"] = np.ascontiguousarray(cells, np.int64)
        return self._run("connector", inputs)

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """Implement `Runtime.embed`. Raises EngineError for ids outside the embedding."""
        ids = np.ascontiguousarray(token_ids, np.int64)
        rows = self.config.decoder.embedding_size + self.config.decoder.additional_vocab_size
        if ids.size and (ids.min() < 0 or ids.max() >= rows):
            raise EngineError(f"token ids must be in 0..{rows - 1}, not {ids.min()}..{ids.max()}")
        return self._run("embed_tokens", {"ids": ids})

    @property
    def no_gaps(self) -> str | None:
        """See `molmo_edge.runtimes.protocol.GappedRuntime`."""
        if self._replaced:
            return None
        return "its decoder was not opened for positions with gaps: open the model with image_tokens"

    def new_cache(self, capacity: int, positions: np.ndarray | None = None) -> OnnxCache:
        """Implement `GappedRuntime.new_cache`."""
        check_capacity(capacity, self.config)
        where = check_positions(positions, self.config)
        if where is not None and self.no_gaps:
            raise EngineError(f"this model cannot leave out image tokens: {self.no_gaps}")
        session, logits = self._session("decoder"), self.config.decoder.n_logits
        gaps = None if where is None else (self.config.decoder, where)
        make = functools.partial(OnnxCache.empty, session, capacity, logits, self._placement.cache, gaps)
        return make() if self._placement.cache == "cpu" else _guard("decoder", make)  # a GPU may be out of memory

    def load_cache(
        self, arrays: dict[str, np.ndarray], length: int, capacity: int, positions: np.ndarray | None = None
    ) -> OnnxCache:
        """See `molmo_edge.runtimes.protocol.StoringRuntime` and `GappedRuntime`."""
        check_stored(length, capacity)
        cache = self.new_cache(capacity, positions)
        cache.fill(arrays, length)
        return cache

    def forward(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        """Implement `Runtime.forward`."""
        check_causal(self.config, cache)
        return self._append(embeddings, None, cache)

    def prefill_image(self, embeddings: np.ndarray, image: np.ndarray, cache: Cache) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.ImageBlockRuntime`."""
        return self._append(embeddings, check_image_flags(image, embeddings), cache)

    def forward_each(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.DraftRuntime`."""
        if not self.drafts:
            raise EngineError("this decoder gives logits of one position only: export it with the option drafting")
        check_causal(self.config, cache)
        return _guard("decoder", functools.partial(_own(cache).append_each, check_rows(embeddings, cache)))

    def _append(self, embeddings: np.ndarray, image: np.ndarray | None, cache: Cache) -> np.ndarray:
        cache = _own(cache)
        embeddings = check_rows(embeddings, cache)
        first, states = 0, []
        if image is not None and self.config.decoder.bidirectional_images and image.any():
            first = int(np.flatnonzero(image)[-1]) + 1  # image tokens attend to each other: they run in one chunk
            logits = _guard("decoder", functools.partial(cache.append, embeddings[:first], image[:first]))
            states.append(cache.states)
        for start in range(first, len(embeddings), self._chunk):
            logits = _guard("decoder", functools.partial(cache.append, embeddings[start : start + self._chunk]))
            states.append(cache.states)
        if len(states) > 1 and self.config.point_head is not None:
            cache.states = np.concatenate([part for part in states if part is not None])
        return logits

    @property
    def no_more(self) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        return self._run_point_head(("no_more",))[0]

    def project(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        query, key, slot_query, location = self._run_point_head(
            ("patch_query", "patch_key", "slot_query", "location"), states=states
        )
        return query, key, slot_query, location

    def project_features(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        keys, rows = self._run_point_head(("slot_key", "embedding"), features=features)
        return keys, rows

    def vote_queries(self, states: np.ndarray) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        return self._run_point_head(("vote_query",), states=states)[0]

    def vote_keys(self, features: np.ndarray) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        return self._run_point_head(("vote_key",), features=features)[0]

    def _run_point_head(self, outputs: Sequence[str], **given: np.ndarray) -> list[np.ndarray]:
        widths = {"states": self.config.decoder.d_model, "features": self.config.feature_dim}
        inputs = {name: np.empty((0, width), np.float32) for name, width in widths.items()}
        inputs |= {name: np.ascontiguousarray(rows, np.float32) for name, rows in given.items()}
        found: list[np.ndarray] = _guard(
            POINT_HEAD, functools.partial(self._session(POINT_HEAD).run, list(outputs), inputs)
        )
        return found

    def close(self) -> None:
        """Release the sessions. A cache that is still referenced keeps the decoder's session alive.

        Loads that have not started are cancelled. A running load cannot be stopped: it ends in the background, and
        the program waits for it at exit.
        """
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
            self._sessions = {}

    def _release(self, name: str) -> None:
        """Free a session; its next use loads it again."""
        with self._lock:
            if self._sessions:
                self._sessions[name] = None
        give_back()

    def _session(self, name: str) -> Any:
        with self._lock:
            sessions = self._begin() if self._sessions is None else self._sessions
            future = sessions.get(name)
            if future is None and name in sessions:  # it was released, or did not load
                pool = ThreadPoolExecutor(1, thread_name_prefix="molmo-edge-load")
                future = sessions[name] = pool.submit(self._load, name)
                forks.watch_load(future)
                pool.shutdown(wait=False)
        try:
            if future is not None:
                return future.result()
        except CancelledError:  # another thread called `close` during the wait
            pass
        except Exception:
            self._forget(name, future)
            raise
        raise EngineError("this runtime was closed")

    def _forget(self, name: str, load: Future[Any] | None) -> None:
        """Load a session again at its next use, because `load` failed: the memory may be free by then."""
        with self._lock:
            if self._sessions and self._sessions.get(name) is load:
                self._sessions[name] = None

    def _run(self, name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        outputs: list[np.ndarray] = _guard(name, functools.partial(self._session(name).run, None, inputs))
        return outputs[0]


def _own(cache: Cache) -> OnnxCache:
    if not isinstance(cache, OnnxCache):
        raise EngineError("this cache belongs to another runtime")
    return cache


def _guard(name: str, run: functools.partial[_T]) -> _T:
    """Run a graph. Raises EngineError with the component's name."""
    try:
        return run()
    except MemoryError:
        raise
    except Exception as error:  # the exceptions of onnxruntime have no public base class
        raise EngineError(f"{name} failed in onnxruntime: {first_line(error)}") from error

"""A bundle with a GGUF decoder: vision, connector and embeddings on ONNX Runtime, the decoder on llama.cpp.

llama.cpp gets embeddings for both image and text, so it does not have to support Molmo. Embeddings come from the
bundle's own table in full precision: the GGUF's table is quantised, and may lack Molmo's image tokens.
"""

from __future__ import annotations

import dataclasses
import platform
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from molmo_edge.checkpoints.bundle import Bundle, load_tokenizer
from molmo_edge.checkpoints.gguf_header import check_decoder
from molmo_edge.checkpoints.gguf_layout import state_layer
from molmo_edge.checkpoints.manifest import GRAPHS, POINT_HEAD
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import EngineError
from molmo_edge.frontend.crops import image_token_count
from molmo_edge.runtimes.bundle_room import check_bundle_room, memory_is_scarce
from molmo_edge.runtimes.llama_library import WITHOUT_AMX, has_amx, load_library, on_gpu
from molmo_edge.runtimes.llama_native import CHUNK, LlamaContext, LlamaModel, wait_for
from molmo_edge.runtimes.llama_options import LlamaOptions
from molmo_edge.runtimes.onnx import OnnxRuntime, check_components, place_bundle
from molmo_edge.runtimes.protocol import Cache, check_capacity, check_causal, check_copy, check_rows, check_stored
from molmo_edge.system import forks
from molmo_edge.system.cores import choose_threads, physical_cores
from molmo_edge.system.memory import available_memory

# llama_decode checks that the positions of a batch continue those of its sequence, and each other (0.3.36).
NO_GAPS = "llama.cpp refuses positions with gaps; export the decoder to ONNX, or use the checkpoint on PyTorch"
_SPARE = 1_500_000_000  # bytes to leave free when weights are repacked
_BETTER_REPACKED = ("q4_0", "iq4_nl")  # on x86; with K-quants, repacking doubled the time of a prompt


def open_llama_runtime(
    bundle: Bundle, *, device: str, threads: int | None, options: LlamaOptions, max_crops: int | None = None
) -> LlamaRuntime:
    """Open a verified bundle. `max_crops`: see molmo_edge.runtimes.open_runtime.

    Raises BundleError for a GGUF of another model, EngineError or Unavailable.
    """
    load_library()
    gpu = on_gpu(device) and options.gpu_layers != 0
    check_decoder(bundle.path("decoder"), bundle.config, load_tokenizer(bundle.directory))
    parts = [name for name in GRAPHS if name != "decoder"]
    if bundle.config.point_head is not None:
        parts.append(POINT_HEAD)
    check_components(bundle, parts)
    # If this onnxruntime lacks the device, the graphs run on the CPU: on a Jetson, llama.cpp with CUDA is easier to
    # get than onnxruntime with CUDA.
    placement = place_bundle(bundle, device, insist=False)
    weights = check_bundle_room(bundle, placement)
    options = dataclasses.replace(options, repack=choose_repack(bundle, options, gpu=gpu))
    files = {name: bundle.path(name) for name in parts}
    scarce = not gpu and memory_is_scarce(bundle.config, weights, max_crops=max_crops, cache=options.cache)
    graphs = OnnxRuntime(bundle.config, files, threads=threads, placement=placement, scarce=scarce)
    return LlamaRuntime(bundle.config, graphs, bundle.path("decoder"), threads=threads, gpu=gpu, options=options)


def open_watched(
    bundle: Bundle,
    watch: Any,
    *,
    threads: int | None = None,
    options: LlamaOptions = LlamaOptions(),  # noqa: B008 (frozen)
) -> Callable[[int], LlamaCache]:
    """Open only the decoder of a verified bundle, on the CPU; return a function from a capacity to a new cache.

    `watch`: a `llama_cpp.ggml_backend_sched_eval_callback` that is called during the caches' runs. It must return True
    when `ask` is false, or llama.cpp silently skips the rest of the run. Raises the errors of `open_llama_runtime`.
    """
    load_library()
    check_decoder(bundle.path("decoder"), bundle.config, load_tokenizer(bundle.directory))
    options = dataclasses.replace(options, repack=choose_repack(bundle, options, gpu=False))
    model = LlamaModel(
        bundle.path("decoder"), choose_threads(threads) or physical_cores(), False, options, threading.Event()
    )
    return lambda capacity: LlamaCache(LlamaContext(model, capacity, watch))


class LlamaRuntime:
    """A runtime of ONNX graphs and a GGUF decoder, which load in the background.

    In a forked child the decoder raises EngineError: llama.cpp's threads do not exist there.
    """

    engine = "llama.cpp"
    no_gaps = NO_GAPS  # see `molmo_edge.runtimes.protocol.GappedRuntime`
    caches_share_memory = True  # see `molmo_edge.runtimes.protocol.StoringRuntime`

    def __init__(
        self,
        config: MolmoConfig,
        graphs: OnnxRuntime,
        decoder: Path,
        *,
        threads: int | None = None,
        gpu: bool = False,
        options: LlamaOptions = LlamaOptions(),  # noqa: B008 (frozen)
    ) -> None:
        """`graphs`: all but the decoder; closed with this runtime. `gpu`: run the decoder on a GPU.

        The GGUF is not checked: see `molmo_edge.checkpoints.gguf_header.check_decoder`.
        """
        self.config, self._graphs = config, graphs
        self._options, self._gpu = options, gpu
        self._stop = threading.Event()
        loader = ThreadPoolExecutor(1, thread_name_prefix="molmo-edge-load")
        layer = state_layer(config)
        self._loading: Future[LlamaModel] | None = loader.submit(
            LlamaModel,
            decoder,
            choose_threads(threads) or physical_cores(),
            gpu,
            options,
            self._stop,
            _image_block(config),
            None if layer is None else (layer, config.decoder.d_model),
        )
        self._born = forks.generation()
        forks.watch_load(self._loading)
        loader.shutdown(wait=False)
        self.encode_image, self.encode_crops, self.connect = graphs.encode_image, graphs.encode_crops, graphs.connect
        self.embed = graphs.embed
        self.project, self.project_features = graphs.project, graphs.project_features  # see PointRuntime
        self.vote_queries, self.vote_keys = graphs.vote_queries, graphs.vote_keys

    def new_cache(self, capacity: int) -> LlamaCache:
        """Implement `Runtime.new_cache`."""
        check_capacity(capacity, self.config)
        return LlamaCache(LlamaContext(self.model, capacity))

    def restore(self, state: bytes | bytearray, length: int, capacity: int) -> LlamaCache:
        """Return a cache from what `LlamaCache.state` returned when it had `length` positions.

        Raises EngineError for a state that does not fit this model, these options or `capacity`.
        """
        check_stored(length, capacity)
        cache = self.new_cache(capacity)
        cache.fill(state, length)
        return cache

    @property
    def cache_format(self) -> str:
        """See `molmo_edge.runtimes.protocol.StoringRuntime`. llama.cpp's format of states may change with versions."""
        return f"llama.cpp {load_library().__version__}"

    @property
    def cache_settings(self) -> str:
        """See `molmo_edge.runtimes.protocol.StoringRuntime`. Without flash attention the values are transposed."""
        return (
            f"{self._options.cache}, flash attention {self._options.flash_attention}, {'gpu' if self._gpu else 'cpu'}"
        )

    def load_cache(self, arrays: dict[str, np.ndarray], length: int, capacity: int) -> LlamaCache:
        """See `molmo_edge.runtimes.protocol.StoringRuntime`."""
        if list(arrays) != ["state"] or arrays["state"].dtype != np.uint8 or arrays["state"].ndim != 1:
            raise EngineError("these keys and values are not of llama.cpp")
        return self.restore(bytearray(arrays["state"]), length, capacity)

    def forward(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        """Implement `Runtime.forward`."""
        return self._own(cache).append(self._checked(embeddings, cache))

    def _own(self, cache: Cache) -> LlamaCache:
        if not isinstance(cache, LlamaCache):
            raise EngineError("this cache belongs to another runtime")
        return cache

    def _checked(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        embeddings = check_rows(embeddings, cache)
        if embeddings.shape[1] != self.config.decoder.d_model:
            raise EngineError(f"embeddings must be {self.config.decoder.d_model} wide, not {embeddings.shape[1]}")
        check_causal(self.config, cache)
        return embeddings

    @property
    def drafts(self) -> Literal["", "rounded"]:
        """See `molmo_edge.runtimes.protocol.DraftRuntime`. Attention is computed in another order for one position."""
        return "rounded" if self.config.point_head is None else ""

    def forward_each(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.DraftRuntime`."""
        return self._own(cache).append_each(self._checked(embeddings, cache))

    def prefill_image(self, embeddings: np.ndarray, image: np.ndarray, cache: Cache) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.ImageBlockRuntime`.

        Raises EngineError for several images with text between them: llama.cpp can make one run of positions attend to
        each other in both directions, but not two runs with causal positions in between.
        """
        own, rows = self._own(cache), check_rows(embeddings, cache)
        where = np.flatnonzero(image)
        if not len(where) or not self.config.decoder.bidirectional_images:
            return own.append(rows)
        self.check_images(image)
        first, end = int(where[0]), int(where[-1]) + 1
        logits, states = np.empty(0, np.float32), []
        for part, block in ((rows[:first], False), (rows[first:end], True), (rows[end:], False)):
            if len(part):
                logits = own.append(part, block=block)
                states.append(own.states)
        own.states = _joined(states)
        return logits

    @property
    def no_more(self) -> np.ndarray:
        """See `molmo_edge.runtimes.protocol.PointRuntime`."""
        return self._graphs.no_more

    def check_images(self, image: np.ndarray) -> None:
        """Raise EngineError for a prompt that `prefill_image` refuses, before its images are encoded."""
        where = np.flatnonzero(image)
        if self.config.decoder.bidirectional_images and len(where) and where[-1] - where[0] + 1 != len(where):
            raise EngineError(
                "llama.cpp has no attention mask for several images, or the frames of a video, in one prompt: "
                "ask about one image, or export the decoder to ONNX"
            )

    def close(self) -> None:
        """Release model and sessions. A cache that is still referenced keeps the model in memory."""
        self._stop.set()
        self._loading = None
        self._graphs.close()

    @property
    def model(self) -> LlamaModel:
        """The loaded model; waits for it. Raises EngineError after `close` and in a forked child."""
        forks.check(self._born, "this model of llama.cpp")
        if (loading := self._loading) is None:
            raise EngineError("this runtime was closed")
        return wait_for(loading)


def _image_block(config: MolmoConfig) -> int:
    """The most positions of an image that attend to each other in both directions; 0 for a causal decoder.

    With the model's own limit on crops. A cache makes room for more when it gets more.
    """
    if not config.decoder.bidirectional_images:
        return 0
    most = config.image.max_crops
    tilings = ((rows, most // rows) for rows in range(1, most + 1))
    return max((image_token_count(config.image, tiling) for tiling in tilings), default=0)


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The states of several runs, if the model has them."""
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None


class LlamaCache:
    """A sequence. Copies share a context, and their common prefix in it, until its memory is full."""

    def __init__(self, context: LlamaContext, sequence: int | None = None, length: int = 0) -> None:
        """`sequence`: of `context`, with `length` positions; None: a new one of a new context."""
        self._born = forks.generation()
        self.length = length
        self.capacity = context.capacity
        self.states: np.ndarray | None = None  # see PointRuntime
        self._filled = length  # positions that llama.cpp may hold; those after `length` are forgotten at the next run
        if sequence is None:
            sequence = context.new_sequence()
            assert sequence is not None  # a new context has free sequences
        self._take(context, sequence)

    def _take(self, context: LlamaContext, sequence: int) -> None:
        self.context, self._sequence = context, sequence
        self._drop = weakref.finalize(self, context.dropped.append, sequence)
        self._drop.atexit = False

    def copy(self, capacity: int | None = None) -> LlamaCache:
        """See `molmo_edge.runtimes.Cache`. With the same capacity a copy shares the context while it has sequences."""
        room = check_copy(self, capacity)
        self._forget_rest()
        if room == self.capacity and (sequence := self.context.new_sequence()) is not None:
            twin = LlamaCache(self.context, sequence, self.length)
            self.context.share(self._sequence, sequence, self.length)
            return twin
        return LlamaCache(*self._elsewhere(room), self.length)

    def append(self, embeddings: np.ndarray, *, block: bool = False) -> np.ndarray:
        """Run [n, d_model] at the end; -> logits [embedding_size]. `length` changes only if the whole run succeeds.

        `block`: the rows attend to each other in both directions; they run at once.
        """
        self._forget_rest()
        if block and len(embeddings) > self.context.at_once:  # more crops than the model's own limit
            self._move_out(len(embeddings))
        done, size, states = self.length, len(embeddings) if block else CHUNK, []
        for start in range(0, len(embeddings), size):
            part = embeddings[start : start + size]
            self._filled = done + len(part)  # set before the run: an interrupted run may leave some
            logits, part_states = self._run(part, done, block)
            states.append(part_states)
            done += len(part)
        self.length, self.states = done, _joined(states)
        last: np.ndarray = logits[-1]
        return last

    def append_each(self, embeddings: np.ndarray) -> np.ndarray:
        """Like `append`, for at most DRAFT_ROWS rows; -> the logits of each, [n, embedding_size]."""
        self._forget_rest()
        self._filled = self.length + len(embeddings)
        logits, _ = self._run(embeddings, self.length, block=False, each=True)
        self.length = self._filled
        return logits

    def state(self) -> bytearray:
        """Return keys and values in llama.cpp's format, for `LlamaRuntime.restore` with the same bundle and options."""
        self._forget_rest()
        return self.context.state(self._sequence)

    def arrays(self) -> dict[str, np.ndarray]:
        """See `molmo_edge.runtimes.protocol.StoredCache`."""
        return {"state": np.frombuffer(self.state(), np.uint8)}

    def fill(self, state: bytes | bytearray, length: int) -> None:
        """Load what `state` returned into an empty cache, see `LlamaRuntime.restore`."""
        forks.check(self._born, "this cache")
        self.context.restore(self._sequence, state)
        if self.context.positions(self._sequence) != length:
            raise EngineError(f"this state does not hold {length} positions")
        self.length = self._filled = length

    def _run(
        self, part: np.ndarray, start: int, block: bool, *, each: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        found = self.context.run(self._sequence, part, start, block=block, each=each)
        if found is None:  # the sequences that share the context have filled it
            self._move_out(len(part))
            found = self.context.run(self._sequence, part, start, block=block, each=each)
        if found is None:
            raise EngineError("llama.cpp has no room for these positions")
        return found

    def _forget_rest(self) -> None:
        forks.check(self._born, "this cache")
        if self._filled > self.length:
            self.context.forget(self._sequence, self.length)
            self._filled = self.length

    def _elsewhere(self, capacity: int, block: int = 0) -> tuple[LlamaContext, int]:
        """Return a new context with the contents of this cache, and the sequence there.

        `capacity`, `block`: as in LlamaContext.
        """
        context = LlamaContext(self.context.model, capacity, self.context.watch, block)
        sequence = context.new_sequence()
        assert sequence is not None
        context.restore(sequence, self.context.state(self._sequence))
        return context, sequence

    def _move_out(self, block: int) -> None:
        # Complete the new place before giving up the old one.
        there, leave = self._elsewhere(self.capacity, block), self._drop
        self._take(*there)
        leave()


def choose_repack(bundle: Bundle, options: LlamaOptions, *, gpu: bool) -> bool:
    """Decide whether to repack weights for the CPU's kernels, which takes a second copy in addition to the mapped file.

    Raises EngineError if `options` request it and it would crash the process (see `has_amx`).
    """
    if options.repack and has_amx():
        raise EngineError(
            "this build of llama.cpp has AMX kernels, which can crash on repacked weights: use repack=no, or build it "
            f"without them: CMAKE_ARGS=\"-DCMAKE_C_FLAGS='{WITHOUT_AMX}' -DCMAKE_CXX_FLAGS='{WITHOUT_AMX}'\" "
            "pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python"
        )
    if gpu or options.repack is not None:
        return bool(options.repack)
    if has_amx():
        return False
    decoder = bundle.components["decoder"]
    if platform.machine().lower() in ("x86_64", "amd64") and decoder.precision not in _BETTER_REPACKED:
        return False
    free = available_memory()
    return free is not None and free > 2 * decoder.bytes + _SPARE

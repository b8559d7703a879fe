"""A bundle whose decoder is a GGUF: vision, connector and embeddings on ONNX Runtime, the decoder on llama.cpp.

llama.cpp is given embeddings, image and text alike, so it needs to know nothing of Molmo. Rows are looked up in the
bundle's own table in full precision: the file's is rounded, and lacks Molmo's image tokens where they lie behind it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from molmo_edge.checkpoints.bundle import Bundle, load_tokenizer
from molmo_edge.checkpoints.gguf_header import check_decoder
from molmo_edge.checkpoints.manifest import GRAPHS
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import EngineError
from molmo_edge.runtimes import forks
from molmo_edge.runtimes.llama_library import WITHOUT_AMX, has_amx, last_words, load_library, on_gpu
from molmo_edge.runtimes.llama_options import CACHE_TYPES, LlamaOptions
from molmo_edge.runtimes.onnx import OnnxRuntime, check_bundle_room, check_components, place_bundle
from molmo_edge.runtimes.protocol import Cache, check_capacity, check_copy, check_rows
from molmo_edge.system.cores import choose_threads, physical_cores
from molmo_edge.system.memory import available_memory

_Thing = TypeVar("_Thing")

_CHUNK = 512  # positions of a prompt that go through the decoder at once; bounds the memory of activations
_SEQUENCES = 16  # caches that share one context's memory
_NO_ROOM = 1  # what llama_decode returns
_ABORTABLE = 16  # positions; a shorter run is over before anybody could interrupt it
_SPARE = 1_500_000_000  # bytes that stay free when weights are laid out anew
_BETTER_REPACKED = ("q4_0", "iq4_nl")  # on x86; a prompt in K-quants takes twice as long with it, measured


def open_llama_runtime(bundle: Bundle, *, device: str, threads: int | None, options: LlamaOptions) -> LlamaRuntime:
    """Open a verified bundle. Raises BundleError for a GGUF that is not its own, EngineError or Unavailable."""
    load_library()
    gpu = on_gpu(device) and options.gpu_layers != 0
    check_decoder(bundle.path("decoder"), bundle.config.decoder, load_tokenizer(bundle.directory))
    parts = [name for name in GRAPHS if name != "decoder"]
    check_components(bundle, parts)
    # The image's part goes where the bundle's target says, or to the device that is insisted on, if this onnxruntime
    # has it, and else stays with the CPU: on a Jetson llama.cpp with CUDA is there sooner than onnxruntime with CUDA.
    placement = place_bundle(bundle, device, insist=False)
    check_bundle_room(bundle, placement)
    options = dataclasses.replace(options, repack=_repack(bundle, options, gpu))
    graphs = OnnxRuntime(
        bundle.config, {name: bundle.path(name) for name in parts}, threads=threads, placement=placement
    )
    return LlamaRuntime(bundle.config, graphs, bundle.path("decoder"), threads=threads, gpu=gpu, options=options)


def open_watched(
    bundle: Bundle,
    watch: Any,
    *,
    threads: int | None = None,
    options: LlamaOptions = LlamaOptions(),  # noqa: B008 (frozen)
) -> Callable[[int], LlamaCache]:
    """The decoder of a verified bundle alone, on the CPU: makes caches of a capacity whose runs `watch` is shown.

    `watch`: a `llama_cpp.ggml_backend_sched_eval_callback`. It must answer True to what is not asked, or llama.cpp
    leaves the rest of a run out without a word. Raises as `open_llama_runtime` does.
    """
    load_library()
    check_decoder(bundle.path("decoder"), bundle.config.decoder, load_tokenizer(bundle.directory))
    options = dataclasses.replace(options, repack=_repack(bundle, options, gpu=False))
    model = _Model(
        bundle.path("decoder"), choose_threads(threads) or physical_cores(), False, options, threading.Event()
    )
    return lambda capacity: LlamaCache(_Context(model, capacity, watch))


class LlamaRuntime:
    """`molmo_edge.runtimes.Runtime` over three graphs and a GGUF, which loads in the background.

    In a forked child the decoder raises EngineError: llama.cpp's threads are not there.
    """

    engine = "llama.cpp"

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
        """`graphs`: with vision, connector and embeddings; it is closed with this. `gpu`: where the decoder goes.

        The GGUF is taken as it is: see `molmo_edge.checkpoints.gguf_header.check_decoder`.
        """
        self.config, self._graphs = config, graphs
        self._stop = threading.Event()
        loader = ThreadPoolExecutor(1, thread_name_prefix="molmo-edge-load")
        made = (decoder, choose_threads(threads) or physical_cores(), gpu, options, self._stop)
        self._loading: Future[_Model] | None = loader.submit(_Model, *made)
        self._born = forks.generation()
        forks.watch_load(self._loading)
        loader.shutdown(wait=False)
        self.encode_image, self.encode_crops, self.connect = graphs.encode_image, graphs.encode_crops, graphs.connect
        self.embed = graphs.embed

    def new_cache(self, capacity: int) -> LlamaCache:
        check_capacity(capacity, self.config)
        return LlamaCache(_Context(self._model(), capacity))

    def restore(self, state: bytes | bytearray, length: int, capacity: int) -> LlamaCache:
        """A cache with what `LlamaCache.state` gave when it had `length` positions.

        Raises EngineError for a state that does not fit this model, these options, or `capacity`.
        """
        if length > capacity:
            raise EngineError(f"a state of {length} positions does not fit into {capacity}")
        cache = self.new_cache(capacity)
        cache.fill(state, length)
        return cache

    def forward(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        if not isinstance(cache, LlamaCache):
            raise EngineError("this cache was made by another runtime")
        embeddings = check_rows(embeddings, cache)
        if embeddings.shape[1] != self.config.decoder.d_model:
            raise EngineError(f"embeddings must be {self.config.decoder.d_model} wide, they are {embeddings.shape[1]}")
        return cache.append(embeddings)

    def close(self) -> None:
        """Let go of model and sessions; a cache that is still held keeps the model's memory."""
        self._stop.set()
        self._loading = None
        self._graphs.close()

    def _model(self) -> _Model:
        forks.check(self._born, "this model of llama.cpp")
        if (loading := self._loading) is None:
            raise EngineError("this runtime was closed")
        return _wait(loading)


class LlamaCache:
    """One sequence. Copies share a context's memory, and with it what they have in common, until it is full."""

    def __init__(self, context: _Context) -> None:
        self._born = forks.generation()
        self.length = 0
        self.capacity = context.capacity
        self._filled = 0  # positions that llama.cpp may have; those behind `length` are forgotten at the next run
        sequence = context.new_sequence()
        assert sequence is not None  # a new context has all of them to spare
        self._take(context, sequence)

    def _take(self, context: _Context, sequence: int) -> None:
        self._context, self._sequence = context, sequence
        self._drop = weakref.finalize(self, context.dropped.append, sequence)
        self._drop.atexit = False

    def copy(self, capacity: int | None = None) -> LlamaCache:
        """Costs nothing where the context has a sequence to spare: positions belong to both, not to each.

        `capacity`: see `molmo_edge.runtimes.Cache`. Another one than here is a context of its own.
        """
        room = check_copy(self, capacity)
        self._forget_rest()
        twin = LlamaCache.__new__(LlamaCache)
        twin._born = self._born
        twin.length = twin._filled = self.length
        twin.capacity = room
        if room != self.capacity or (sequence := self._context.new_sequence()) is None:
            twin._take(*self._elsewhere(room))
        else:
            twin._take(self._context, sequence)
            self._context.share(self._sequence, sequence, self.length)
        return twin

    def append(self, embeddings: np.ndarray) -> np.ndarray:
        """Run [n, d_model] at the end; -> logits [embedding_size]. `length` moves only when all of it succeeded."""
        self._forget_rest()
        done = self.length
        for start in range(0, len(embeddings), _CHUNK):
            part = embeddings[start : start + _CHUNK]
            self._filled = done + len(part)  # said before it is true: a run that breaks off may leave some
            logits = self._run(part, done)
            done += len(part)
        self.length = done
        return logits

    def state(self) -> bytearray:
        """Keys and values as llama.cpp writes them, for `LlamaRuntime.restore` with the same bundle and options."""
        self._forget_rest()
        return self._context.state(self._sequence)

    def fill(self, state: bytes | bytearray, length: int) -> None:
        """Take over what `state` gave, into a cache that is empty: see `LlamaRuntime.restore`."""
        forks.check(self._born, "this cache")
        self._context.restore(self._sequence, state)
        if self._context.positions(self._sequence) != length:
            raise EngineError(f"this state does not have {length} positions")
        self.length = self._filled = length

    def _run(self, part: np.ndarray, start: int) -> np.ndarray:
        logits = self._context.run(self._sequence, part, start)
        if logits is None:  # those that it shares the context with have filled it
            self._move_out()
            logits = self._context.run(self._sequence, part, start)
        if logits is None:
            raise EngineError("llama.cpp found no room for these positions")
        return logits

    def _forget_rest(self) -> None:
        forks.check(self._born, "this cache")
        if self._filled > self.length:
            self._context.forget(self._sequence, self.length)
            self._filled = self.length

    def _elsewhere(self, capacity: int) -> tuple[_Context, int]:
        """A context for `capacity` positions, with what this cache holds, and its sequence there."""
        context = _Context(self._context.model, capacity, self._context.watch)
        sequence = context.new_sequence()
        assert sequence is not None
        context.restore(sequence, self._context.state(self._sequence))
        return context, sequence

    def _move_out(self) -> None:
        there, leave = (
            self._elsewhere(self.capacity),
            self._drop,
        )  # the new place is whole before the old one is given up
        self._take(*there)
        leave()


class _Context:
    """A llama_context: memory for `capacity` positions, shared by up to _SEQUENCES caches. Threads take turns."""

    def __init__(self, model: _Model, capacity: int, watch: Any = None) -> None:
        """`watch`: see `open_watched`."""
        self.model, self.capacity, self.watch = model, capacity, watch
        self.dropped: deque[int] = deque()  # sequences whose caches are gone; put here by whatever thread collects them
        self._free = list(range(_SEQUENCES))
        self._lock = threading.RLock()
        self._api = model.api
        self._pointer = model.new_context(capacity, watch)
        forks.finalize(self, _free_context, model, self._pointer)
        self._memory = self._api.llama_get_memory(self._pointer)
        abort = self._abort = threading.Event()  # by name: a callback that knew this object would keep it alive
        self._asks = self._api.ggml_abort_callback(lambda data: abort.is_set())

    def new_sequence(self) -> int | None:
        """None where all of them are taken."""
        with self._lock:
            self._collect()
            return self._free.pop() if self._free else None

    def _collect(self) -> None:
        while self.dropped:
            sequence = self.dropped.popleft()
            self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            self._free.append(sequence)

    def share(self, sequence: int, other: int, length: int) -> None:
        with self._lock:
            self._api.llama_memory_seq_cp(self._memory, sequence, other, 0, length)

    def forget(self, sequence: int, length: int) -> None:
        with self._lock:
            self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def positions(self, sequence: int) -> int:
        with self._lock:
            return self._api.llama_memory_seq_pos_max(self._memory, sequence) + 1

    def state(self, sequence: int) -> bytearray:
        with self._lock:
            size = self._api.llama_state_seq_get_size(self._pointer, sequence)
            state = bytearray(size)
            view = (ctypes.c_uint8 * size).from_buffer(state)
            written = self._api.llama_state_seq_get_data(self._pointer, view, size, sequence)
        if written != size:
            raise EngineError("llama.cpp could not copy the keys and values of this sequence")
        return state

    def restore(self, sequence: int, state: bytes | bytearray) -> None:
        kind = ctypes.c_uint8 * len(state)
        buffer = kind.from_buffer(state) if isinstance(state, bytearray) else kind.from_buffer_copy(state)
        with self._lock:
            last_words()
            read = self._api.llama_state_seq_set_data(self._pointer, buffer, len(state), sequence)
        if read != len(state):
            raise EngineError(f"these keys and values are not of this model, or do not fit: {last_words()}")

    def run(self, sequence: int, embeddings: np.ndarray, start: int) -> np.ndarray | None:
        """Append [n, d_model] at position `start`; -> logits [n_vocab] of the last, None where there is no room."""
        with self._lock:
            self._collect()
            last_words()
            code = self._decode(_batch(self._api, sequence, embeddings, start, every=self.watch is not None))
            if code == _NO_ROOM:
                return None
            if code:
                raise EngineError(f"llama.cpp failed ({code}): {last_words() or 'it does not say why'}")
            values = self._api.llama_get_logits_ith(self._pointer, -1)
            return np.ctypeslib.as_array(values, (self.model.n_vocab,)).copy()

    def _decode(self, batch: Any) -> int:
        """llama_decode, which Ctrl-C can interrupt where it takes long."""
        if batch.n_tokens < _ABORTABLE:
            return self._api.llama_decode(self._pointer, batch)
        self._api.llama_set_abort_callback(self._pointer, self._asks, None)
        try:
            return _wait(self.model.runner.submit(self._api.llama_decode, self._pointer, batch))
        except BaseException:
            self._abort.set()
            _wait_out(self.model.runner)  # the batch's memory is this frame's
            raise
        finally:
            self._abort.clear()
            self._api.llama_set_abort_callback(self._pointer, self._api.ggml_abort_callback(), None)


def _free_context(model: _Model, pointer: Any) -> None:
    """The model is named here so that it lives until its contexts are gone."""
    model.api.llama_free(pointer)


def _batch(api: Any, sequence: int, embeddings: np.ndarray, start: int, *, every: bool) -> Any:
    """A llama_batch over the rows as they lie; logits are asked for the last of them, or for `every` one."""
    n = len(embeddings)
    positions = (ctypes.c_int32 * n)(*range(start, start + n))
    counts, one = (ctypes.c_int32 * n)(*([1] * n)), ctypes.pointer(ctypes.c_int32(sequence))
    sequences = (ctypes.POINTER(ctypes.c_int32) * n)(*([one] * n))
    wanted = (ctypes.c_int8 * n)(*([int(every)] * n))
    wanted[n - 1] = 1
    return api.llama_batch(
        n_tokens=n,
        token=None,
        embd=embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        pos=positions,
        n_seq_id=counts,
        seq_id=sequences,
        logits=wanted,
    )


class _Model:
    """A llama_model, and how contexts of it are made."""

    def __init__(self, path: Path, threads: int, gpu: bool, options: LlamaOptions, stop: threading.Event) -> None:
        self.api = load_library()
        self._threads, self._gpu, self._options = threads, gpu, options
        params = self.api.llama_model_default_params()
        layers = -1 if options.gpu_layers is None else options.gpu_layers
        params.n_gpu_layers = layers if gpu else 0
        params.use_extra_bufts = bool(options.repack)
        go_on = self.api.llama_progress_callback(lambda progress, data: not stop.is_set())
        params.progress_callback = go_on
        if not gpu:
            none = (ctypes.c_void_p * 1)()  # no device beside the CPU, not even for the products of long prompts
            params.devices = ctypes.cast(none, ctypes.c_void_p)
        last_words()
        self._pointer = self.api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._pointer:
            if stop.is_set():
                raise EngineError("this runtime was closed")
            raise EngineError(f"{path} cannot be loaded by llama.cpp: {last_words() or 'it does not say why'}")
        forks.finalize(self, self.api.llama_model_free, self._pointer)
        self.n_vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self._pointer))
        # One thread, so that llama.cpp's own threads are its for good.
        self.runner = ThreadPoolExecutor(1, thread_name_prefix="molmo-edge-llama")

    def new_context(self, capacity: int, watch: Any) -> Any:
        params, options = self.api.llama_context_default_params(), self._options
        params.n_ctx = capacity
        params.n_batch = params.n_ubatch = min(_CHUNK, capacity)
        params.n_seq_max = params.n_outputs_max = _SEQUENCES
        if watch is not None:
            params.cb_eval = watch
            # Of every position: where no logits are asked for, llama.cpp leaves the last layer's experts out.
            params.n_outputs_max = max(_SEQUENCES, params.n_batch)
        params.kv_unified = True  # what a copy has in common with its original is there once
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = CACHE_TYPES[options.cache]
        flash = options.flash_attention
        if flash is None and not self._gpu:  # slower on a CPU, and it adds values up in float16
            flash = options.cache not in ("f32", "f16", "bf16")
        params.flash_attn_type = -1 if flash is None else int(flash)
        params.offload_kqv = params.op_offload = self._gpu
        params.no_perf = True
        last_words()
        pointer = self.api.llama_init_from_model(self._pointer, params)
        if not pointer:
            raise EngineError(
                f"llama.cpp cannot make room for {capacity} positions: {last_words() or 'it does not say why'}"
            )
        return pointer


def _wait(running: Future[_Thing]) -> _Thing:
    while True:  # with a timeout: on Windows a wait without one cannot be interrupted
        try:
            return running.result(timeout=1.0)
        except NotYet:
            if running.done():  # it is its own
                raise


def _wait_out(runner: ThreadPoolExecutor) -> None:
    """Until all that was given to its one thread is over, however often somebody presses Ctrl-C."""
    last: Future[int] | None = None
    while True:
        try:
            last = last or runner.submit(int)
            last.result(timeout=1.0)
            return
        except (NotYet, KeyboardInterrupt):
            continue


def _repack(bundle: Bundle, options: LlamaOptions, gpu: bool) -> bool:
    """Weights laid out for the CPU's own kernels are a second copy beside the mapped file.

    Raises EngineError where they are asked for and would end the process (see `has_amx`).
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

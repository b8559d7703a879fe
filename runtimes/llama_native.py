"""llama.cpp's model and context through ctypes, for `molmo_edge.runtimes.llama`.

The rest of the package uses no other part of llama.cpp's C API.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from molmo_edge.errors import EngineError
from molmo_edge.runtimes.llama_library import load_library, take_errors
from molmo_edge.runtimes.llama_options import CACHE_TYPES, LlamaOptions
from molmo_edge.runtimes.llama_states import StateReader
from molmo_edge.runtimes.protocol import DRAFT_ROWS
from molmo_edge.system import forks

_T = TypeVar("_T")

CHUNK = 512  # positions of a prompt that go through the decoder at once; bounds the memory of activations
_SEQUENCES = 16  # caches that share the memory of one context
_NO_ROOM = 1  # returned by llama_decode
_NO_REASON = "it gives no reason"
_ABORTABLE = 16  # positions; a shorter run ends before anyone could interrupt it


class LlamaContext:
    """A llama_context: memory for `capacity` positions, shared by up to 16 caches. Threads take turns."""

    def __init__(self, model: LlamaModel, capacity: int, watch: Any = None, block: int = 0) -> None:
        """`watch`: see `molmo_edge.runtimes.llama.open_watched`.

        `block`: positions that have to run at once, where that is more than the model reserves memory for.
        """
        self.model, self.capacity, self.watch = model, capacity, watch
        self.at_once = min(max(model.at_once, block), capacity)
        self.dropped: deque[int] = deque()  # sequences of deleted caches; any thread may append
        self._free = list(range(_SEQUENCES))
        self._lock = threading.RLock()
        self._api = model.api
        self._states = None if model.states is None else StateReader(*model.states)
        callback = watch if self._states is None else self._states.callback
        self._pointer = model.new_context(capacity, self.at_once, callback, every=watch is not None)
        forks.finalize(self, _free_context, model, self._pointer)
        self._memory = self._api.llama_get_memory(self._pointer)
        abort = self.abort = threading.Event()  # a callback that held `self` would keep it alive
        self._abort_callback = self._api.ggml_abort_callback(lambda _data: abort.is_set())

    def new_sequence(self) -> int | None:
        """Reserve a sequence. Returns None if all are taken."""
        with self._lock:
            self._collect()
            return self._free.pop() if self._free else None

    def _collect(self) -> None:
        while self.dropped:
            sequence = self.dropped.popleft()
            self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            self._free.append(sequence)

    def share(self, sequence: int, other: int, length: int) -> None:
        """Let `other` share the first `length` positions of `sequence`."""
        with self._lock:
            self._api.llama_memory_seq_cp(self._memory, sequence, other, 0, length)

    def forget(self, sequence: int, length: int) -> None:
        """Remove the positions of `sequence` from `length` on."""
        with self._lock:
            self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def positions(self, sequence: int) -> int:
        """The number of positions that `sequence` holds."""
        with self._lock:
            return int(self._api.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def state(self, sequence: int) -> bytearray:
        """Copy the keys and values of `sequence` in llama.cpp's format. Raises EngineError."""
        with self._lock:
            size = self._api.llama_state_seq_get_size(self._pointer, sequence)
            state = bytearray(size)
            view = (ctypes.c_uint8 * size).from_buffer(state)
            written = self._api.llama_state_seq_get_data(self._pointer, view, size, sequence)
        if written != size:
            raise EngineError("llama.cpp could not copy the keys and values of this sequence")
        return state

    def restore(self, sequence: int, state: bytes | bytearray) -> None:
        """Load what `state` returned into `sequence`. Raises EngineError if it does not fit."""
        array = ctypes.c_uint8 * len(state)
        buffer = array.from_buffer(state) if isinstance(state, bytearray) else array.from_buffer_copy(state)
        with self._lock:
            take_errors()
            read = self._api.llama_state_seq_set_data(self._pointer, buffer, len(state), sequence)
        if read != len(state):
            raise EngineError(f"these keys and values are not of this model, or do not fit: {take_errors()}")

    def run(
        self, sequence: int, embeddings: np.ndarray, start: int, *, block: bool = False, each: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Append [n, d_model] at position `start`. `block`: the rows attend to each other in both directions.

        Returns the logits [1, n_vocab] of the last position, or with `each` [n, n_vocab] of at most DRAFT_ROWS
        positions; and, for a model with `states`, the states [n, d_model] of all. None without room. Raises
        EngineError, also for more than `at_once` rows.
        """
        if len(embeddings) > self.at_once:  # llama.cpp would abort the process
            raise EngineError(f"llama.cpp cannot run {len(embeddings)} positions at once here, only {self.at_once}")
        with self._lock:
            self._collect()
            take_errors()
            if self._states is not None:
                self._states.take()  # of a run that was interrupted
            self._api.llama_set_causal_attn(self._pointer, not block)
            code = self._decode(_batch(self._api, sequence, embeddings, start, every=each or self.watch is not None))
            if code == _NO_ROOM:
                return None
            if code:
                raise EngineError(f"llama.cpp failed with code {code}: {take_errors() or _NO_REASON}")
            rows = range(len(embeddings)) if each else (-1,)
            found = (self._api.llama_get_logits_ith(self._pointer, row) for row in rows)
            logits = np.stack([np.ctypeslib.as_array(values, (self.model.n_vocab,)) for values in found])
            if self._states is None:
                return logits, None
            states = self._states.take()
            if len(states) != len(embeddings):
                raise EngineError(
                    f"llama.cpp returned the states of {len(states)} of {len(embeddings)} positions: this version of "
                    "molmo-edge does not support its graph"
                )
            return logits, states

    def _decode(self, batch: Any) -> int:
        """Run llama_decode. Ctrl-C interrupts a long run."""
        if batch.n_tokens < _ABORTABLE:
            return int(self._api.llama_decode(self._pointer, batch))
        self._api.llama_set_abort_callback(self._pointer, self._abort_callback, None)
        try:
            code: int = wait_for(self.model.runner.submit(self._api.llama_decode, self._pointer, batch))
            return code
        except BaseException:
            self.abort.set()
            _wait_until_idle(self.model.runner)  # the batch is in the memory of this frame
            raise
        finally:
            self.abort.clear()
            self._api.llama_set_abort_callback(self._pointer, self._api.ggml_abort_callback(), None)


def _free_context(model: LlamaModel, pointer: Any) -> None:
    """Free a context. Takes the model so that it outlives its contexts."""
    model.api.llama_free(pointer)


def _batch(api: Any, sequence: int, embeddings: np.ndarray, start: int, *, every: bool) -> Any:
    """Return a llama_batch over the rows, without a copy. Requests logits of the last row, or of `every` row."""
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


class LlamaModel:
    """A llama_model, which creates its contexts."""

    def __init__(
        self,
        path: Path,
        threads: int,
        gpu: bool,
        options: LlamaOptions,
        stop: threading.Event,
        block: int = 0,
        states: tuple[int, int] | None = None,
    ) -> None:
        """`block`: positions that usually attend to each other in both directions, and so have to run at once.

        `states`: a layer whose output each run returns, and its width.
        """
        self.api, self.states = load_library(), states
        self.at_once = max(CHUNK, block)
        self._threads, self._gpu, self._options = threads, gpu, options
        params = self.api.llama_model_default_params()
        layers = -1 if options.gpu_layers is None else options.gpu_layers
        params.n_gpu_layers = layers if gpu else 0
        params.use_extra_bufts = bool(options.repack)
        keep_loading = self.api.llama_progress_callback(lambda _progress, _data: not stop.is_set())
        params.progress_callback = keep_loading
        if not gpu:
            none = (ctypes.c_void_p * 1)()  # only the CPU, also for the products of long prompts
            params.devices = ctypes.cast(none, ctypes.c_void_p)
        take_errors()
        self._pointer = self.api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._pointer:
            if stop.is_set():
                raise EngineError("this runtime was closed")
            raise EngineError(f"llama.cpp cannot load {path}: {take_errors() or _NO_REASON}")
        forks.finalize(self, self.api.llama_model_free, self._pointer)
        self.n_vocab: int = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self._pointer))
        # A single thread, so that llama.cpp keeps the threads it starts.
        self.runner = ThreadPoolExecutor(1, thread_name_prefix="molmo-edge-llama")

    def new_context(self, capacity: int, at_once: int, watch: Any = None, *, every: bool = False) -> Any:
        """Return the pointer of a new llama_context. Raises EngineError if there is not enough memory.

        `at_once`: the most positions of one run. `watch`: an evaluation callback. `every`: reserve memory for the
        logits of every position.
        """
        params, options = self.api.llama_context_default_params(), self._options
        params.n_ctx = capacity
        params.n_batch = params.n_ubatch = at_once
        params.n_seq_max, params.n_outputs_max = _SEQUENCES, max(_SEQUENCES, DRAFT_ROWS)
        if watch is not None:
            params.cb_eval = watch
        if every:  # llama.cpp skips the last layer's experts where no logits are requested
            params.n_outputs_max = max(params.n_outputs_max, params.n_batch)
        params.kv_unified = True  # copies share what they have in common with the original
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = CACHE_TYPES[options.cache]
        flash = options.flash_attention
        if flash is None and not self._gpu:  # on a CPU it is slower, and accumulates in float16
            flash = options.cache not in ("f32", "f16", "bf16")
        params.flash_attn_type = -1 if flash is None else int(flash)
        params.offload_kqv = params.op_offload = self._gpu
        params.no_perf = True
        take_errors()
        pointer = self.api.llama_init_from_model(self._pointer, params)
        if not pointer:
            raise EngineError(
                f"llama.cpp cannot allocate a cache of {capacity} positions: {take_errors() or _NO_REASON}"
            )
        return pointer


def wait_for(running: Future[_T]) -> _T:
    """Return the result of `running`. Ctrl-C interrupts the wait."""
    while True:  # with a timeout: on Windows a wait without one cannot be interrupted
        try:
            return running.result(timeout=1.0)
        except NotYet:
            if running.done():  # the call itself raised it
                raise


def _wait_until_idle(runner: ThreadPoolExecutor) -> None:
    """Wait until the thread of `runner` has finished, even if Ctrl-C is pressed again."""
    last: Future[int] | None = None
    while True:
        try:
            last = last or runner.submit(int)
            last.result(timeout=1.0)
            return
        except (NotYet, KeyboardInterrupt):
            continue

"""Keys and values of one sequence in a decoder on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo_edge.config import DecoderConfig
from molmo_edge.runtimes.protocol import check_arrays, check_copy
from molmo_edge.runtimes.rotary_inputs import rotary_tables
from molmo_edge.system import forks

# Of keys and values, by their type in the graph.
CACHE_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
_DRAFTS = "n_last"  # the input of a decoder that was exported with `drafting`


@dataclass(frozen=True, eq=False)
class _Buffer:
    """Keys or values of one layer, [1, n_kv_heads, capacity, head_dim], on the device of its session."""

    value: Any  # an OrtValue
    dtype: type
    array: np.ndarray | None = None  # on the CPU: the same memory

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: type, device: str) -> _Buffer:
        from onnxruntime import OrtValue

        if device != "cpu":
            return cls(OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, 0), dtype)
        array: np.ndarray = np.empty(shape, dtype)
        return cls(OrtValue.ortvalue_from_numpy(array), dtype, array)

    def filled(self, length: int) -> np.ndarray:
        """The first `length` positions; on the CPU a view."""
        array = self.value.numpy() if self.array is None else self.array
        return array[:, :, :length]

    def fill(self, values: np.ndarray) -> None:
        """Write the first positions, [1, n_kv_heads, n, head_dim]."""
        array = np.zeros(self.value.shape(), self.dtype) if self.array is None else self.array
        array[:, :, : values.shape[2]] = values
        if self.array is None:
            self.value.update_inplace(array)

    def copy(self, length: int, capacity: int) -> _Buffer:
        """Return a buffer for `capacity` positions with a copy of the first `length`."""
        import onnxruntime

        shape = list(self.value.shape())
        same, shape[2] = shape[2] == capacity, capacity
        if self.array is None:
            twin = _Buffer.empty(shape, self.dtype, self.value.device_name())
            if not same:  # another layout: through the CPU
                moved: np.ndarray = np.zeros(shape, self.dtype)
                moved[:, :, :length] = self.value.numpy()[:, :, :length]
                twin.value.update_inplace(moved)
            elif hasattr(onnxruntime, "copy_tensors"):
                onnxruntime.copy_tensors([self.value], [twin.value])
            else:  # older versions, as on Jetsons: through the CPU
                twin.value.update_inplace(self.value.numpy())
            return twin
        twin = _Buffer.empty(shape, self.dtype, "cpu")
        assert twin.array is not None
        twin.array[:, :, :length] = self.array[:, :, :length]  # leaves the remaining pages untouched
        return twin


class OnnxCache:
    """Preallocated keys and values, bound to the decoder as both input and output."""

    def __init__(
        self,
        session: Any,
        buffers: dict[str, _Buffer],
        logits: int,
        length: int = 0,
        tables: dict[str, Any] | None = None,
    ) -> None:
        """`tables`: of molmo_edge.runtimes.rotary_inputs, for positions with gaps."""
        from onnxruntime import OrtValue

        self._born = forks.generation()
        self.length = length
        inputs = {value.name for value in session.get_inputs()}
        self._bidirectional, self._drafts = "image" in inputs, _DRAFTS in inputs
        self.capacity = next(iter(buffers.values())).value.shape()[2] - self._drafts
        self._session, self._buffers = session, buffers
        self._logits = np.empty((1, logits), np.float32)
        self._binding = session.io_binding()
        self._tables = tables
        for name, table in (tables or {}).items():
            self._binding.bind_ortvalue_input(name, table)
        for name, buffer in buffers.items():
            self._binding.bind_ortvalue_input(f"past_{name}", buffer.value)
            self._binding.bind_ortvalue_output(f"present_{name}", buffer.value)
        self._last = OrtValue.ortvalue_from_numpy(self._logits)
        self._binding.bind_ortvalue_output("logits", self._last)
        self.states: np.ndarray | None = None  # see PointRuntime
        self._has_states = any(value.name == "states" for value in session.get_outputs())

    @classmethod
    def empty(
        cls,
        session: Any,
        capacity: int,
        logits: int,
        device: str,
        positions: tuple[DecoderConfig, np.ndarray] | None = None,
    ) -> OnnxCache:
        """Return an empty cache of `capacity` positions on `device`; `logits`: their number.

        `positions`: those of the first embeddings, where there are gaps, and the decoder.
        """
        buffers = {}
        inputs = session.get_inputs()
        spare = any(value.name == _DRAFTS for value in inputs)  # such a decoder writes one position more
        capacity += spare
        for past in inputs:
            if past.name.startswith("past_"):  # [1, n_kv_heads, "capacity", head_dim]
                shape = [capacity if size == "capacity" else size for size in past.shape]
                dtype = CACHE_DTYPES[past.type]
                buffers[past.name.removeprefix("past_")] = _Buffer.empty(shape, dtype, device)
        if positions is None:
            return cls(session, buffers, logits)
        width = next(iter(buffers.values())).value.shape()[3] // 2
        return cls(session, buffers, logits, tables=rotary_tables(*positions, width, spare=spare))

    def copy(self, capacity: int | None = None) -> OnnxCache:
        """See `molmo_edge.runtimes.Cache`."""
        forks.check(self._born, "this cache")
        room = check_copy(self, capacity) + self._drafts
        buffers = {name: buffer.copy(self.length, room) for name, buffer in self._buffers.items()}
        return OnnxCache(self._session, buffers, self._logits.shape[1], self.length, self._tables)

    def arrays(self) -> dict[str, np.ndarray]:
        """See `molmo_edge.runtimes.protocol.StoredCache`."""
        forks.check(self._born, "this cache")
        return {name: buffer.filled(self.length) for name, buffer in self._buffers.items()}

    def fill(self, arrays: dict[str, np.ndarray], length: int) -> None:
        """Load what `arrays` returned with `length` positions into an empty cache. Raises EngineError."""
        check_arrays(arrays, {name: buffer.filled(length) for name, buffer in self._buffers.items()})
        for name, buffer in self._buffers.items():
            buffer.fill(arrays[name])
        self.length = length

    def append(self, embeddings: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
        """Run [n, d_model] at the end; -> logits [embedding_size]. `length` changes only if the run succeeds."""
        self._run(embeddings, image, 1)
        logits: np.ndarray = self._logits[0].copy()
        return logits

    def append_each(self, embeddings: np.ndarray) -> np.ndarray:
        """Like `append`; -> the logits of each position, [n, embedding_size]."""
        from onnxruntime import OrtValue

        logits: np.ndarray = np.empty((len(embeddings), self._logits.shape[1]), np.float32)
        self._binding.bind_ortvalue_output("logits", OrtValue.ortvalue_from_numpy(logits))
        try:
            self._run(embeddings, None, len(embeddings))
        finally:
            self._binding.bind_ortvalue_output("logits", self._last)
        return logits

    def _run(self, embeddings: np.ndarray, image: np.ndarray | None, n_last: int) -> None:
        forks.check(self._born, "this cache")
        total = self.length + len(embeddings)
        self._binding.bind_cpu_input("embeddings", embeddings[None])
        self._binding.bind_cpu_input("total_length", np.array([total], np.int32))
        if self._bidirectional:
            self._binding.bind_cpu_input("image", np.zeros(len(embeddings), bool) if image is None else image)
        if self._drafts:
            self._binding.bind_cpu_input(_DRAFTS, np.array([n_last], np.int64))
        if self._has_states:  # bound anew, because its shape differs between runs; it is the last of the bound outputs
            self._binding.bind_output("states", "cpu")
        self._session.run_with_iobinding(self._binding)
        if self._has_states:
            self.states = self._binding.get_outputs()[-1].numpy()[0]
        self.length = total

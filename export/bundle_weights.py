"""Restore the weights of a bundle as tensors under their hub names: the inverse of `export_bundle`.

Quantised weights are restored as floats; LayerScale is ones, since it is folded into the matrices. So a bundle can be
run, trained further or exported again without its checkpoint.
"""

from __future__ import annotations

import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.manifest import graph_names
from molmo_edge.checkpoints.tensor_names import BACKBONE, TRANSFORMER, head_name, hub_shapes, vit_names
from molmo_edge.checkpoints.tensor_sources import CheckpointError
from molmo_edge.config import MolmoConfig
from molmo_edge.export.errors import ExportError
from molmo_edge.export.int8_graph import ZERO_POINT
from molmo_edge.quantize.rounding import Blocks, unpack_nibbles
from molmo_edge.system.memory import available_memory, check_room

if TYPE_CHECKING:
    from collections.abc import Callable

    from molmo_edge.modeling import Molmo

TABLE = f"{TRANSFORMER}.wte"


class BundleTensors:
    """A TensorSource of the graphs of a bundle. Each tensor is converted to float32 when it is read."""

    def __init__(self, directory: str | Path, *, dither: int | None = None) -> None:
        """`dither`: a seed. Each restored weight is then drawn from the interval that rounds to the stored value,
        so that quantising it again has the usual error; values on the grid of the stored ones would have none.

        Raises BundleError for a damaged bundle, ExportError for one with a GGUF decoder."""
        bundle = open_bundle(directory)
        self.config: MolmoConfig = bundle.config
        self._directory, self._dither = bundle.directory, dither
        self._arrays: dict[str, np.ndarray] = {}
        self._blocks: dict[str, tuple[int, int]] = {}  # matrix in blocks -> bits, and inputs without padding
        for component in graph_names(self.config):
            if bundle.components[component].engine != "onnx":
                raise ExportError(
                    f"{directory}: the weights of {component} cannot be read back from a GGUF: use the checkpoint"
                )
            graph = onnx.load(str(Path(directory) / bundle.components[component].file)).graph
            self._arrays |= {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
            for node in graph.node:
                numbers = {a.name: a.i for a in node.attribute}
                if node.op_type == "MatMulNBits":
                    self._blocks[node.input[1]] = numbers["bits"], numbers["K"]
                elif node.op_type == "QMoE":
                    d = self.config.decoder
                    for weight, inputs in ((node.input[2], d.d_model), (node.input[5], d.ffn_dim)):
                        self._blocks[weight] = numbers["expert_weight_bits"], inputs
        # Experts in one matrix are read one after the other, each first for its shape.
        self._last = lru_cache(maxsize=1)(self._widen)
        self._read = {name: partial(self._last, name) for name in self._arrays} | self._derived()
        # A checkpoint has blocks after the last one in use, which a bundle leaves out.
        for vit, _, hub in vit_names(self.config):
            first = f"{hub}.transformer.resblocks.0."
            for name in [name for name in self._read if name.startswith(first)]:
                for n in range(vit.last_layer + 1, vit.n_layers):
                    unused = name.replace(first, f"{hub}.transformer.resblocks.{n}.")
                    self._read[unused] = partial(self._zeros, name)

    def names(self) -> list[str]:
        """Return the hub names of the bundle's tensors, in the order of `hub_shapes`."""
        return [name for name in hub_shapes(self.config) if name in self._read]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of tensor `name`, which is read for it."""
        return self.get(name).shape

    def dtype(self, _name: str) -> str:
        """Return "F32": tensors are restored to float32."""
        return "F32"

    def file(self, _name: str) -> Path:
        """Return the directory of the bundle."""
        return self._directory

    def raw(self, name: str) -> np.ndarray:
        """Return tensor `name` as float32: the same values as `get`."""
        return np.asarray(self.get(name), np.float32)

    def get(self, name: str) -> np.ndarray:
        """Return tensor `name` restored to float32. Raises CheckpointError if the bundle does not have it."""
        if name not in self._read:
            raise CheckpointError(f'the bundle has no tensor "{name}"')
        return self._read[name]()

    def _widen(self, name: str) -> np.ndarray:
        """A matrix as [out, in], the table as [rows, d], anything else as it is stored. Read-only."""
        array = self._float(name)
        array.flags.writeable = False  # it is cached
        return array

    def _float(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        scale = self._arrays.get(f"{name.removesuffix('.weight')}.scale")
        if array.dtype == np.uint8 and scale is not None:  # scales [..., out, blocks]
            bits, inputs = self._blocks[name]
            scale = scale.astype(np.float32)
            if bits == 8:
                codes = array.reshape(*scale.shape, -1).astype(np.float32) - ZERO_POINT
                wide = self._dithered(name, codes) * scale[..., None]
                weights: np.ndarray = wide.reshape(*scale.shape[:-1], -1)
                return weights[..., :inputs]
            zero_point = self._arrays.get(f"{name.removesuffix('.weight')}.zero_point")
            if zero_point is not None:
                zero_point = unpack_nibbles(zero_point)[..., : scale.shape[-1]]
            codes = unpack_nibbles(array).reshape(*scale.shape[:-1], -1)
            return Blocks(self._dithered(name, codes), scale, zero_point).restored()[..., :inputs]
        if array.dtype == np.int8 and scale is not None:  # [in, out] with one scale per output, or the table
            wide = self._dithered(name, array.astype(np.float32)) * scale
            table: np.ndarray = wide
            return table if name == TABLE else table.T
        if array.dtype == np.float16:
            array = array.astype(np.float32)
        return array.T if array.ndim == 2 and name.endswith(".weight") else array

    def _dithered(self, name: str, codes: np.ndarray) -> np.ndarray:
        if self._dither is None:
            return codes
        random = np.random.default_rng([self._dither, zlib.crc32(name.encode())])
        return codes + random.uniform(-0.5, 0.5, codes.shape).astype(np.float32)

    def _flat(self, name: str) -> np.ndarray:
        return self._arrays[name].reshape(-1)

    def _zeros(self, like: str) -> np.ndarray:
        return np.zeros_like(self.get(like))

    def _derived(self) -> dict[str, Callable[[], np.ndarray]]:
        """Hub tensors that the export folds, stacks or splits."""
        d = self.config.decoder
        read: dict[str, Callable[[], np.ndarray]] = {
            f"{TABLE}.embedding": lambda: self._last(TABLE)[: d.embedding_size],
        }
        if self.config.pad_embed:
            pad_embed = [f"{BACKBONE}.pad_embed.{k}" for k in (0, 1)]
            read[f"{BACKBONE}.pad_embed"] = lambda: np.stack([self._arrays[name] for name in pad_embed])
        for name in (head_name(self.config), "lm_head.new_output_embeddings"):
            if f"{name}.weight" in self._arrays:  # matrices that the hub has without ".weight"
                read[name] = partial(self._last, f"{name}.weight")
        if d.additional_vocab_size:
            read[f"{TABLE}.new_embedding"] = lambda: self._last(TABLE)[d.embedding_size :]
        for vit, _, hub in vit_names(self.config):
            if vit.parts.class_token:
                read[f"{hub}.class_embedding"] = partial(self._flat, f"{hub}.class_embedding")
            for n in range(vit.last_layer + 1) if vit.parts.layer_scale else ():
                for scale in ("lambda1", "lambda2"):
                    read[f"{hub}.transformer.resblocks.{n}.{scale}"] = partial(np.ones, vit.d_model, np.float32)
        for n in range(d.n_layers if d.n_experts else 0):
            experts = f"{TRANSFORMER}.blocks.{n}.mlp.experts"
            if f"{experts}.0.gate_proj.weight" in self._arrays:
                continue  # stored one by one, under their own names
            for part in ("gate", "up", "down"):
                for e in range(d.n_experts):
                    read[f"{experts}.{e}.{part}_proj.weight"] = partial(self._expert, f"{experts}.{part}_proj", part, e)
        return read

    def _expert(self, wide: str, part: str, e: int) -> np.ndarray:
        experts = wide.rpartition(".")[0]
        if f"{experts}.down.weight" in self._arrays:  # of QMoE, where rows of gate and up alternate
            stacked: np.ndarray = self._last(f"{experts}.{'down' if part == 'down' else 'gate_up'}.weight")
            return stacked[e] if part == "down" else stacked[e, ("gate", "up").index(part) :: 2]
        matrix: np.ndarray = self._last(f"{wide}.weight")
        ffn = self.config.decoder.ffn_dim
        rows = slice(e * ffn, (e + 1) * ffn)
        return matrix[:, rows] if part == "down" else matrix[rows]


def load_bundle_weights(directory: str | Path, *, dither: int | None = None, precision: str = "fp32") -> Molmo:
    """The bundle's weights as a `molmo_edge.modeling.Molmo` in eval mode on the CPU. Needs PyTorch.

    `dither`: see BundleTensors. `precision`: see `load_checkpoint`; "auto" is fp32 if it fits into memory, else bf16.
    Raises RoomError or PrecisionError if it does not fit.
    """
    from molmo_edge.modeling.precision import choose_precision
    from molmo_edge.modeling.weights import build_model

    check_room(sum(part.bytes for part in open_bundle(directory).components.values()), f"reading {directory}")
    tensors = BundleTensors(directory, dither=dither)
    precision = choose_precision(tensors.config, precision, "cpu", available_memory())
    return build_model(tensors.config, tensors, where=str(directory), precision=precision)

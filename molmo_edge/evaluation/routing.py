"""The experts that an OLMoE decoder's routers choose for given inputs, on every engine.

Quantization changes an answer in two ways: an expert computes a different result, or a different expert is chosen. This
reads each router's softmax over all experts, which every engine computes in float32, and takes the top k by the same
rule, so that engines that break ties differently still agree.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from molmo_edge.checkpoints.bundle import Bundle, is_bundle, open_bundle
from molmo_edge.checkpoints.hub_config import is_checkpoint, read_config
from molmo_edge.config import DecoderConfig, MolmoConfig
from molmo_edge.errors import EngineError, Unavailable, first_line
from molmo_edge.runtimes import LlamaOptions, open_runtime
from molmo_edge.runtimes.protocol import check_capacity
from molmo_edge.system.extras import pip_command

Probabilities = Callable[[np.ndarray], np.ndarray]
"""Decoder inputs float32 [n, d_model] -> router probabilities float32 [n_layers, n, n_experts]"""

_GATE = "model.transformer.blocks.{}.mlp.gate.weight"  # a router's weight in a graph, in any precision
_SHOWN = re.compile(r"ffn_moe_probs-(\d+)")  # the softmax in llama.cpp's graph (llm_graph_context::build_moe_ffn)


def router_choices(
    model: str | Path,
    rows: Sequence[np.ndarray],
    *,
    precision: str = "fp32",
    threads: int | None = None,
    engine_options: LlamaOptions | None = None,
) -> list[np.ndarray] | None:
    """The experts chosen at every position of some prompts; None for a decoder without experts.

    Args:
        model: Directory of a bundle, or of a checkpoint, which runs on PyTorch in `precision`. The decoder is loaded
            for this call and runs on the CPU.
        rows: The decoder's inputs for each prompt, float32 [n, d_model].
        engine_options: For a GGUF, see `molmo_edge.runtimes.open_runtime`.

    Returns:
        For each prompt int16 [n_layers, n, top_k], ids ascending along the last axis. Of equal probabilities the lower
        id is chosen.

    Raises:
        Unavailable: An ONNX decoder without the package onnx.
        EngineError: `rows` do not fit the model, or probabilities are NaN or Inf.
        MolmoEdgeError: As `molmo_edge.runtimes.open_runtime`.
    """
    directory = Path(model)
    bundle = open_bundle(directory) if is_bundle(directory) else None
    if bundle is None and not is_checkpoint(directory):
        raise EngineError(f"{directory} has neither a bundle (molmo_edge.json) nor a checkpoint (config.json)")
    config = read_config(directory) if bundle is None else bundle.config
    if not config.decoder.n_experts:
        return None
    prompts = [_checked(prompt, config) for prompt in rows]
    if bundle is None:
        probabilities = _on_pytorch(directory, precision, threads)
    elif bundle.components["decoder"].engine == "gguf":
        probabilities = _on_llama(bundle, threads, engine_options or LlamaOptions())
    else:
        probabilities = _on_onnx(bundle, threads)
    return [top_experts(probabilities(prompt), config.decoder.top_k) for prompt in prompts]


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """The share of the choices in `a` that are also in `b`, 0 to 1; both [n_layers, n, top_k] of the same prompt."""
    if a.shape[:2] != b.shape[:2] or not a.size:
        raise ValueError(f"the choices have different layers or positions: {a.shape} and {b.shape}")
    return float((a[..., :, None] == b[..., None, :]).any(axis=-1).mean())


def _checked(prompt: np.ndarray, config: MolmoConfig) -> np.ndarray:
    width = config.decoder.d_model
    if prompt.ndim != 2 or prompt.shape[1] != width:
        raise EngineError(f"the decoder's inputs must have the shape [n, {width}], not {list(prompt.shape)}")
    check_capacity(len(prompt), config)
    return np.ascontiguousarray(prompt, np.float32)


def top_experts(probabilities: np.ndarray, top_k: int) -> np.ndarray:
    """int16 [..., top_k], see `router_choices`, of [..., n_experts]. Raises EngineError for NaN and Inf."""
    if not np.isfinite(probabilities).all():  # argsort would put them last
        raise EngineError("the routers output NaN or Inf: check the weights and their precision")
    order = np.argsort(-probabilities, axis=-1, kind="stable")[..., :top_k]
    return np.sort(order, axis=-1).astype(np.int16)  # a quarter of the memory


# PyTorch.


def _on_pytorch(directory: Path, precision: str, threads: int | None) -> Probabilities:
    runtime = open_runtime(directory, device="cpu", precision=precision, threads=threads)
    import torch

    from molmo_edge.runtimes.torch import TorchRuntime

    assert isinstance(runtime, TorchRuntime)
    seen: list[np.ndarray] = []

    def keep(_module: torch.nn.Module, _inputs: Any, logits: torch.Tensor) -> None:
        seen.append(torch.softmax(logits.float(), dim=-1).numpy())

    for block in runtime.model.decoder.blocks:
        cast(Any, block.ffn).router.register_forward_hook(keep)  # SparseFFN, or its quantized forms

    def probabilities(rows: np.ndarray) -> np.ndarray:
        seen.clear()
        runtime.forward(rows, runtime.new_cache(len(rows)))
        return np.stack(seen)

    return probabilities


# ONNX Runtime, with the probabilities as additional outputs of the graph.


def _on_onnx(bundle: Bundle, threads: int | None) -> Probabilities:
    from molmo_edge.runtimes.onnx import check_components

    check_components(bundle, ("decoder",))
    path, d = bundle.path("decoder"), bundle.config.decoder
    graph, outputs = with_router_outputs(path, d)
    session = _open_session(graph, path, threads)

    def probabilities(rows: np.ndarray) -> np.ndarray:
        try:
            return _run_session(session, outputs, rows, d)
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no public base class
            raise EngineError(f"decoder failed in onnxruntime: {first_line(error)}") from error

    return probabilities


def with_router_outputs(path: Path, d: DecoderConfig) -> tuple[bytes, list[str]]:
    """The serialized graph without its external weights, and the names of the added outputs, one per layer.

    A router's logits are used only by its softmax, so every path from the router's weight ends there, in whatever
    form the weight is stored and multiplied.
    """
    try:
        import onnx
    except ImportError:
        raise Unavailable(f"reading the routers of an ONNX decoder needs onnx: {pip_command('export')}") from None
    model = onnx.load(path, load_external_data=False)
    readers = defaultdict(list)
    for node in model.graph.node:
        for value in node.input:
            readers[value].append(node)
    outputs: list[str] = []
    for layer in range(d.n_layers):
        found, values = set(), [_GATE.format(layer)]
        while values:
            for node in readers.pop(values.pop(), []):  # once
                if node.op_type == "Softmax":
                    found.add(node.output[0])
                else:
                    values.extend(node.output)
        if len(found) != 1:
            raise EngineError(
                f"{path}: layer {layer} has {len(found)} softmaxes after {_GATE.format(layer)} instead of one: export "
                "the bundle again"
            )
        outputs += found
    shape: list[int | str | None] = [1, "n", d.n_experts]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(o, onnx.TensorProto.FLOAT, shape) for o in outputs)
    return model.SerializeToString(), outputs


def _open_session(graph: bytes, path: Path, threads: int | None) -> Any:
    """Open the changed graph like molmo_edge.runtimes.onnx_sessions opens `path`, with the same external weights."""
    import onnxruntime

    from molmo_edge.runtimes.onnx_sessions import is_large, session_options

    options = session_options(threads, spin=is_large(path))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see above
        raise EngineError(f"{path} cannot be loaded by onnxruntime: {first_line(error)}") from error


def _run_session(session: Any, outputs: Sequence[str], rows: np.ndarray, d: DecoderConfig) -> np.ndarray:
    from onnxruntime import OrtValue

    from molmo_edge.runtimes.memory_plan import CHUNK
    from molmo_edge.runtimes.onnx_cache import CACHE_DTYPES

    binding = session.io_binding()
    for past in session.get_inputs():
        if past.name.startswith("past_"):  # [1, n_kv_heads, "capacity", head_dim], input and output at once
            shape = [len(rows) if size == "capacity" else size for size in past.shape]
            buffer = OrtValue.ortvalue_from_shape_and_type(shape, CACHE_DTYPES[past.type], "cpu", 0)
            binding.bind_ortvalue_input(past.name, buffer)
            binding.bind_ortvalue_output(past.name.replace("past_", "present_"), buffer)
    parts = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        part = np.empty((d.n_layers, 1, len(chunk), d.n_experts), np.float32)
        for name, layer in zip(outputs, part, strict=True):
            binding.bind_ortvalue_output(name, OrtValue.ortvalue_from_numpy(layer))  # the same memory
        binding.bind_cpu_input("embeddings", chunk[None])
        binding.bind_cpu_input("total_length", np.array([start + len(chunk)], np.int32))
        session.run_with_iobinding(binding)
        parts.append(part[:, 0])
    return np.concatenate(parts, axis=1)


# llama.cpp, which passes computed tensors to a callback.


def _on_llama(bundle: Bundle, threads: int | None, options: LlamaOptions) -> Probabilities:
    from molmo_edge.runtimes.llama import open_watched
    from molmo_edge.runtimes.llama_library import load_library
    from molmo_edge.runtimes.llama_states import tensor_reader

    d = bundle.config.decoder
    api, read = load_library(), tensor_reader()
    seen: dict[int, list[np.ndarray]] = defaultdict(list)

    def watch(tensor: int, ask: bool, _: object) -> bool:
        name, values = read(tensor, not ask)
        shown = _SHOWN.fullmatch(name)
        if shown is not None and not ask:
            seen[int(shown[1])].append(values.reshape(-1, d.n_experts))
        return shown is not None or not ask

    callback = api.ggml_backend_sched_eval_callback(watch)
    new_cache = open_watched(bundle, callback, threads=threads, options=options)

    def probabilities(rows: np.ndarray) -> np.ndarray:
        seen.clear()
        new_cache(len(rows)).append(rows)
        layers = [np.concatenate(seen[layer]) if seen[layer] else rows[:0] for layer in range(d.n_layers)]
        if missing := [layer for layer, part in enumerate(layers) if len(part) != len(rows)]:
            raise EngineError(
                f"llama.cpp returned router probabilities for {len(layers[missing[0]])} of {len(rows)} positions in "
                f"layer {missing[0]}: this version of molmo-edge does not support its graph"
            )
        return np.stack(layers)

    return probabilities

"""Graphs through Hugging Face's optimum: its ONNX exporter and its quantiser, for the parts of Molmo that they serve.

A second way from a checkpoint to ONNX, for whom optimum is the tool at hand and for its per-target int8. The graphs of
vision tower, connector and embeddings have the names, types and shapes of our own (export/vision_graph.py,
connector.py,
decoder.py) and can stand in for them. A decoder as a bundle needs it, whose caches are buffers that the caller binds
(export/decoder_graph.py), cannot be had by tracing; what optimum traces is a decoder that sees a whole sequence at
once.

Importing this registers the model type "molmo" with transformers' AutoConfig and AutoModel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from molmo_edge.checkpoints.hub_config import CONFIG, read_config
from molmo_edge.checkpoints.tensor_sources import check_tensors
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.export.errors import ExportError
from molmo_edge.export.staging import publish, staged
from molmo_edge.system.extras import pip_command

try:
    import onnx
    import onnxruntime
    import torch
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer

    from molmo_edge.export.optimum_components import (
        BUNDLE_COMPONENTS,
        COMPONENTS,
        Component,
        ComponentOnnxConfig,
        MolmoForExport,
        MolmoHubConfig,
        load_components,
    )
except ImportError as error:
    raise ExportError(
        f"this needs optimum, of versions that fit each other ({first_line(error)}): {pip_command('optimum')}"
    ) from error

TARGETS = ("arm64", "avx2", "avx512_vnni")
TOLERANCE = 1e-4  # largest difference from PyTorch, relative to the largest value


def export_with_optimum(
    checkpoint: str | Path, out: str | Path, components: Iterable[str] = BUNDLE_COMPONENTS
) -> dict[str, Path]:
    """Trace components of a checkpoint directory in hub layout into ONNX graphs in fp32 in `out`, a new directory.

    `components`, each a file `<component>.onnx` in opset 18:
        vision_encoder: crops float32 [n, patches^2, patch_size^2 * 3] -> features float32 [n, patches^2, feature_dim]
        connector: features, masks float32 [n, patches^2] -> image_features float32 [n, cells^2, d_model]
        embed_tokens: ids int64 [n] -> embeddings float32 [n, d_model]
        decoder_without_cache: embeddings float32 [1, n, d_model] -> logits float32 [1, embedding_size], of the last
            position. Of a model with experts it runs all of them for every token.

    Beside them lies the config.json that optimum's own tools look for. Memory holds the components asked for, and
    while one is written a copy of it or two. Weights of 2 GB or more go to `<component>.onnx_data`.

    Every graph is run beside PyTorch, on inputs of another size than it was traced with, and must agree within 1e-4
    of the largest value. `out` appears whole or not at all. Returns the files by component. Raises ExportError,
    ConfigError or CheckpointError.

    Source: optimum.exporters.onnx.main_export, with `fn_get_submodels` and `custom_onnx_configs`.
    """
    checkpoint, out, components = Path(checkpoint), Path(out), tuple(dict.fromkeys(components))
    if unknown := [name for name in components if name not in COMPONENTS]:
        raise ExportError(f"optimum has no component {unknown[0]!r} of ours; there are {', '.join(COMPONENTS)}")
    if not components:
        raise ExportError(f"no component was asked for; there are {', '.join(COMPONENTS)}")
    if out.exists():
        raise ExportError(f"{out} exists already: remove it, or choose another directory")
    config = read_config(checkpoint)
    if not (checkpoint / CONFIG).is_file():
        raise ExportError(
            f"{checkpoint} has no {CONFIG}, which optimum reads: `molmo-edge export {checkpoint} --engine torch --out "
            "DIRECTORY` writes the checkpoint in hub layout"
        )
    if config.conv_tower is not None:
        raise ExportError(f"{checkpoint} has a convolutional tower, which export_bundle writes and optimum does not")
    if config.extra_vision or config.image.pools_across_crops or config.decoder.bidirectional_images:
        raise ExportError(
            f"{checkpoint} has several ViTs, pooling across crops or bidirectional images, which export_bundle writes "
            "and optimum does not"
        )
    tensors = open_tensors(checkpoint)
    check_tensors(config, tensors, where=checkpoint)
    hub = MolmoHubConfig()
    onnx_configs = {name: ComponentOnnxConfig(name, config, hub) for name in components}
    modules: dict[str, Component] = {}

    def submodels(model: MolmoForExport) -> dict[str, Component]:
        modules.update(load_components(components, config, tensors, model.config))
        return modules

    needed = 4 * sum(math.prod(tensors.shape(name)) for name in tensors.names())  # the graphs are in float32
    with staged(out, needed) as scratch:
        staging = scratch / "graphs"
        try:
            main_export(
                str(checkpoint),
                staging,
                task="feature-extraction",
                library_name="transformers",
                local_files_only=True,
                custom_onnx_configs=onnx_configs,
                fn_get_submodels=submodels,
                no_post_process=True,  # merging of caches, sharing of tied weights: here are none
                do_validation=False,  # of values that differ it only logs a warning
            )
        except (MolmoEdgeError, MemoryError):
            raise
        except Exception as error:  # optimum, transformers and torch raise classes that share no base with a name
            raise ExportError(f"optimum could not export {checkpoint}: {first_line(error)}") from error
        for name in components:
            _check(staging / f"{name}.onnx", modules[name], onnx_configs[name])
        publish(staging, out)
    return {name: out / f"{name}.onnx" for name in components}


def _check(path: Path, module: Component, config: ComponentOnnxConfig) -> None:
    inputs = config.generate_dummy_inputs("np", n=3)
    with torch.inference_mode():
        exact = module(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.run(list(config.outputs), inputs)[0]
    except Exception as error:  # onnxruntime's classes share no base with a name either
        raise ExportError(
            f"the graph that optimum made of {config.component} does not run: {first_line(error)}"
        ) from error
    if found.shape != exact.shape or not np.abs(found - exact).max() <= TOLERANCE * np.abs(exact).max():
        raise ExportError(f"the graph that optimum made of {config.component} does not give what PyTorch gives")


def quantize_with_optimum(directory: str | Path, target: str, out: str | Path | None = None) -> dict[str, Path]:
    """Give the graphs that `export_with_optimum` wrote to `directory` eight-bit weights, as suits a processor.

    `target`: "arm64", "avx2" or "avx512_vnni". A matrix has a scale for each output, the table of embeddings
    one, an activation one that is found as it comes (dynamic quantisation), so there is nothing to calibrate. Products
    of two activations, inputs and outputs stay in fp32. `out`: where the files go; `directory` if None.

    A decoder of OLMo's style (norms behind attention and FFN) is refused: its FFN reads the residual stream as it is,
    and one scale for all tokens loses the small ones beside an image's (on the golden model 80 % of the logits' norm,
    by ff_proj alone and by ff_out alone). molmo_edge.quantize rounds row by row.

    Returns the files by component, `<component>_int8_<target>.onnx`. Raises ExportError, or ConfigError
    where a decoder lies in `directory` without a config.json that can be read.

    Source: optimum.onnxruntime.ORTQuantizer with AutoQuantizationConfig.
    """
    directory = Path(directory)
    out = directory if out is None else Path(out)
    if target not in TARGETS:
        raise ExportError(f"the target {target!r} is not known; known are {', '.join(TARGETS)}")
    files = {name: directory / f"{name}.onnx" for name in COMPONENTS if (directory / f"{name}.onnx").is_file()}
    if not files:
        raise ExportError(f"{directory} has none of the graphs that optimum exports: {', '.join(COMPONENTS)}")
    if "decoder_without_cache" in files and read_config(directory).decoder.norm_after:
        raise ExportError(
            f"{files['decoder_without_cache']} is of OLMo's style, which int8 ruins here: remove the file"
        )
    suffix = f"int8_{target}"
    made = {name: out / f"{name}_{suffix}.onnx" for name in files}
    if existing := [path for path in made.values() if path.exists()]:
        raise ExportError(f"{existing[0]} exists already: remove it, or choose another directory")
    for path in files.values():
        try:
            wishes = getattr(AutoQuantizationConfig, target)(is_static=False, nodes_to_exclude=_without_weights(path))
            quantizer = ORTQuantizer.from_pretrained(directory, file_name=path.name)
            large = path.with_name(f"{path.name}_data").exists()
            quantizer.quantize(wishes, out, file_suffix=suffix, use_external_data_format=large)
        except MemoryError:
            raise
        except Exception as error:
            raise ExportError(f"optimum could not quantise {path}: {first_line(error)}") from error
    return made


def _without_weights(path: Path) -> list[str]:
    """Matrix products of two activations: eight bits there make the vision tower's error 4 to 7 times as large."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and weights.isdisjoint(node.input)]

"""Export and quantise components with Hugging Face's optimum.

An alternative to the graphs of this package, for users of optimum and for its int8 per processor type. The graphs of
vision tower, connector and embeddings have the names, types and shapes of ours (vision_graph.py, connector_graph.py,
decoder_graph.py) and can replace them. The decoder of a bundle, whose caches are buffers bound by the caller, cannot be
traced; optimum traces a decoder without a cache, which takes a whole sequence at once.

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
        f"this needs optimum with compatible versions of its dependencies ({first_line(error)}): "
        f"{pip_command('optimum')}"
    ) from error

TARGETS = ("arm64", "avx2", "avx512_vnni")
TOLERANCE = 1e-4  # largest difference from PyTorch / largest value


def export_with_optimum(
    checkpoint: str | Path, out: str | Path, components: Iterable[str] = BUNDLE_COMPONENTS
) -> dict[str, Path]:
    """Trace components of a checkpoint directory in hub layout into fp32 ONNX graphs in `out`, a new directory.

    `components`, each a file `<component>.onnx` in opset 18:
        vision_encoder: crops float32 [n, patches^2, patch_size^2 * 3] -> features float32 [n, patches^2, feature_dim]
        connector: features, masks float32 [n, patches^2] -> image_features float32 [n, cells^2, d_model]
        embed_tokens: ids int64 [n] -> embeddings float32 [n, d_model]
        decoder_without_cache: embeddings float32 [1, n, d_model] -> logits float32 [1, embedding_size], of the last
            position. It runs all experts for every token.

    The config.json that optimum's tools need is copied. Memory holds all components, and up to two copies of the one
    being written. Weights of 2 GB or more go to `<component>.onnx_data`.

    Every graph must agree with PyTorch within 1e-4 of the largest value, on inputs of another size than traced. `out`
    is created atomically. Returns the files by component. Raises ExportError, ConfigError or CheckpointError.

    Source: optimum.exporters.onnx.main_export, with `fn_get_submodels` and `custom_onnx_configs`.
    """
    checkpoint, out, components = Path(checkpoint), Path(out), tuple(dict.fromkeys(components))
    if unknown := [name for name in components if name not in COMPONENTS]:
        raise ExportError(
            f"{unknown[0]!r} is not a component that optimum exports (supported: {', '.join(COMPONENTS)})"
        )
    if not components:
        raise ExportError(f"no components given (supported: {', '.join(COMPONENTS)})")
    if out.exists():
        raise ExportError(f"{out} exists already: remove it, or choose another directory")
    config = read_config(checkpoint)
    if not (checkpoint / CONFIG).is_file():
        raise ExportError(
            f"{checkpoint} has no {CONFIG}, which optimum reads: `molmo-edge export {checkpoint} --engine torch --out "
            "DIRECTORY` writes the checkpoint in hub layout"
        )
    if config.conv_tower is not None:
        raise ExportError(f"optimum cannot export the convolutional tower of {checkpoint}: use export_bundle")
    if config.extra_vision or config.image.pools_across_crops or config.decoder.bidirectional_images:
        raise ExportError(
            f"{checkpoint} has several ViTs, pooling across crops or bidirectional images, which optimum cannot "
            "export: use export_bundle"
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
                no_post_process=True,  # no caches to merge, no tied weights to share
                do_validation=False,  # it only logs a warning; see _check
            )
        except (MolmoEdgeError, MemoryError):
            raise
        except Exception as error:  # the classes of optimum, transformers and torch share no public base class
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
    except Exception as error:  # nor do onnxruntime's
        raise ExportError(f"optimum's graph of {config.component} does not run: {first_line(error)}") from error
    if found.shape != exact.shape or not np.abs(found - exact).max() <= TOLERANCE * np.abs(exact).max():
        raise ExportError(f"the outputs of optimum's graph of {config.component} differ from PyTorch's")


def quantize_with_optimum(directory: str | Path, target: str, out: str | Path | None = None) -> dict[str, Path]:
    """Quantise the graphs that `export_with_optimum` wrote to `directory` to int8 for a type of processor.

    `target`: "arm64", "avx2" or "avx512_vnni". A matrix has one scale per output, the embedding table one, and an
    activation one that is computed at run time (dynamic quantisation), so no calibration is needed. Products of two
    activations, inputs and outputs stay fp32. `out`: the directory to write to; default: `directory`.

    Raises ExportError for a decoder with norms after attention and FFN (OLMo): its FFN reads the residual stream
    without a norm, and one scale for all tokens loses the small ones beside those of an image (on the golden model
    80 % of the logits' norm, by ff_proj alone and by ff_out alone). The int8 of this package has one scale per token.

    Returns the files by component, `<component>_int8_<target>.onnx`. Raises ExportError, or ConfigError for a decoder
    in `directory` without a readable config.json.

    Source: optimum.onnxruntime.ORTQuantizer with AutoQuantizationConfig.
    """
    directory = Path(directory)
    out = directory if out is None else Path(out)
    if target not in TARGETS:
        raise ExportError(f"{target!r} is not a supported target (supported: {', '.join(TARGETS)})")
    files = {name: directory / f"{name}.onnx" for name in COMPONENTS if (directory / f"{name}.onnx").is_file()}
    if not files:
        raise ExportError(f"{directory} holds no graph that optimum exports ({', '.join(COMPONENTS)})")
    if "decoder_without_cache" in files and read_config(directory).decoder.norm_after:
        raise ExportError(
            f"{files['decoder_without_cache']} has norms after attention and FFN, which int8 cannot quantise: remove it"
        )
    suffix = f"int8_{target}"
    made = {name: out / f"{name}_{suffix}.onnx" for name in files}
    if existing := [path for path in made.values() if path.exists()]:
        raise ExportError(f"{existing[0]} exists already: remove it, or choose another directory")
    for path in files.values():
        try:
            settings = getattr(AutoQuantizationConfig, target)(is_static=False, nodes_to_exclude=_without_weights(path))
            quantizer = ORTQuantizer.from_pretrained(directory, file_name=path.name)
            large = path.with_name(f"{path.name}_data").exists()
            quantizer.quantize(settings, out, file_suffix=suffix, use_external_data_format=large)
        except MemoryError:
            raise
        except Exception as error:
            raise ExportError(f"optimum could not quantise {path}: {first_line(error)}") from error
    return made


def _without_weights(path: Path) -> list[str]:
    """Matrix products of two activations: in int8 they make the vision tower's error 4 to 7 times as large."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and weights.isdisjoint(node.input)]

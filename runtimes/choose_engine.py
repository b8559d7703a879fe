"""Open a bundle or a checkpoint on the engine that runs it.

Graphs run on ONNX Runtime, a GGUF decoder on llama.cpp, checkpoints on PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge.checkpoints.bundle import is_bundle, open_bundle
from molmo_edge.checkpoints.hub_config import is_checkpoint
from molmo_edge.config import DEVICES, MolmoConfig
from molmo_edge.errors import EngineError, Unavailable
from molmo_edge.runtimes.llama_options import LlamaOptions
from molmo_edge.system.cores import choose_threads
from molmo_edge.system.extras import pip_command

if TYPE_CHECKING:
    from molmo_edge.runtimes.llama import LlamaRuntime
    from molmo_edge.runtimes.onnx import OnnxRuntime
    from molmo_edge.runtimes.protocol import PartedRuntime


def open_runtime(
    directory: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    engine_options: LlamaOptions | None = None,
    gaps: bool = False,
    max_crops: int | None = None,
    image_tokens: float | None = None,
) -> PartedRuntime:
    """Open a bundle or a checkpoint directory.

    `precision`: of a checkpoint's weights (molmo_edge.modeling.precision); a bundle's was chosen at its export.
    `threads`: CPU threads, at most the available cores; None: the engine's default, the physical cores, or a
    container's quota. `engine_options`: LlamaOptions for a bundle with a GGUF decoder. `gaps`: caches will have
    positions with gaps (molmo_edge.runtimes.protocol.GappedRuntime). `max_crops`, `image_tokens`: the most crops of an
    image, and the share of its tokens, that questions will use, None: all; to predict whether mapped weights will stay
    in memory.

    Raises Unavailable for a device or engine that is not installed, BundleError for a damaged bundle,
    PrecisionError for weights that do not fit into memory, else EngineError.
    """
    directory = Path(directory)
    if device not in DEVICES:
        raise Unavailable(f'"{device}" is not a supported device (supported: {", ".join(DEVICES)})')
    if engine_options is not None and not isinstance(engine_options, LlamaOptions):
        raise EngineError(f"engine_options must be LlamaOptions, not {type(engine_options).__name__}")
    choose_threads(threads)
    if is_bundle(directory):
        if precision != "auto":
            raise EngineError(
                f'precision="{precision}" applies to checkpoints; {directory} is a bundle, whose precision was chosen '
                "at its export"
            )
        bundle = open_bundle(directory)
        if bundle.components["decoder"].engine == "gguf":
            from molmo_edge.runtimes.llama import NO_GAPS, open_llama_runtime

            if gaps:
                raise Unavailable(f"{directory} cannot leave out image tokens: {NO_GAPS}")
            options = engine_options or LlamaOptions()
            return open_llama_runtime(bundle, device=device, threads=threads, options=options, max_crops=max_crops)
        _refuse_llama(engine_options, directory, "is a bundle for ONNX Runtime")
        from molmo_edge.runtimes.onnx import open_bundle_runtime

        return open_bundle_runtime(
            bundle, device=device, threads=threads, gaps=gaps, max_crops=max_crops, image_tokens=image_tokens
        )
    if is_checkpoint(directory):
        _refuse_llama(engine_options, directory, "is a checkpoint, which runs on PyTorch")
        torch = _pytorch(directory)
        runtime: PartedRuntime = torch.TorchRuntime(directory, device=device, precision=precision, threads=threads)
        return runtime
    raise EngineError(f"{directory} holds neither a bundle (molmo_edge.json) nor a checkpoint (config.json)")


def check_model_room(directory: str | Path, *, device: str = "auto", precision: str = "auto") -> None:
    """Raise MolmoEdgeError if a bundle or a checkpoint does not fit into free memory.

    `open_runtime` includes this check. Call it separately to check several models before the first is opened.
    """
    if is_bundle(directory):
        from molmo_edge.runtimes.bundle_room import check_bundle_room
        from molmo_edge.runtimes.onnx import place_bundle

        bundle = open_bundle(directory)
        check_bundle_room(bundle, place_bundle(bundle, device, insist=False))
    else:
        _pytorch(directory).check_checkpoint_room(directory, device=device, precision=precision)


def open_files(config: MolmoConfig, files: dict[str, Path], *, mapped: bool = False) -> OnnxRuntime | LlamaRuntime:
    """Open the component files of an unfinished bundle, without verification.

    `files`: by component; the decoder may be a .gguf, or missing if it is not used. `mapped`: leave weights in
    their files: slower, but uses almost no memory.
    """
    from molmo_edge.runtimes.onnx import OnnxRuntime

    decoder = files.get("decoder")
    if decoder is None or decoder.suffix != ".gguf":
        return OnnxRuntime(config, files, mapped=mapped)
    from molmo_edge.runtimes.llama import LlamaRuntime

    graphs = OnnxRuntime(config, {name: path for name, path in files.items() if name != "decoder"}, mapped=mapped)
    return LlamaRuntime(config, graphs, decoder)


def _refuse_llama(options: LlamaOptions | None, directory: Path, fact: str) -> None:
    if options is not None:
        raise EngineError(
            f"LlamaOptions apply to bundles with a GGUF decoder, but {directory} {fact}: leave engine_options out, or "
            "export with --engine gguf"
        )


def _pytorch(directory: str | Path) -> Any:
    """Return the module molmo_edge.runtimes.torch. Raises Unavailable without PyTorch."""
    try:
        from molmo_edge.runtimes import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise Unavailable(
            f"{directory} is a checkpoint, which runs on PyTorch: {pip_command('torch')}, or export it"
        ) from None
    return torch

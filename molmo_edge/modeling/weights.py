"""Read a checkpoint directory into a `modeling.Molmo`, and write one, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from molmo_edge.checkpoints.hub_config import read_config, write_hub_config
from molmo_edge.checkpoints.safetensors_files import INDEX, ShardWriter
from molmo_edge.checkpoints.tensor_names import hub_layout, hub_shapes
from molmo_edge.checkpoints.tensor_sources import CheckpointError, TensorSource, check_tensors
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling.model import Molmo
from molmo_edge.modeling.precision import compute_dtype, is_quantized, storage_dtype


def load_checkpoint(
    directory: str | Path, *, precision: str = "fp32", device: str | torch.device = "cpu"
) -> tuple[Molmo, Tokenizer, MolmoConfig]:
    """Read a checkpoint directory, in hub layout (config.json, tokenizer.json, weights) or the reference's own.

    `precision`: "fp32", "bf16", "int8" or "nf4" (modeling/precision.py). Memory holds the model in that precision and
    one tensor of the checkpoint.

    Returns the model in eval mode, its tokenizer and its configuration. Raises CheckpointError before reading any
    weights if a tensor is missing or its shape does not fit the configuration; the message names file and tensor.
    """
    directory = Path(directory)
    config = read_config(directory)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    model = build_model(config, open_tensors(directory), where=str(directory), precision=precision, device=device)
    return model, tokenizer, config


def build_model(
    config: MolmoConfig,
    source: TensorSource,
    *,
    where: str,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> Molmo:
    """A `Molmo` in eval mode with the parameters of `source`, read one hub tensor at a time."""
    shapes = check_tensors(config, source, where=where)
    with torch.device("meta"):
        model = Molmo(config)
    compute_dtype(precision)  # raises for an unsupported one
    model.precision = precision
    layout = hub_layout(config)
    expected = {name for name, parameter in model.named_parameters() if parameter.numel()}
    if unknown := sorted(expected - set(layout)):
        raise CheckpointError(f"no hub tensor fills {', '.join(unknown)}")
    if precision in ("int8", "nf4"):
        from molmo_edge.modeling.bitsandbytes import Quantizer

        quantizer = Quantizer(precision, device)
    with torch.no_grad():
        for name, slot in layout.items():
            tensors = (_read(source, hub) for hub in slot)
            if is_quantized(name, precision):
                quantizer.put(model, name, tensors)
            else:
                one = shapes[slot[0]]
                shape = one if len(slot) == 1 else (len(slot), *one)
                dtype = storage_dtype(name, len(one), precision, torch.device(device).type)
                _put(model, name, _filled(tensors, torch.empty(shape, dtype=dtype, device=device), one))
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:  # it has no rows, and so no tensor in the checkpoint
                _put(model, name, torch.empty(parameter.shape, device=device))
    return model.eval()


def load_part(config: MolmoConfig, source: TensorSource, part: str) -> nn.Module:
    """One submodule of `Molmo`, such as "vision" or "decoder.blocks.3", in float32 and eval mode; reads nothing else.

    With it a model that does not fit into memory can run block by block.
    """
    with torch.device("meta"):
        module = Molmo(config).get_submodule(part)
    shapes = hub_shapes(config)
    with torch.no_grad():
        for name, slot in hub_layout(config).items():
            if name.startswith(f"{part}."):
                one = shapes[slot[0]]
                target = torch.empty(one if len(slot) == 1 else (len(slot), *one))
                inside = name.removeprefix(f"{part}.")
                _put(module, inside, _filled((_read(source, hub) for hub in slot), target, one))
    return module.eval()


def _read(source: TensorSource, name: str) -> torch.Tensor:
    raw = source.raw(name)
    tensor = torch.from_numpy(raw if raw.flags.writeable else raw.copy())  # torch does not take read-only arrays
    return tensor.view(torch.bfloat16) if source.dtype(name) == "BF16" else tensor


def _filled(tensors: Iterator[torch.Tensor], target: torch.Tensor, one: tuple[int, ...]) -> torch.Tensor:
    for part, tensor in zip(target.view(-1, *one), tensors, strict=True):
        part.copy_(tensor)
    return target


def _put(model: nn.Module, name: str, values: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(values))


def save_checkpoint(
    model: Molmo,
    tokenizer_json: str | Path,
    directory: str | Path,
    *,
    dtype: str = "F32",
    parameter: Callable[[str], torch.Tensor] | None = None,
    shard_bytes: int = 1 << 62,
) -> None:
    """Write config.json, preprocessor_config.json, tokenizer.json and model.safetensors in hub layout.

    dtype: "F32" or "BF16". parameter: returns the whole parameter of a name if `model` holds only shards of it; called
    in the order of `hub_layout`. shard_bytes: maximum size of a file; larger checkpoints become
    model-00001-of-0000n.safetensors.
    """
    read = parameter or model.get_parameter

    def tensors() -> Iterator[np.ndarray]:
        for name, slot in hub_layout(model.config).items():
            values = read(name).detach().cpu()
            yield from (stored(part, dtype) for part in ([values] if len(slot) == 1 else list(values)))

    shapes = hub_shapes(model.config)
    write_tensors(model.config, tokenizer_json, Path(directory), shapes, dtype, tensors(), shard_bytes)


def write_tensors(
    config: MolmoConfig,
    tokenizer_json: str | Path,
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str | Mapping[str, str],
    tensors: Iterator[np.ndarray],
    shard_bytes: int,
) -> None:
    """Write a checkpoint in hub layout. `tensors`: as `ShardWriter` takes them, in the order of `shapes`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_hub_config(config, directory, Tokenizer.from_file(tokenizer_json).special)
    (directory / "tokenizer.json").write_text(Path(tokenizer_json).read_text(encoding="utf-8"), encoding="utf-8")
    if (bos := Path(tokenizer_json).with_name("tokenizer_config.json")).is_file():  # it names the BOS of a Molmo2
        (directory / bos.name).write_text(bos.read_text(encoding="utf-8"), encoding="utf-8")
    for old in (*directory.glob("model*.safetensors"), directory / INDEX):
        old.unlink(missing_ok=True)
    with ShardWriter(directory, shapes, dtype, shard_bytes) as writer:
        for name in shapes:
            writer.write(name, next(tensors))


def stored(values: torch.Tensor, dtype: str) -> np.ndarray:
    """`values` as stored in a file of one of DTYPES. Raises CheckpointError if float16 cannot represent them."""
    if dtype == "BF16":  # numpy has no bfloat16
        return values.to(torch.bfloat16).view(torch.uint16).numpy()
    if dtype == "F16":
        narrow = values.to(torch.float16)
        if narrow.isinf().any() and values.isfinite().all():
            raise CheckpointError("these weights overflow float16 (65504): choose bfloat16 or float32")
        return narrow.numpy()
    return (values.double() if dtype == "F64" else values.float()).numpy()


def fill(config: MolmoConfig, source: TensorSource, parameters: Mapping[str, nn.Parameter], *, where: str) -> None:
    """Fill parameters of a `Molmo`, or a rank's shards of them, from `source`, one hub tensor in memory at a time."""
    from torch.distributed.tensor import DTensor

    shapes = check_tensors(config, source, where=where)
    with torch.no_grad():
        for name, slot in hub_layout(config).items():
            one = shapes[slot[0]]
            target = parameters[name]
            if not isinstance(target, DTensor):
                _filled((_read(source, hub) for hub in slot), target, one)
                continue
            whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            _filled((_read(source, hub) for hub in slot), whole, one)
            put(target, whole)


@torch.no_grad()
def put(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy `whole`, which every rank holds, into a parameter or into this rank's shard of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):  # no communication
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)

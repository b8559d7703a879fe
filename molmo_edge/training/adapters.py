"""Adapters: their file, merging them into their checkpoint, and the run that trains them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_names import hub_layout, hub_shapes
from molmo_edge.checkpoints.tensor_sources import DTYPES, CheckpointError, TensorSource, check_tensors
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo
from molmo_edge.modeling.weights import stored, write_tensors
from molmo_edge.system.files import atomic_write
from molmo_edge.training.forward import Trainable
from molmo_edge.training.lora import (
    LoraConfig,
    LoraError,
    adapted,
    adapter_name,
    add_adapters,
    set_values,
    trained_whole,
)
from molmo_edge.training.parallel import World, at_rest, whole
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.trainer import SHARD_BYTES, Data, Trainer

ADAPTERS = "adapters.safetensors"
MERGED_IN = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # dtypes of a merged model


@dataclass(frozen=True)
class AdaptersFile:
    """Adapters of a run, and the parameters that it trained in full, by their names in a `Molmo`."""

    path: Path
    lora: LoraConfig
    base: str  # `base_identity` of the checkpoint that they belong to
    names: frozenset[str]

    @classmethod
    def open(cls, path: Path) -> AdaptersFile:
        """Read only the header. Raises LoraError, and CheckpointError for a damaged file."""
        if not path.is_file():
            raise LoraError(f"{path} does not exist: check the path of the adapters")
        try:
            with safe_open(path, "pt") as file:
                metadata, names = file.metadata() or {}, frozenset(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        try:
            settings: dict[str, Any] = json.loads(metadata["lora"])
            base = settings.pop("base")
            lists: Any = {key: tuple(value) for key, value in settings.items() if isinstance(value, list)}
            lora = LoraConfig(**settings | lists)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise LoraError(f"{path} lacks the settings of its adapters: was it written by another tool?") from None
        return cls(path, lora, base, names)

    def check(self, config: MolmoConfig, source: TensorSource, where: str | Path) -> None:
        """Raise LoraError if they belong to another checkpoint or are incomplete."""
        if self.base != base_identity(config, source):
            raise LoraError(
                f"the adapters {self.path} were trained for a different checkpoint than {where}: use that checkpoint"
            )
        names = [f"{adapter_name(n)}.{leaf}" for n in adapted(config, self.lora) for leaf in "ab"]
        if self.names != {*names, *trained_whole(config, self.lora)}:
            raise LoraError(f"{self.path} is damaged: its adapters do not match its header")

    def get(self, name: str) -> Tensor:
        """Read the tensor `name`, float32, on the CPU."""
        with safe_open(self.path, "pt") as file:
            return cast(Tensor, file.get_tensor(name))


def base_identity(config: MolmoConfig, source: TensorSource) -> str:
    """A hash of a few tensors of a checkpoint, the same whether it is stored in bfloat16 or float32."""
    last = config.decoder.n_layers - 1
    names = ["decoder.ln_f.weight", "connector.projector.w2.weight", "vision.blocks.0.attention.wq.weight"]
    names += ["decoder.blocks.0.attn.att_proj.weight", f"decoder.blocks.{last}.attn.attn_out.weight"]
    names += [f"decoder.blocks.{last}.ffn.{'down' if config.decoder.n_experts else 'ff_out.weight'}"]
    found = hashlib.sha256(json.dumps(sorted(hub_shapes(config).items())).encode())
    layout = hub_layout(config)
    for name in names:
        values = torch.tensor(source.get(layout[name][-1])).to(torch.bfloat16)
        found.update(values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in a `Molmo`, whole tensor) for each trained parameter. Collective: all ranks must exhaust it."""
    for name, parameter in at_rest(model).items():
        if parameter.requires_grad:
            yield name.removeprefix("molmo."), whole(parameter.detach())


def save_adapters(model: Trainable | Molmo, path: Path, lora: LoraConfig, base: str, here: World | None = None) -> None:
    """Write the trained parameters as float32 safetensors. Collective over `here`: rank 0 writes."""
    tensors = {name: values.cpu().float() for name, values in trained(model)}
    if here is not None and not here.first:
        return
    # A single key: the library writes several in a random order, and equal adapters should give equal files.
    metadata = {"lora": json.dumps(dataclasses.asdict(lora) | {"base": base})}
    with atomic_write(path) as part:
        part.write_bytes(save({name: values.contiguous() for name, values in tensors.items()}, metadata))


def load_adapters(molmo: Molmo, path: Path, checkpoint: Path) -> list[str]:
    """Add adapters to `molmo`, which was loaded from `checkpoint`; returns the names that `add_adapters` returns.

    Raises LoraError if they belong to another checkpoint.
    """
    file = AdaptersFile.open(path)
    file.check(molmo.config, open_tensors(checkpoint), checkpoint)
    names = add_adapters(molmo, file.lora)
    for name in names:
        set_values(molmo.get_parameter(name), file.get(name))
    return names


def merge(checkpoint: Path, adapters: Path, out: Path, dtype: str | None = None) -> None:
    """Merge adapters into `checkpoint` and write the result in hub layout to the directory `out`.

    dtype: "F32", "BF16" or "F16"; None keeps the dtype of each tensor, and frozen tensors are copied byte for byte.
    Sums are computed in float32; memory holds two tensors. Raises LoraError and CheckpointError.
    """
    config, source = read_config(checkpoint), open_tensors(checkpoint)
    if out.resolve() == checkpoint.resolve():
        raise LoraError(f"{out} is the checkpoint itself: choose another directory")
    if dtype is not None and dtype not in MERGED_IN.values():
        raise LoraError(f'a merged model cannot be stored in "{dtype}" (known: {", ".join(MERGED_IN.values())})')
    shapes = check_tensors(config, source, where=checkpoint)
    file = AdaptersFile.open(adapters)
    file.check(config, source, checkpoint)
    dtypes = {name: dtype or source.dtype(name) for name in shapes}
    # Wider ones first, as `ShardWriter` requires.
    order = sorted(shapes, key=lambda name: -DTYPES[dtypes[name]].itemsize)
    ranks, own = adapted(config, file.lora), set(trained_whole(config, file.lora))
    places = {hub: (name, i) for name, slot in hub_layout(config).items() for i, hub in enumerate(slot)}

    adapter = functools.lru_cache(maxsize=8)(file.get)  # experts are merged one by one and share an adapter

    def merged(hub: str) -> np.ndarray:
        name, i = places[hub]
        if name not in ranks and name not in own and dtypes[hub] == source.dtype(hub):
            return source.raw(hub)
        if name in own:
            values = file.get(name)
        else:
            values = torch.tensor(source.get(hub))
            if rank := ranks.get(name):
                a, b = (adapter(f"{adapter_name(name)}.{leaf}") for leaf in "ab")
                a, b = a.view(-1, rank, a.shape[-1])[i], b.view(-1, b.shape[-2], rank)[i]  # of this expert
                values.addmm_(b, a, alpha=file.lora.scale(rank))
        return stored(values, dtypes[hub])

    tokenizer, tensors = checkpoint / "tokenizer.json", map(merged, order)
    write_tensors(config, tokenizer, out, {name: shapes[name] for name in order}, dtypes, tensors, SHARD_BYTES)


class LoraTrainer(Trainer):
    """A run that writes its adapters to `directory`/adapters.safetensors and the merged model to `directory`/model.

    model: from `build_adapted`, with the same `checkpoint` and `lora`. merged_in: the dtype of `merge`.
    """

    def __init__(
        self,
        model: Trainable,
        tokenizer: Tokenizer,
        data: Data,
        recipe: Recipe,
        directory: Path,
        here: World,
        *,
        checkpoint: Path,
        lora: LoraConfig,
        merged_in: str | None = None,
    ):
        self.checkpoint, self.lora, self.merged_in = checkpoint, lora, merged_in
        self.base = base_identity(model.molmo.config, open_tensors(checkpoint))
        super().__init__(model, tokenizer, data, recipe, directory, here)

    def write_model(self, directory: Path, dtype: str | None = None) -> None:
        """Write the current adapters and the merged model. Collective: all ranks must call it."""
        save_adapters(self.model, self.directory / ADAPTERS, self.lora, self.base, self.here)
        if self.here.first:
            merge(self.checkpoint, self.directory / ADAPTERS, directory, dtype or self.merged_in)
        self.here.wait()

    def _identity(self) -> dict[str, Any]:
        lora = json.loads(json.dumps(dataclasses.asdict(self.lora)))  # as JSON returns it: lists instead of tuples
        return super()._identity() | {"base": self.base, "adapters": lora}

"""Low-rank adapters for frozen weights (LoRA, arXiv 2106.09685), optionally in 4 bits (QLoRA, arXiv 2305.14314).

The layer of a matrix W computes W x + s b (a x). Only a and b are trained; b starts at zero, so the model starts with
the checkpoint's outputs. Merging adds s b a to the checkpoint's own weights, also after a run on 4-bit weights, so the
merged model does not contain their rounding. There is no dropout of adapter inputs: the recipe's residual dropout
serves the same purpose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_names import hub_layout, hub_shapes
from molmo_edge.checkpoints.tensor_sources import TensorSource, check_tensors
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.modeling import Molmo
from molmo_edge.modeling.bitsandbytes import QuantizedLinear, Quantizer
from molmo_edge.modeling.decoder import BLOCK, SparseFFN, by_expert, grouped_mm, has_grouped_mm, in_blocks
from molmo_edge.modeling.linear import match, working_dtype
from molmo_edge.modeling.precision import is_quantized, storage_dtype
from molmo_edge.modeling.weights import build_model, fill
from molmo_edge.system.memory import give_back
from molmo_edge.training.forward import Trainable
from molmo_edge.training.parallel import World
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.sharding import shard
from molmo_edge.training.trainer import compute_dtype

BASES = ("fp32", "bf16", "nf4")
_TARGETS = {
    "attention": r"decoder\.blocks\.\d+\.attn\.(att_proj|attn_out)\.weight",
    "ffn": r"decoder\.blocks\.\d+\.ffn\.(ff_proj|ff_out)\.weight",
    "experts": r"decoder\.blocks\.\d+\.ffn\.(gate|up|down)",
    "connector": r"connector\.(pooling|projector)\.\w+\.weight",
    "vision": r"vision\.blocks\.\d+\.(attention|feed_forward)\.\w+\.weight",
}
_WHOLE = ("connector", "vision")


class LoraError(MolmoEdgeError):
    """Adapters that cannot be created, or that belong to another checkpoint."""


@dataclass(frozen=True)
class LoraConfig:
    """Which weights are trained. All others are frozen, including routers, norms, embeddings and head."""

    rank: int = 16
    # Rank for each expert's matrices. MolmoE uses eight experts per token, so their ranks add up.
    expert_rank: int = 4
    alpha: float = 32.0  # an adapter's product is scaled by alpha / rank
    # QLoRA found that every matrix of the decoder needs an adapter. "ffn" are those of dense models. The ViT has none
    # by default: a few hundred pictures teach it little.
    targets: tuple[str, ...] = ("attention", "ffn", "experts")
    # The connector adapts to new kinds of pictures, and is 0.2 % of MolmoE's weights (1.4 % of the 7B-D's).
    whole: tuple[str, ...] = ("connector",)

    def __post_init__(self) -> None:
        """Raises LoraError."""
        for known, asked in ((tuple(_TARGETS), self.targets), (_WHOLE, self.whole)):
            if unknown := [name for name in asked if name not in known]:
                raise LoraError(f'"{unknown[0]}" cannot be trained this way (known: {", ".join(known)})')
        if both := set(self.targets) & set(self.whole):
            raise LoraError(f'"{both.pop()}" cannot be trained both as a whole and with adapters: choose one')
        if min(self.rank, self.expert_rank) < 1 or not self.alpha > 0:
            raise LoraError("ranks must be at least 1, and alpha greater than 0")

    def scale(self, rank: int) -> float:
        """The factor of an adapter's product: alpha / rank."""
        return self.alpha / rank


# --- which parameters ---------------------------------------------------------------------------------------------


def adapted(config: MolmoConfig, lora: LoraConfig) -> dict[str, int]:
    """The parameters of a `Molmo` that get adapters, with their ranks, in the order of `hub_layout`."""
    ranks = {part: lora.expert_rank if part == "experts" else lora.rank for part in lora.targets}
    found = {}
    for name in hub_layout(config):
        for part, rank in ranks.items():
            if re.fullmatch(_TARGETS[part], name) and _runs(name, config):
                found[name] = rank
    if not found and not lora.whole:
        raise LoraError(f"nothing in this model can be trained: it has no {' or '.join(lora.targets) or 'targets'}")
    return found


def trained_whole(config: MolmoConfig, lora: LoraConfig) -> list[str]:
    """The names of the parameters that are trained as a whole, in the order of `hub_layout`."""
    # The head of grounding tokens goes with the connector: it is as small, and adapts to the same pictures.
    parts = (*lora.whole, *(["point_head"] if "connector" in lora.whole else []))
    return [n for n in hub_layout(config) if n.partition(".")[0] in parts and _runs(n, config)]


def count_values(config: MolmoConfig, lora: LoraConfig) -> tuple[int, int, int]:
    """(values in adapters, values trained as a whole, all values) of a model with this configuration."""
    shapes, layout = hub_shapes(config), hub_layout(config)
    adapters = sum(rank * sum(sum(shapes[h]) for h in layout[n]) for n, rank in adapted(config, lora).items())
    own = sum(math.prod(shapes[hub]) for name in trained_whole(config, lora) for hub in layout[name])
    return adapters, own, sum(map(math.prod, shapes.values()))


def _runs(name: str, config: MolmoConfig) -> bool:
    """Whether a parameter is used: the outputs of the ViT's last blocks are not."""
    block = re.match(r"vision\.blocks\.(\d+)\.", name)
    return block is None or int(block[1]) <= config.vision.last_layer


def adapter_name(parameter: str) -> str:
    """The name of a parameter's adapter, whose matrices are `.a` and `.b`."""
    path, _, leaf = parameter.rpartition(".")
    return f"{path}.adapter" if leaf == "weight" else f"{path}.adapter.{leaf}"


# --- adapters in a model --------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """s b (a x): a [rank, in], b [out, rank], float32; of experts [experts, rank, in] and [experts, out, rank]."""

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float, device: torch.device):
        """shape: of the adapted matrix."""
        super().__init__()
        *experts, n_out, n_in = shape
        self.a = nn.Parameter(torch.empty(*experts, rank, n_in, device=device))
        self.b = nn.Parameter(torch.empty(*experts, n_out, rank, device=device))
        self.scale = scale

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x [..., in] -> [..., out]. expert: index of the expert, for an adapter of experts."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        return F.linear(F.linear(match(x, a), a), b) * self.scale


def add_adapters(molmo: Molmo, lora: LoraConfig, seed: int = 0) -> list[str]:
    """Freeze `molmo` and add adapters, in place. Its outputs do not change until the first update.

    Returns the names of the trained parameters. On the meta device adapters have no values yet, see `init_adapters`.
    Raises LoraError if nothing in the model can be trained.
    """
    molmo.requires_grad_(False)
    for name, rank in adapted(molmo.config, lora).items():
        path, _, leaf = name.rpartition(".")
        module = molmo.get_submodule(path)
        if leaf == "weight":
            inner = cast(nn.Linear, module.inner if isinstance(module, QuantizedLinear) else module)
            shape = (inner.out_features, inner.in_features)
            module.adapter = LowRank(shape, rank, lora.scale(rank), inner.weight.device)
            module.register_forward_hook(_beside)  # not a wrapper, so that parameters of the base keep their names
        else:
            _adapt_experts(cast(SparseFFN, module), molmo.config, leaf, rank, lora.scale(rank))
    for name in trained_whole(molmo.config, lora):
        parameter = molmo.get_parameter(name)
        parameter.data = parameter.data.float()  # bfloat16 would round updates away
        parameter.requires_grad_(True)
    init_adapters(molmo, seed)
    return [name for name, parameter in molmo.named_parameters() if parameter.requires_grad]


def init_adapters(molmo: nn.Module, seed: int) -> None:
    """Initialise a like PyTorch's linear layers and b with zeros, identically on any device and number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in molmo.named_parameters():
        if ".adapter." in name and not parameter.is_meta:
            values = torch.zeros(parameter.shape)
            if name.endswith(".a"):
                values.uniform_(-1, 1, generator=generator).div_(math.sqrt(parameter.shape[-1]))
            set_values(parameter, values)


@torch.no_grad()
def set_values(parameter: Tensor, values: Tensor) -> None:
    """Copy `values`, the whole tensor on every rank, to a parameter in place, or its part to a shard."""
    values = values.to(parameter.device)
    if isinstance(parameter, DTensor):  # every rank has all values: nothing is sent
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


def _beside(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return cast(Tensor, output + cast(LowRank, layer.adapter)(args[0]))


def _adapt_experts(ffn: SparseFFN, config: MolmoConfig, leaf: str, rank: int, scale: float) -> None:
    d = config.decoder
    shape = (d.n_experts, d.d_model, d.ffn_dim) if leaf == "down" else (d.n_experts, d.ffn_dim, d.d_model)
    if not hasattr(ffn, "adapter"):
        ffn.adapter = nn.ModuleDict()
        ffn.mix = partial(_mix, ffn)  # type: ignore[method-assign]
    cast(nn.ModuleDict, ffn.adapter)[leaf] = LowRank(shape, rank, scale, ffn.router.weight.device)


def _mix(ffn: SparseFFN, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Like `SparseFFN.mix`, with adapters or 4-bit weights. The kernel "wide" is replaced by a loop."""
    plain = isinstance(ffn.gate, nn.Parameter)
    if plain and (ffn.kernel == "grouped" or (ffn.kernel == "auto" and has_grouped_mm(ffn.gate))):
        return _grouped(ffn, x, weights, experts)
    adapters: Mapping[str, LowRank] = getattr(ffn, "adapter", {})

    def product(which: str, rows: Tensor, e: int) -> Tensor:
        base = getattr(ffn, which)
        out = F.linear(match(rows, base), base[e]) if plain else base[e](rows)
        return cast(Tensor, out + adapters[which](rows, e) if which in adapters else out)

    def expert(rows: Tensor, e: int) -> Tensor:
        return product("down", F.silu(product("gate", rows, e)) * product("up", rows, e), e)

    return by_expert(x, weights, experts, ffn.router.out_features, expert)


def _grouped(ffn: SparseFFN, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Like the grouped kernel of decoder.py, with two narrow products for each adapter.

    Merging the adapters first would be shorter, but needs a copy of a layer's experts and a gradient of that size.
    """
    dtype = working_dtype(ffn.gate)

    def swiglu(rows: Tensor, ends: Tensor) -> Tensor:
        def times(rows: Tensor, matrices: Tensor) -> Tensor:
            return cast(Tensor, grouped_mm(rows, matrices.to(dtype).transpose(1, 2), offs=ends))

        def product(which: str, rows: Tensor) -> Tensor:
            adapter = cast(LowRank, cast(nn.ModuleDict, ffn.adapter)[which])
            spare = -adapter.a.shape[1] % BLOCK  # narrow rows are aligned to 16 bytes, too
            narrow = times(rows, F.pad(adapter.a, (0, 0, 0, spare)))
            return times(rows, getattr(ffn, which)) + adapter.scale * times(narrow, F.pad(adapter.b, (0, spare)))

        return product("down", F.silu(product("gate", rows)) * product("up", rows))

    return in_blocks(x.to(dtype), weights, experts, len(ffn.gate), swiglu)


# --- the frozen base ------------------------------------------------------------------------------------------------


def build_adapted(checkpoint: Path, recipe: Recipe, here: World, lora: LoraConfig, base: str = "auto") -> Trainable:
    """Like `trainer.build`, with adapters. base: precision of the frozen weights, of BASES, or "auto".

    On several ranks the base is float32 shards; nf4 works on one rank only. Raises LoraError, CheckpointError, and
    PrecisionError if "nf4" is requested and bitsandbytes is missing.
    """
    if base == "auto":  # few CPUs multiply bfloat16 fast
        base = "bf16" if here.device.type == "cuda" else "fp32"
    if base not in BASES:
        raise LoraError(f'the frozen weights cannot be stored in "{base}" (known: {", ".join(BASES)})')
    if here.ranks > 1 and (base == "nf4" or (recipe.layout.experts > 1 and "experts" in lora.targets)):
        what = "4-bit weights" if base == "nf4" else "experts with adapters"
        raise LoraError(f'{what} cannot be spread over ranks: use one rank, or base="bf16" and experts=1')
    config, source, where = read_config(checkpoint), open_tensors(checkpoint), str(checkpoint)
    if here.ranks == 1:
        molmo = open_base(config, source, where, base, here.device)
        add_adapters(molmo, lora, recipe.seed)
        return Trainable(molmo, recipe.forward).train()
    with torch.device("meta"):
        molmo = Molmo(config)
        add_adapters(molmo, lora)
    model = Trainable(molmo, recipe.forward)
    shard(model, recipe.layout, here, compute=compute_dtype(recipe, here))
    model.to_empty(device=here.device)
    fill(config, source, {n.removeprefix("molmo."): p for n, p in model.named_parameters()}, where=where)
    init_adapters(model, recipe.seed)
    return model.train()


def open_base(config: MolmoConfig, source: TensorSource, where: str, base: str, device: torch.device) -> Molmo:
    """Like `build_model`, in eval mode; gradients flow through 4-bit weights to their inputs."""
    if base != "nf4":
        return build_model(config, source, where=where, precision=base, device=device)
    check_tensors(config, source, where=where)
    with torch.device("meta"):
        molmo = Molmo(config)
    molmo.precision, quantizer = base, _FourBits(base, device)
    for name, slot in hub_layout(config).items():
        path, _, leaf = name.rpartition(".")
        tensors = (torch.tensor(source.get(hub)) for hub in slot)
        if not is_quantized(name, base):
            (values,) = tensors  # several tensors are experts, which are quantised
            dtype = storage_dtype(name, values.ndim, base, device.type)
            setattr(molmo.get_submodule(path), leaf, nn.Parameter(values.to(device, dtype)))
        elif leaf == "weight":
            quantizer.put(molmo, name, tensors)
        else:  # it stays a SparseFFN: the trainer uses its routing
            ffn = cast(SparseFFN, molmo.get_submodule(path))
            delattr(ffn, leaf)
            ffn.add_module(leaf, nn.ModuleList(quantizer.linear(weight) for weight in tensors))
            ffn.mix = partial(_mix, ffn)  # type: ignore[method-assign]
            give_back()
    if molmo.decoder.new_embedding.is_meta:  # without rows, so without a tensor in the checkpoint
        molmo.decoder.new_embedding = nn.Parameter(torch.empty(molmo.decoder.new_embedding.shape, device=device))
    return molmo.eval()


class _FourBits(Quantizer):
    """A 4-bit layer that keeps the stored layout, because the CPU layout for inference has no backward pass."""

    def linear(self, weight: Tensor) -> QuantizedLinear:
        layer = self._nf4(weight)
        cast(Any, layer.inner).support_avx512bf16_for_cpu = False
        return layer

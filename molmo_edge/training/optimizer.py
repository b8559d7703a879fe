"""AdamW with a separate learning rate, warm-up and gradient clipping for each of Molmo's parts.

Reference: olmo/optim.py (get_multimodal_param_groups, MultimodalScheduler, clip_grads_and_collect_metrics). The states
are PyTorch's in fp32, or bitsandbytes' in 8 bits (arXiv 2110.02861), which take a quarter of the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.training.parallel import is_sharded, local_part, squared_sum

PARTS = ("connector", "vision", "decoder", "point_head")
STATES = ("exp_avg", "exp_avg_sq")
_BLOCK = 256  # values that share a scale in 8-bit states
_EIGHT_BIT = 4096  # parameters with fewer values keep fp32 states, as bitsandbytes does


class OptimizerError(MolmoEdgeError):
    """An unknown or unavailable optimizer."""


@dataclass(frozen=True)
class Rate:
    """The learning rate of one part."""

    peak: float
    warmup: int  # steps


@dataclass(frozen=True)
class OptimizerConfig:
    """Stage 1's values (launch_scripts/train_captioner.py)."""

    connector: Rate = Rate(2e-4, 200)
    vision: Rate = Rate(6e-6, 2000)
    decoder: Rate = Rate(2e-5, 2000)
    point_head: Rate = Rate(1e-4, 200)  # of models with grounding tokens; MolmoPoint's stages have this one, too
    floor: float = 0.1  # share of the peak at the end of the cosine
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip: float = 1.0  # of the gradient's norm, per part: better captions than one norm for all parts (PAPER)
    states: str = "fp32"  # or "8bit"


def part_of(parameter: str) -> str:
    """Which of PARTS a parameter of `modeling.Molmo` is in; as in the reference, new_embedding is in the connector."""
    name = parameter.removeprefix("molmo.")
    if name == "decoder.new_embedding":
        return "connector"
    part = name.partition(".")[0]
    return {"conv_tower": "vision", "heat_maps": "connector", "distillation": "connector"}.get(part, part)


def rate_at(rate: Rate, step: int, steps: int, floor: float) -> float:
    """Learning rate of step 1 to `steps`: linear warm-up, then a cosine down to `floor`. Reference: CosWithWarmup."""
    if step < rate.warmup:
        return rate.peak * step / rate.warmup
    if step >= steps:
        return rate.peak * floor
    turn = math.pi * (step - rate.warmup) / (steps - rate.warmup)
    return rate.peak * (floor + (1 - floor) * (1 + math.cos(turn)) / 2)


class Optimizer:
    """Updates the trainable parameters of a model, or a rank's shards of them."""

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise OptimizerError("every part of the model is frozen: nothing can be trained")
        self.updates = 0  # steps that were not skipped, which AdamW's bias correction counts
        self._eight = config.states == "8bit"
        if config.states not in ("fp32", "8bit"):
            raise OptimizerError(f'optimizer states cannot be "{config.states}" (known: fp32, 8bit)')
        # It updates this rank's shards, which share the parameters' memory: bitsandbytes does not support DTensor, and
        # PyTorch's fused step does not support several meshes.
        self._stepped = {n: nn.Parameter(local_part(p.detach())) for n, p in self.parameters.items()}
        names = {part: [n for n in self.parameters if part_of(n) == part] for part in PARTS}
        self._names = {part: mine for part, mine in names.items() if mine}  # of what is trained, by part
        groups = [
            {"params": [self._stepped[n] for n in mine], "part": part, "lr": 0.0} for part, mine in self._names.items()
        ]
        options: dict[str, Any] = {
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
        }
        if self._eight:
            from molmo_edge.modeling.bitsandbytes import import_bitsandbytes

            adamw = import_bitsandbytes("8-bit optimizer states", "states in fp32").optim.AdamW8bit
            self._inner = adamw(groups, lr=0.0, min_8bit_size=_EIGHT_BIT, **options)
        else:
            fused = next(iter(self.parameters.values())).is_cuda
            self._inner = torch.optim.AdamW(groups, lr=0.0, fused=fused, **options)

    def step(self, step: int, steps: int) -> dict[str, float]:
        """Update with the rates of `step`, counted from 1, and the clipped gradients; return the rates by part."""
        rates = {}
        for group in self._inner.param_groups:
            part = group["part"]
            rates[part] = group["lr"] = rate_at(getattr(self.config, part), step, steps, self.config.floor)
        for name, p in self.parameters.items():
            none = p.grad is None or not self._stepped[name].numel()  # a shard may be empty
            self._stepped[name].grad = None if none else local_part(cast(Tensor, p.grad))
        self._inner.step()
        self.updates += 1
        return rates

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for p in (*self.parameters.values(), *self._stepped.values()):
            p.grad = None

    def norms(self) -> dict[str, Tensor]:
        """The norm of the gradient of each part, over all ranks."""
        sums = squared_sum([self._grads(part) for part in self._names])
        return dict(zip(self._names, sums.sqrt(), strict=True))

    @torch.no_grad()
    def clip(self, norms: Mapping[str, Tensor]) -> None:
        """Clip the gradient of each part to the norm `config.clip`."""
        for part, norm in norms.items():
            grads = [local_part(grad) for grad in self._grads(part)]
            torch._foreach_mul_(grads, (self.config.clip / (norm + 1e-6)).clamp(max=1.0))

    def _grads(self, part: str) -> list[Tensor]:
        grads = (self.parameters[name].grad for name in self._names[part])
        return [grad for grad in grads if grad is not None]

    # --- states as checkpoints store them: float32, in the shape of their parameter, for either kind of states -------

    def states(self) -> dict[str, Tensor]:
        """ "NAME.exp_avg" and "NAME.exp_avg_sq", zeros before the first update. 8-bit states are returned as copies."""
        return {f"{name}.{which}": tensor for name, which, tensor in self._states()}

    @property
    def gives_copies(self) -> bool:
        """Whether `states` returns copies, which later updates do not change."""
        return self._eight

    def _states(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, p in self.parameters.items():
            kept = self._inner.state.get(self._stepped[name], {})
            for i, which in enumerate(STATES, start=1):
                if not kept:
                    yield name, which, self._aside(torch.zeros_like(p, dtype=torch.float32).detach())
                elif not self._eight:
                    yield name, which, _like(p, kept[which])
                else:
                    yield name, which, self._aside(_like(p, _widened(kept, i)))

    def _aside(self, state: Tensor) -> Tensor:
        """Move 8-bit states to the CPU: fp32 copies of all states would not fit next to the model on one GPU."""
        return state.cpu() if self._eight and not is_sharded(state) else state

    def load_states(self, states: Mapping[str, Tensor], updates: int) -> None:
        """The inverse of `states`. updates: the number of updates made before."""
        self.updates = updates
        for name, p in self.parameters.items():
            first, second = (states[f"{name}.{which}"] for which in STATES)
            key = self._stepped[name]
            if self._eight and key.numel():
                self._inner.init_state(self._group(key), key, 0, 0)
                kept = self._inner.state[key]
                kept["step"] = updates
                for i, tensor in ((1, first), (2, second)):
                    _narrow(kept, i, local_part(tensor).to(key.device))
            elif not self._eight:
                step = torch.tensor(float(updates), device=p.device if self._inner.defaults["fused"] else "cpu")
                kept = {"exp_avg": local_part(first), "exp_avg_sq": local_part(second)}
                self._inner.state[key] = {"step": step, **kept}
        if self._eight:
            self._inner.initialized = True

    def _group(self, key: Tensor) -> dict[str, Any]:
        return next(g for g in self._inner.param_groups if any(p is key for p in g["params"]))


def _widened(kept: dict[str, Any], i: int) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    state = cast(Tensor, kept[f"state{i}"])
    if state.dtype == torch.float32:
        return state
    wide = dequantize_blockwise(state, absmax=kept[f"absmax{i}"], code=kept[f"qmap{i}"], blocksize=_BLOCK)
    return wide.view(state.shape)


def _narrow(kept: dict[str, Any], i: int, values: Tensor) -> None:
    """The inverse of `_widened`, and exactly: states that were 8 bit become the same codes again.

    bitsandbytes' own rounding would not give them back. The signed code ends at 1 and at -0.993, so that a block whose
    largest value is negative would get a smaller scale each time.
    """
    state = cast(Tensor, kept[f"state{i}"])
    if state.dtype == torch.float32:
        state.copy_(values)
        return
    code, scales = kept[f"qmap{i}"], kept[f"absmax{i}"]
    blocks = nn.functional.pad(values.float().flatten(), (0, -values.numel() % _BLOCK)).view(-1, _BLOCK)
    high, low = blocks.amax(1), -blocks.amin(1)
    scales.copy_(torch.where(high > low, high, low / code.min().abs().clamp(min=0.5)))
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    above = torch.bucketize(shares, code).clamp(1, len(code) - 1)
    nearer = shares - code[above - 1] < code[above] - shares
    codes = (above - nearer.long()).to(torch.uint8).flatten()[: values.numel()]
    state.copy_(codes.view(state.shape))


def _like(p: Tensor, local: Tensor) -> Tensor:
    """`local`, this rank's part of a tensor of the shape of `p`, as a tensor that is distributed like `p`."""
    if not isinstance(p, DTensor):
        return local
    return DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride(), run_check=False)

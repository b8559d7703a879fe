"""The log of a run: readable lines, lines of JSON, and TensorBoard if it is installed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from molmo_edge.system.log import steps_log
from molmo_edge.training.optimizer import PARTS
from molmo_edge.training.parallel import World

LOG = "log.jsonl"
_TAUGHT = {  # losses of distillation, and their names in a line
    "divergence": "divergence",
    "hidden_loss": "hidden states",
    "point_divergence": "points from the teacher",
    "image_loss": "image features",
}


@dataclass
class Window:
    """Counts of this rank since the last line of the log."""

    device_flops: float  # per second, of all ranks
    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0  # seconds spent waiting for data
    tokens: float = 0.0
    image_tokens: float = 0.0
    answers: float = 0.0
    flops: float = 0.0
    sequences: float = 0.0
    replaced: float = 0.0
    load: Tensor | None = None  # int64 [layers, experts]

    def figures(self, here: World) -> dict[str, Any]:
        """Figures of all ranks, per second and as shares; waiting and memory are this rank's. All ranks call it."""
        seconds = time.perf_counter() - self.began
        own = [self.tokens, self.image_tokens, self.answers, self.flops, self.sequences, self.replaced]
        sums = here.sum(torch.tensor(own, dtype=torch.float64, device=here.device))
        tokens, image_tokens, answers, flops, sequences, replaced = sums.tolist()
        done: dict[str, Any] = {
            "seconds_per_step": seconds / max(1, self.steps),
            "tokens_per_second": tokens / seconds,
            "sequences_per_second": sequences / seconds,
            "image_token_share": image_tokens / max(1.0, tokens),
            "answer_tokens_per_second": answers / seconds,
            "flops_per_second": flops / seconds,
            "utilisation": flops / seconds / self.device_flops,
            "data_wait_share": self.waited / seconds,
            "replaced_examples": replaced,
        }
        if torch.cuda.is_available():
            done["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return done if self.load is None else done | expert_figures(here.sum(self.load).cpu())


def expert_figures(load: Tensor) -> dict[str, Any]:
    """How uneven the load of experts is: load int [layers, experts], tokens per expert."""
    share = load.double() / load.sum(1, keepdim=True).clamp(min=1)
    n = load.shape[1]
    return {
        "expert_load_max": float(share.max(1).values.mean() * n),  # 1: even
        "expert_load_min": float(share.min(1).values.mean() * n),
        "idle_experts": float((load == 0).sum()),
        "expert_loads": [[round(one, 3) for one in layer] for layer in (share * n).tolist()],  # 1: even
    }


class Log:
    """The log of a run, written by one rank. A resumed run appends to it."""

    def __init__(self, directory: Path, steps: int, *, tensorboard: bool = True):
        self.steps = steps
        directory.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (directory / LOG).open("a", encoding="utf-8")
        self._board = _summary_writer(directory) if tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write the figures of step `step`, counted from 1."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            if self._board is not None and isinstance(value, int | float):
                self._board.add_scalar(name, value, step)
        steps_log.info("%s", self._line(step, values))

    def note(self, step: int, text: str) -> None:
        """Write a message about an unusual event."""
        self._file.write(json.dumps({"step": step, "note": text}) + "\n")
        self._file.flush()
        steps_log.info("step %d/%d  %s", step, self.steps, text)

    def close(self) -> None:
        """Close the log file and TensorBoard's writer."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _line(self, step: int, v: dict[str, Any]) -> str:
        parts = [f"step {step}/{self.steps}"]
        if "validation_loss" in v:
            parts += [f"validation: loss {v['validation_loss']:.4f}", _share("accuracy", v["validation_accuracy"])]
            if "validation_heat_map_loss" in v:
                parts += [f"heat maps {v['validation_heat_map_loss']:.4f}"]
            if "validation_point_loss" in v:
                parts += [f"points {v['validation_point_loss']:.4f}"]
            if "validation_divergence" in v:
                parts += [f"divergence {v['validation_divergence']:.4f}"]
            return "  ".join(parts)
        parts += [f"loss {v['loss']:.4f}", f"z {v['z_loss']:.4f}", _share("accuracy", v["accuracy"])]
        if "heat_map_loss" in v:
            parts += [f"heat maps {v['heat_map_loss']:.4f}"]
        if "point_loss" in v:
            parts += [f"points {v['point_loss']:.4f}"]
        parts += [f"{shown} {v[name]:.4f}" for name, shown in _TAUGHT.items() if name in v]
        norms = [f"{v[k]:.2f}" for k in (f"norm_{part}" for part in PARTS) if k in v]
        rates = [f"{v[k]:.1e}" for k in (f"rate_{part}" for part in PARTS) if k in v]
        parts += [f"norm {'/'.join(norms)}", f"rate {'/'.join(rates)}"]
        parts += [f"{v['seconds_per_step']:.2f} s", f"{v['tokens_per_second']:,.0f} tokens/s"]
        parts += [_share("MFU", v["utilisation"])]
        if "expert_load_max" in v:
            parts += [f"experts {v['expert_load_min']:.2f}-{v['expert_load_max']:.2f}x idle {v['idle_experts']:.0f}"]
        if "peak_memory_gb" in v:
            parts += [f"{v['peak_memory_gb']:.1f} GB"]
        if v["replaced_examples"]:
            parts += [f"replaced {v['replaced_examples']:.0f}"]
        if v["data_wait_share"] > 0.02:
            parts += [_share("waiting for data", v["data_wait_share"])]
        return "  ".join(parts)


def _share(what: str, value: float) -> str:
    return f"{what} {100 * value:.1f} %"


def _summary_writer(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"))

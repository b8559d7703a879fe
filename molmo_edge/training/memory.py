"""How much memory a run takes on each GPU, by arithmetic: weights, gradients, optimizer states and the teacher.

Activations and the allocator's reserve come on top. Numbers follow from the shapes of a configuration alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from molmo_edge.checkpoints.tensor_names import hub_layout, hub_shapes
from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.weight_sizes import weight_bytes
from molmo_edge.training.optimizer import part_of

_STATE_BYTES = {"fp32": 8.0, "8bit": 2.0 + 2 * 4 / 256}  # of both moments, per trained value


@dataclass(frozen=True)
class RunMemory:
    """Bytes on one GPU."""

    weights: int  # of the student, float32, this GPU's share
    gradients: int
    states: int
    teacher: int  # its share; bfloat16 matrices on a single GPU, float32 shards on several
    gathered: int  # what is whole while it runs: two blocks, and the embeddings, connector and head of one model
    rounded: int  # copies of weights while they are rounded (`recipe.Qat`)

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.states + self.teacher + self.gathered + self.rounded


def run_memory(
    student: MolmoConfig,
    teacher: MolmoConfig | None = None,
    *,
    gpus: int = 1,
    states: str = "fp32",
    frozen: Sequence[str] = (),
    gather_bytes: int = 2,
    rounded: bool = False,
) -> RunMemory:
    """For a student trained with a teacher in memory; None: without one, or with its targets in a cache.

    states: "fp32" or "8bit". frozen: parts, as in `Recipe.frozen`. gather_bytes: of a gathered weight of a block, 2 in
    bfloat16. rounded: quantisation-aware training.
    """
    sizes = parameter_counts(student)
    every = sum(sizes.values())
    learned = sum(count for name, count in sizes.items() if _is_trained(name, student, frozen))
    gathered = 0
    if gpus > 1:
        models = [sizes] if teacher is None else [sizes, parameter_counts(teacher)]
        gathered = max(_gathered(each, gather_bytes) for each in models)  # the teacher is sharded again after its turn
    theirs = 0
    if teacher is not None:
        theirs = weight_bytes(teacher, "bf16", "cuda") if gpus == 1 else 4 * sum(parameter_counts(teacher).values())
    return RunMemory(
        weights=4 * every // gpus,
        gradients=4 * learned // gpus,
        states=int(_STATE_BYTES[states] * learned / gpus),
        teacher=theirs // gpus,
        gathered=gathered,
        rounded=4 * every // gpus if rounded else 0,
    )


def parameter_counts(config: MolmoConfig) -> dict[str, int]:
    """Values of each parameter of `modeling.Molmo`."""
    shapes = hub_shapes(config)
    return {name: len(slot) * math.prod(shapes[slot[0]]) for name, slot in hub_layout(config).items()}


def _is_trained(name: str, config: MolmoConfig, frozen: Sequence[str]) -> bool:
    """As `trainer.freeze`."""
    if part_of(name) in frozen or (name == "decoder.embedding" and not config.decoder.weight_tying):
        return False
    block = re.match(r"vision\.blocks\.(\d+)\.", name)
    return block is None or int(block[1]) <= config.vision.last_layer


def _gathered(sizes: dict[str, int], gather_bytes: int) -> int:
    blocks: dict[str, int] = {}
    rest = 0
    for name, count in sizes.items():
        block = re.match(r"(?:decoder|vision)\.blocks\.\d+\.", name)
        if block is None:
            rest += count
        else:
            blocks[block[0]] = blocks.get(block[0], 0) + count
    return 2 * gather_bytes * max(blocks.values()) + 4 * rest

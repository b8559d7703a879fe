"""Recipes: the settings of a run, and the presets of Molmo's stages.

Sources: launch_scripts/train_captioner.py and train_multitask_model.py of the reference; PAPER (arXiv 2409.17146),
table 6, where models differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from molmo_edge.config import ImageConfig, MolmoConfig
from molmo_edge.data.mixture import Group
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.training.distillation import DistillConfig
from molmo_edge.training.encoding import Encoding
from molmo_edge.training.fake_quantization import Qat
from molmo_edge.training.forward import ForwardConfig
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.sharding import Layout


class RecipeError(MolmoEdgeError):
    """An unknown stage or preset."""


@dataclass(frozen=True)
class ExpertSchedule:
    """From all experts of a layer to `top_k` of them: a dense FFN that was split into experts becomes sparse.

    All are active at first; then one fewer at a time, down to `top_k`; the steps that are left recover from it.
    """

    top_k: int
    dense_share: float = 0.5  # of the steps, with all experts active
    drop_share: float = 0.75  # of the steps after them, in which experts are dropped

    def at(self, step: int, steps: int, n_experts: int) -> int:
        """How many experts are active in step 0, 1, ..., `steps` - 1."""
        dense = self.dense_share * steps
        done = (step - dense) / max(1.0, self.drop_share * (steps - dense))
        return n_experts if done < 0 else max(self.top_k, n_experts - 1 - int(done * (n_experts - self.top_k)))


@dataclass(frozen=True)
class Recipe:
    """All settings of a run except its model, its data and the number of ranks."""

    steps: int
    batch: int  # sequences per step, over all ranks
    mixture: tuple[Group, ...]
    micro: int = 4  # sequences per forward pass on each rank
    precision: str = "auto"  # of matrix products: "bf16", "fp32"; "auto": bf16 on CUDA, else fp32
    frozen: tuple[str, ...] = ()  # of "connector", "vision", "decoder"; the input embedding is always frozen
    seed: int = 6198
    encoding: Encoding = field(default_factory=Encoding)
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    layout: Layout = field(default_factory=Layout)
    experts: ExpertSchedule | None = None  # None: the checkpoint's top_k in every step
    distill: DistillConfig | None = None  # the losses of a run with a teacher
    qat: Qat | None = None  # round weights in the forward pass, as a bundle will
    # Of training images; None: the checkpoint's own; "auto": 12 for a Molmo v1, the checkpoint's own for others.
    max_crops: int | Literal["auto"] | None = "auto"
    pad: bool = False  # pad to the full length, as the reference does, instead of the longest sequence of the batch
    save_every: int = 1000
    keep: int = 2  # latest checkpoints
    log_every: int = 20
    validate_every: int = 1000
    validation_batches: int = 16  # micro-batches per rank
    workers: int = 4  # processes per rank that prepare batches

    def image(self, config: MolmoConfig) -> ImageConfig:
        """The geometry of crops in training."""
        crops = self.max_crops
        if crops == "auto":
            crops = 12 if config.image.layout == "molmo" else None
        return config.image if crops is None else replace(config.image, max_crops=crops)


CAPTION_MIXTURE = (Group(1.0, {"pixmo_cap_with_transcripts": None}),)

_ACADEMIC: dict[str, int | None] = dict.fromkeys(
    (
        "coco_2014_vqa_multi", "text_vqa", "okvqa", "chart_qa_weighted", "doc_qa", "info_qa",
        "ai2_diagram_v2_mix_transparent", "a_okvqa_mc", "a_okvqa_da", "android_control", "science_qa_img", "tabwmp_da",
        "st_qa", "tally_qa", "pixmo_docs_charts", "pixmo_docs_tables", "pixmo_docs_other", "pixmo_docs_diagrams",
    )
)  # fmt: skip
# Table 7 of the paper has clocks at 5 %; the reference's script omits them as "huge".
_ACADEMIC |= {"pixmo_clocks": 250_000, "dv_qa": 10_000, "figure_qa": 10_000, "plot_qa": 20_000}
_POINTING = (
    "pixmo_points", "pixmo_count", "pixmo_points_high_freq", "pixmo_points_counting", "pixmo_points_high_freq_counting",
    "pixmo_count_counting",
)  # fmt: skip
MULTITASK_MIXTURE = (
    Group(
        0.15,
        {
            "pixmo_ask_model_anything": None,
            "pixmo_cap": 50_000,
            "pixmo_cap_qa": None,
            "pixmo_point_explanations": None,
        },
    ),
    Group(0.50, _ACADEMIC),
    Group(0.35, dict.fromkeys(_POINTING)),
)

CAPTION = Recipe(
    steps=22_300,  # 4 epochs of 712,000 images
    batch=128,
    mixture=CAPTION_MIXTURE,
    encoding=Encoding(style="caption", weighting="none", shuffle=False),
    forward=ForwardConfig(residual_dropout=0.0, answer_dropout=0.1),
    optimizer=OptimizerConfig(Rate(2e-4, 200), Rate(6e-6, 2000), Rate(2e-5, 2000)),
)
MULTITASK = Recipe(
    steps=30_000,
    batch=256,
    mixture=MULTITASK_MIXTURE,
    forward=ForwardConfig(residual_dropout=0.1, answer_dropout=0.0),
    optimizer=OptimizerConfig(Rate(5e-6, 200), Rate(5e-6, 200), Rate(1e-5, 200)),
)
# For a few hundred pictures with points, on one GPU. Adapters need ten times the learning rates of whole weights
# (QLoRA: 2e-4 up to 13B); the connector is trained as a whole.
POINTS = Recipe(
    steps=1000,
    batch=16,
    micro=2,
    mixture=(),
    forward=ForwardConfig(residual_dropout=0.0, answer_dropout=0.1),
    optimizer=OptimizerConfig(Rate(1e-5, 20), Rate(1e-4, 20), Rate(2e-4, 20), Rate(1e-4, 20)),
    save_every=250,
    log_every=10,
    validate_every=100,
)
_STAGES = {"caption": CAPTION, "multitask": MULTITASK, "points": POINTS}


def recipe_for(stage: str, preset: str = "molmoe-1b") -> Recipe:
    """The recipe of a stage ("caption", "multitask", "points") for a model of the paper. Raises RecipeError."""
    if stage not in _STAGES:
        raise RecipeError(f'"{stage}" is not a stage (known: {", ".join(_STAGES)})')
    recipe = _STAGES[stage]
    if stage == "caption" and preset == "molmo-72b":
        return replace(recipe, optimizer=replace(recipe.optimizer, decoder=Rate(1e-5, 2000)))
    if stage == "multitask":
        rates = {
            "molmoe-1b": (Rate(5e-6, 200), Rate(5e-6, 200), Rate(2e-5, 200)),
            "molmo-72b": (Rate(3e-6, 200), Rate(3e-6, 200), Rate(5e-6, 200)),
        }.get(preset)
        steps = {"molmo-72b": 20_000, "molmo-7b-o": 32_000}.get(preset, recipe.steps)
        recipe = replace(recipe, steps=steps)
        if rates:
            connector, vision, decoder = rates
            optimizer = replace(recipe.optimizer, connector=connector, vision=vision, decoder=decoder)
            recipe = replace(recipe, optimizer=optimizer)
    return recipe

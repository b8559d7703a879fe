"""`molmo-edge train points`: adapters for a checkpoint, from a folder of one's own pictures with points."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from molmo_edge.cli import train_options as options
from molmo_edge.cli.output import note, progress
from molmo_edge.sdk.readable_text import counted

_FOLDER = "Pictures with points.csv (image,label,x,y), COCO's annotations.json, LabelMe's files, or rows.jsonl."
_WHOLE = 'Parts trained whole: "connector", "vision", or none.'
_TARGETS = '"attention", "ffn", "experts", "connector", "vision": what gets adapters.'


class Base(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    nf4 = "nf4"


class MergeDtype(str, Enum):
    keep = "keep"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def points(
    folder: Annotated[Path, typer.Argument(help=_FOLDER, show_default=False)],
    *,
    start: options.Start,
    out: options.Out,
    base: Annotated[
        Base, typer.Option(help="The frozen weights: nf4 takes a third of bf16's memory (QLoRA).")
    ] = Base.auto,
    rank: Annotated[int, typer.Option(min=1, help="Of adapters.")] = 16,
    expert_rank: Annotated[int, typer.Option(min=1, help="Of each expert's adapters.")] = 4,
    targets: Annotated[str, typer.Option(help=_TARGETS)] = "attention,ffn,experts",
    whole: Annotated[str, typer.Option(help=_WHOLE)] = "connector",
    merge_dtype: Annotated[
        MergeDtype, typer.Option(help="Of the merged model's weights. keep: as the checkpoint stores each of them.")
    ] = MergeDtype.keep,
    complete: Annotated[
        bool, typer.Option("--complete", help="Every thing of a label has a point: so ask for what is not there, too.")
    ] = False,
    validation: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the pictures that is held back.")] = 0.1,
    annotations: Annotated[int, typer.Option(min=1, help="Most questions about a picture at a time.")] = 8,
    steps: options.Steps = None,
    batch: options.Batch = None,
    micro: options.Micro = None,
    sequence: options.Length = None,
    max_crops: options.Crops = None,
    rates: options.Rates = None,
    states: options.OptimizerStates = options.States.fp32,
    precision: options.Products = options.ProductsIn.auto,
    workers: options.Workers = None,
    save_every: options.SaveEvery = None,
    log_every: options.LogEvery = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
) -> None:
    """Teach a checkpoint your own points: adapters on one card (LoRA), merged into a model that can be exported."""
    from molmo_edge.data.points_folder import PointsError, open_points
    from molmo_edge.frontend.tokenizer import Tokenizer
    from molmo_edge.training.adapters import MERGED_IN, LoraTrainer
    from molmo_edge.training.lora import LoraConfig, build_adapted
    from molmo_edge.training.parallel import world
    from molmo_edge.training.recipe import recipe_for
    from molmo_edge.training.trainer import Data

    if out.resolve() == folder.resolve():
        raise options.TrainError(f"--out {out} is the folder of the pictures: name another directory for the run")
    lora = LoraConfig(rank, expert_rank, targets=options.names(targets), whole=options.names(whole))
    recipe = options.changed(
        recipe_for("points"),
        steps=steps,
        batch=batch,
        micro=micro,
        sequence=sequence,
        max_crops=max_crops,
        rates=rates,
        states=states.value,
        precision=precision.value,
        workers=workers,
        save_every=save_every,
        log_every=log_every,
        seed=seed,
    )
    left_out: list[str] = []
    try:
        with progress("reading the folder and decoding its pictures"):
            train, held_back = open_points(
                folder,
                validation=validation,
                seed=recipe.seed,
                complete=complete or None,
                max_annotations=annotations,
                note=left_out.append,
            )
    except PointsError:
        for each in left_out:  # what was skipped may be why nothing is left
            note(each)
        raise
    directory = options.starting_checkpoint(start, out)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    with world(device) as here:
        if here.first:
            for each in left_out:
                note(each)
            note(f"{counted(len(train), 'picture')} to train on, {len(held_back)} to validate with")
            note(f"{counted(recipe.steps, 'step')} of {counted(recipe.batch, 'sequence')}")
        model = build_adapted(directory, recipe, here, lora, base.value)
        data = Data([train], [1.0], [held_back] if len(held_back) else ())
        merged_in = MERGED_IN.get(merge_dtype.value)
        trainer = LoraTrainer(
            model, tokenizer, data, recipe, out, here, checkpoint=directory, lora=lora, merged_in=merged_in
        )
        if here.first and trainer.step >= recipe.steps:
            note(f"{trainer.step} steps are done: nothing is left to train")
        written = trainer.train()
        if here.first:
            note(f"the model is in {written}, its adapters alone beside it: ask it, or export it")

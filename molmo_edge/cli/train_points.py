"""`molmo-edge train points`: adapters for a checkpoint, trained on a folder of pictures with points."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from molmo_edge.cli import train_options as options
from molmo_edge.cli.output import note, progress
from molmo_edge.sdk.readable_text import counted

_FOLDER = "Pictures with points.csv (image,label,x,y), COCO's annotations.json, LabelMe's files, or rows.jsonl."
_TARGETS = 'Parts with adapters: "attention", "ffn", "experts", "connector", "vision".'


@dataclass(frozen=True)
class AdapterOptions:
    """Which weights are trained, and how."""

    base: Annotated[
        Literal["auto", "fp32", "bf16", "nf4"],
        typer.Option(help="Precision of the frozen weights; nf4 (QLoRA) takes a third of the memory of bf16."),
    ] = "auto"
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16
    expert_rank: Annotated[int, typer.Option(min=1, help="Rank of each expert's adapters.")] = 4
    targets: Annotated[str, typer.Option(help=_TARGETS)] = "attention,ffn,experts"
    whole: Annotated[
        str, typer.Option(help='Parts trained in full, without adapters: "connector", "vision", or "" for none.')
    ] = "connector"
    merge_dtype: Annotated[
        Literal["keep", "fp32", "bf16", "fp16"],
        typer.Option(help="Data type of the merged model; keep: that of each tensor of the checkpoint."),
    ] = "keep"


@dataclass(frozen=True)
class FolderOptions:
    """How the folder's points become questions."""

    complete: Annotated[
        bool, typer.Option("--complete", help="Annotations are exhaustive: train also on labels that a picture lacks.")
    ] = False
    validation: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the pictures held out for validation.")
    ] = 0.1
    annotations: Annotated[
        int, typer.Option(min=1, help="Maximum number of questions in one sequence with a picture.")
    ] = 8


def points(
    folder: Annotated[Path, typer.Argument(help=_FOLDER, show_default=False)],
    *,
    start: options.Start,
    out: options.Out,
    adapters: AdapterOptions,
    questions: FolderOptions,
    run: options.RunOptions,
    device: options.Device = "auto",
) -> None:
    """Train LoRA adapters for a checkpoint on your own points on one GPU, and merge them into a model for export."""
    from molmo_edge.data.points_folder import PointsError, open_points
    from molmo_edge.frontend.tokenizer import Tokenizer
    from molmo_edge.training.adapters import MERGED_IN, LoraTrainer
    from molmo_edge.training.lora import LoraConfig, build_adapted
    from molmo_edge.training.parallel import world
    from molmo_edge.training.recipe import recipe_for
    from molmo_edge.training.trainer import Data

    if out.resolve() == folder.resolve():
        raise options.TrainError(f"--out {out} is the folder of the pictures: choose another directory for the run")
    targets, whole = options.names(adapters.targets), options.names(adapters.whole)
    lora = LoraConfig(adapters.rank, adapters.expert_rank, targets=targets, whole=whole)
    recipe = run.changed(recipe_for("points"))
    left_out: list[str] = []
    try:
        with progress("reading the folder and decoding its pictures"):
            train, held_back = open_points(
                folder,
                validation=questions.validation,
                seed=recipe.seed,
                complete=questions.complete or None,
                max_annotations=questions.annotations,
                note=left_out.append,
            )
    except PointsError:
        for each in left_out:  # the skipped annotations may explain the error
            note(each)
        raise
    directory = options.starting_checkpoint(start, out)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    with world(device) as here:
        if here.first:
            for each in left_out:
                note(each)
            note(f"{counted(len(train), 'picture')} for training, {len(held_back)} for validation")
            note(f"{counted(recipe.steps, 'step')}; {counted(recipe.batch, 'sequence')} per step")
        model = build_adapted(directory, recipe, here, lora, adapters.base)
        data = Data([train], [1.0], [held_back] if len(held_back) else ())
        merged_in = MERGED_IN.get(adapters.merge_dtype)
        trainer = LoraTrainer(
            model, tokenizer, data, recipe, out, here, checkpoint=directory, lora=lora, merged_in=merged_in
        )
        if here.first and trainer.step >= recipe.steps:
            note(f"{counted(trainer.step, 'step')} done: the run is complete")
        written = trainer.train()
        if here.first:
            note(f"wrote the merged model to {written} and the adapters next to it")

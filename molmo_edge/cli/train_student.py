"""`molmo-edge train student`: a smaller checkpoint to distill into."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli import train_options as options
from molmo_edge.cli.output import note, progress
from molmo_edge.cli.train_sets import DataOptions
from molmo_edge.sdk.readable_text import counted

if TYPE_CHECKING:
    from molmo_edge.training.influence import Influence


def student(
    *,
    start: options.Start,
    out: Annotated[Path, typer.Option(help="Directory of the student's checkpoint.", show_default=False)],
    layers: Annotated[
        int | None, typer.Option(min=1, help="Decoder layers to keep, those with the most influence. Default: all.")
    ] = None,
    vit_layers: Annotated[
        int | None, typer.Option(min=1, help="ViT layers to keep, those with the most influence. Default: all.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=2, help="Split each dense FFN into this many experts, all of them active.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data sets on which the influence of layers is measured.")
    ] = None,
    sets: Annotated[
        str | None, typer.Option(help="Data sets, separated by commas. Default: those of the mixture in --data.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Number of pictures on which it is measured.")] = 64,
    device: options.Device = "auto",
) -> None:
    """Write a student of a checkpoint: with fewer layers, with experts, or both. Then train it with `distill`."""
    from molmo_edge.checkpoints.hub_config import read_config
    from molmo_edge.training.influence import most_influential
    from molmo_edge.training.student_checkpoint import student_config, write_student

    if layers is None and vit_layers is None and experts is None:
        raise typer.BadParameter("say what is smaller: --layers, --vit-layers or --experts")
    directory = options.starting_checkpoint(start, out)
    config = read_config(directory)
    student_config(config, n_experts=experts or 0)  # before anything is measured
    kept = kept_vit = None
    if layers is not None or vit_layers is not None:
        if data is None:
            raise typer.BadParameter("--layers and --vit-layers need --data: the influence of layers is measured on it")
        with progress("measuring the influence of the layers"):
            found = _measured(directory, data, sets, pictures, device)
        if layers is not None:
            kept = most_influential(found.decoder, layers)
            note(_table("decoder", found.decoder, kept))
        if vit_layers is not None:
            used = (layer % config.vision.n_layers for layer in config.vision.layers)
            kept_vit = most_influential(found.vision, vit_layers, used)
            note(_table("ViT", found.vision, kept_vit))
    written = write_student(directory, out, layers=kept, vit_layers=kept_vit, n_experts=experts or 0)
    d = written.decoder
    shape = counted(d.n_layers, "layer") + (f", {d.n_experts} experts of width {d.ffn_dim}" if d.n_experts else "")
    note(f"wrote the student to {out}: {shape}; {counted(written.vision.n_layers, 'ViT layer')}")


def _measured(directory: Path, data: Path, sets: str | None, pictures: int, device: str) -> Influence:
    from molmo_edge.checkpoints.hub_config import read_config
    from molmo_edge.checkpoints.weight_files import open_tensors
    from molmo_edge.data.mixture import Order
    from molmo_edge.frontend.tokenizer import Tokenizer
    from molmo_edge.training.encoding import Encoder
    from molmo_edge.training.influence import measure_influence
    from molmo_edge.training.loader import Samples, Share, open_loader, start
    from molmo_edge.training.parallel import world
    from molmo_edge.training.recipe import recipe_for
    from molmo_edge.training.trainer import build

    chosen = DataOptions(sets=sets)
    recipe = chosen.choose(dataclasses.replace(recipe_for("multitask"), batch=1, micro=1, workers=0))
    opened = chosen.open(recipe, data)
    config, tokenizer = read_config(directory), Tokenizer.from_file(directory / "tokenizer.json")
    with world(device) as here:
        model = build(config, open_tensors(directory), str(directory), recipe, here).eval()
        encoder = Encoder(tokenizer, recipe.image(config), recipe.encoding, None, config)
        order = Order([len(each) for each in opened.sets], opened.rates, recipe.seed)
        samples = Samples(opened.sets, encoder, recipe.seed)
        batches = start(open_loader(samples, order, Share(1, 1), step=0, steps=pictures))
        return measure_influence(model, (one.batch.to(here.device) for one in islice(batches, pictures)))


def _table(what: str, influence: tuple[float, ...], kept: tuple[int, ...]) -> str:
    marks = (f"{n}{'' if n in kept else ' (left out)'} {value:.3f}" for n, value in enumerate(influence))
    return f"influence of the {what}'s layers: " + ", ".join(marks)

"""The options of `molmo-edge train` and `distill` that choose data sets."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli import train_options as options
from molmo_edge.cli.output import note

if TYPE_CHECKING:
    from molmo_edge.training.recipe import Recipe
    from molmo_edge.training.trainer import Data


@dataclass(frozen=True)
class DataOptions:
    """The data sets of a run."""

    sets: Annotated[
        str | None, typer.Option(help="Data sets, separated by commas. Default: those of the mixture in --data.")
    ] = None
    validate: Annotated[
        str | None, typer.Option(help="Data sets whose validation split is measured during the run.")
    ] = None
    hub: Annotated[bool, typer.Option("--hub", help="Download sets that are not in --data from the hub.")] = False
    features: Annotated[
        Path | None,
        typer.Option(help="Folder in which vision features are cached; needs --freeze vision. Default: no cache."),
    ] = None

    def choose(self, recipe: Recipe) -> Recipe:
        """The recipe whose mixture is reduced to `sets`."""
        from molmo_edge.data.mixture import Group

        if self.sets is None:
            return recipe
        mine = options.names(self.sets)
        groups = [Group(group.rate, {n: s for n, s in group.sizes.items() if n in mine}) for group in recipe.mixture]
        rest = {name: None for name in mine if all(name not in group.sizes for group in groups)}
        return dataclasses.replace(recipe, mixture=(*groups, *([Group(1.0, rest)] if rest else [])))

    def open(self, recipe: Recipe, folder: Path) -> Data:
        """Open the sets of the recipe with their rates, and the validation sets. Raises TrainError or CatalogError."""
        from molmo_edge.data.catalog import open_sets
        from molmo_edge.data.mixture import mixture_rates
        from molmo_edge.training.trainer import Data

        opened = open_sets(self._names(recipe, folder), folder, hub=self.hub)
        shares = mixture_rates(recipe.mixture, {each.name: len(each) for each in opened})
        used = [each for each in opened if each.name in shares]
        validation = open_sets(options.names(self.validate or ""), folder, split="validation", hub=self.hub)
        return Data(used, [shares[each.name] for each in used], validation)

    def _names(self, recipe: Recipe, folder: Path) -> list[str]:
        from molmo_edge.data.catalog import at_hand, in_mixture

        names = in_mixture(recipe.mixture)
        if self.sets is not None or self.hub:
            return names
        here = at_hand(recipe.mixture, folder)
        if not here:
            raise options.TrainError(
                f"{folder} has none of the stage's data sets ({', '.join(names)}): copy or draw some there, each in a "
                "folder of its name, or download them with --hub"
            )
        if len(here) < len(names):
            others = int(os.environ.get("RANK", "0")) > 0  # of the same run
            missing = ", ".join(name for name in names if name not in here)
            note(f"data sets left out: {missing} ({folder} has no copies of them)", quiet=others)
        return here

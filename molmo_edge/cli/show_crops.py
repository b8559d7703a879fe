"""`molmo-edge show-crops`"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.output import OutputError, note, print_json
from molmo_edge.cli.saving import check_save, save_image

if TYPE_CHECKING:
    from molmo_edge.config import ImageConfig
    from molmo_edge.frontend.crop_map import CropMap

_MODEL = (
    'A published model ("molmoe-1b", "molmo2-8b", "molmopoint-8b", ...) or its hub id, both without a download; a '
    "bundle or a checkpoint directory. Default: the embedded nano model."
)
_SAVE = "Save a picture of the crops, the global view, and the cells with the numbers of their tokens."


def show_crops(
    image: options.Image,
    *,
    model: Annotated[str | None, typer.Option("--model", "-m", help=_MODEL, show_default=False)] = None,
    revision: options.Revision = None,
    max_crops: options.MaxCrops = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help=_SAVE, show_default=False)] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show into which crops and tokens a photo is divided. No model is loaded."""
    try:
        check_save(save, image)
    except OutputError as error:
        raise typer.BadParameter(str(error)) from None
    from PIL import Image

    from molmo_edge.cli.pictures import open_picture
    from molmo_edge.frontend.crop_map import crop_map
    from molmo_edge.frontend.image_files import load_image

    rgb = load_image(open_picture(image, {}))
    name, config = _image_config(model, revision, quiet=quiet)
    if max_crops is not None:
        config = dataclasses.replace(config, max_crops=max_crops)
    layout = crop_map(config, *rgb.shape[:2])
    lines = _describe(image, name, layout)
    if save is not None:
        from molmo_edge.sdk.crop_picture import draw_crops

        save_image(draw_crops(Image.fromarray(rgb), layout, "\n".join(lines)), save)
    if json:
        print_json(
            {"image": str(image), "model": name, **_to_dict(layout), "saved": None if save is None else str(save)}
        )
    else:
        print("\n".join(lines))
    if save is not None:
        note(f"wrote {save}", quiet=quiet)


def _image_config(model: str | None, revision: str | None, *, quiet: bool) -> tuple[str, ImageConfig]:
    """The name of a model and the geometry of its crops."""
    from molmo_edge.presets import PRESETS

    if revision is None and not Path(model or "nano").is_dir():
        published = {name: config.image for name, config in PRESETS.items()}
        published["molmopoint-8b"] = dataclasses.replace(published["molmo2-8b"], layout="molmo_point", max_crops=24)
        known = re.sub(r"^allenai/|-0924$", "", (model or "nano").lower())
        if known in published and known != "nano":  # of which the embedded bundle decides
            return known, published[known]
    from molmo_edge.checkpoints.bundle import is_bundle, open_bundle
    from molmo_edge.checkpoints.hub_config import read_config
    from molmo_edge.cli.open_model import find_model
    from molmo_edge.sdk.model_name import model_name

    directory = find_model(model, revision=revision, quiet=quiet, to_run=False)
    config = open_bundle(directory, hashes=False).config if is_bundle(directory) else read_config(directory)
    return model_name(directory), config.image


def _describe(image: Path, name: str, layout: CropMap) -> list[str]:
    config, (rows, cols) = layout.config, layout.tiling
    local = f" + {rows} x {cols} (rows x columns)" if rows else ""
    cells = len(layout.tokens)
    low = int(layout.is_global.sum())
    return [
        f"{image}: {layout.width} x {layout.height} pixels, as {name} sees it (layout {config.layout})",
        f"crops: {len(layout.crops)} = 1 global view{local}, of {config.crop_size} x {config.crop_size} pixels "
        f"and {config.patches} x {config.patches} patches; at most {config.max_crops} besides the global view",
        f"tokens: {layout.token_count} = {low} cells of the global view + {cells - low} of the crops "
        f"+ {layout.token_count - cells} markers (start, end, ends of rows); "
        f"a cell has up to {config.pool} x {config.pool} patches",
    ]


def _to_dict(layout: CropMap) -> dict[str, Any]:
    config, p = layout.config, layout.config.patches
    return {
        "width": layout.width,
        "height": layout.height,
        "layout": config.layout,
        "resize": config.resize,
        "crop_size": config.crop_size,
        "patch_size": config.patch_size,
        "patches": p,
        "pool": config.pool,
        "overlap_margins": list(config.overlap_margins),
        "max_crops": config.max_crops,
        "tiling": list(layout.tiling),
        "tokens": {
            "total": layout.token_count,
            "cells": len(layout.tokens),
            "markers": layout.token_count - len(layout.tokens),
        },
        "crops": [
            {"number": number, "global": number == 0, "box": _rounded(box)} for number, box in enumerate(layout.crops)
        ],
        "cells": [
            {
                "token": int(token),
                "global": bool(is_global),
                "row": int(row),
                "column": int(column),
                "crops": sorted({int(crop) for crop in crops if crop >= 0}),
                "box": _rounded(box),
            }
            for token, is_global, (row, column), crops, box in zip(
                layout.tokens, layout.is_global, layout.grid, layout.crops_of, layout.cells, strict=True
            )
        ],
    }


def _rounded(box: Any) -> list[float]:
    return [round(float(value), 1) for value in box]

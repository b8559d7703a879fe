"""Open a model: check the arguments of `Molmo`, find the files, start a runtime."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from molmo_edge.checkpoints.bundle import load_tokenizer, resolve_model
from molmo_edge.config import PRECISIONS, ConfigError, ImageConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.image_files import check_alpha
from molmo_edge.sdk.encoding import check_reuse_crops
from molmo_edge.sdk.engine import Engine
from molmo_edge.sdk.image_tokens import ImageTokens
from molmo_edge.sdk.image_tokens import image_tokens as chosen_tokens
from molmo_edge.sdk.model_name import model_name
from molmo_edge.sdk.scene_store import SceneStore, cache_size

if TYPE_CHECKING:
    from molmo_edge.runtimes import LlamaOptions


def open_engine(
    model: str | os.PathLike[str] | None,
    *,
    device: str,
    precision: str,
    revision: str | None,
    max_crops: int | None,
    threads: int | None,
    engine_options: LlamaOptions | None,
    alpha: str,
    scene_cache: str | os.PathLike[str] | None,
    scene_cache_size: int | str,
    image_tokens: float | ImageTokens | None,
    reuse_crops: bool,
    draft: bool | None,
) -> Engine:
    """Return the engine of a bundle, a checkpoint, a hub id or nano. For the arguments see `Molmo`.

    Raises MolmoEdgeError.
    """
    from molmo_edge.runtimes import open_runtime

    started = time.perf_counter()
    # Check the arguments before an engine opens, because it would continue to load after an error.
    if max_crops is not None:
        ImageConfig(max_crops=max_crops)
    check_alpha(alpha)
    choice = chosen_tokens(image_tokens)
    check_reuse_crops(reuse_crops)
    if precision not in PRECISIONS:
        raise ConfigError(f'"{precision}" is not a supported precision (supported: {", ".join(PRECISIONS)})')
    store = None if scene_cache is None else SceneStore(scene_cache, cache_size(scene_cache_size))
    directory = resolve_model(model, revision=revision)
    tokenizer = load_tokenizer(directory)
    runtime = open_runtime(
        directory,
        device=device,
        precision=precision,
        threads=threads,
        engine_options=engine_options,
        gaps=choice is not None,
        max_crops=max_crops,
        image_tokens=None if choice is None else choice.share,
    )
    try:
        return Engine(
            runtime,
            tokenizer,
            max_crops=max_crops,
            alpha=alpha,
            name=model_name(directory),
            directory=directory,
            store=store,
            draft=draft,
            started=started,
            tokens=choice,
            reuse_crops=reuse_crops,
        )
    except MolmoEdgeError:  # it cannot draft
        runtime.close()
        raise

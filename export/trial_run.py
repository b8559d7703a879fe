"""Run an exported model once: weights that do not fit their config.json, or hold NaN, show here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from molmo_edge.config import MolmoConfig
from molmo_edge.export.errors import ExportError, GraphError
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.runtimes import EngineError, open_files
from molmo_edge.runtimes.prompt_embeddings import prefill


def check_runs(config: MolmoConfig, files: dict[str, Path]) -> None:
    """Raise ExportError unless the model in `files` gives finite logits for a blank image and one token.

    Weights in sidecars and GGUFs stay in their files, so a bundle may be larger than this machine's memory.
    """
    runtime = open_files(config, files, mapped=True)
    try:
        i = config.image
        blank = ImageProcessor(dataclasses.replace(i, max_crops=0, layout="molmo"))(
            np.zeros((i.crop_size, i.crop_size, 3), np.uint8)
        )
        features = runtime.encode_image(blank.crops, np.ones_like(blank.masks), blank.overview, blank.pooling)
        rows = features.reshape(i.cells**2, -1) + runtime.embed(np.zeros(1, np.int64))
        logits = prefill(runtime, rows, np.ones(len(rows), bool), runtime.new_cache(len(rows)))
    except EngineError as error:
        raise GraphError(str(error)) from error
    finally:
        runtime.close()
    if not np.isfinite(logits).all():
        # llama.cpp rounds the inputs of 16-bit matrices to the same 16 bits.
        advice = ", or choose decoder=bf16 or f32" if files["decoder"].suffix == ".gguf" else " and the precisions"
        raise ExportError(f"the exported model outputs NaN or Inf: check the checkpoint{advice}")

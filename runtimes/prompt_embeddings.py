"""The decoder's input: the embeddings of a prompt's ids, with the image features added."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from molmo_edge.frontend.crops import PreparedImage
    from molmo_edge.frontend.prompts import Prompt
    from molmo_edge.runtimes.protocol import Cache, ImageBlockRuntime, Runtime


def image_embeddings(runtime: Runtime, image: PreparedImage, prompt: Prompt) -> np.ndarray:
    """Return the embeddings of BOS and the image tokens, float32 [n, d_model].

    `prompt`: of `image` (molmo_edge.frontend.prompts.image_ids).
    """
    return with_features(runtime, prompt, runtime.encode_image(image.crops, image.masks, image.overview, image.pooling))


def with_features(runtime: Runtime, prompt: Prompt, features: np.ndarray) -> np.ndarray:
    """Like `image_embeddings`, from image features [n_crops, cells^2, d_model]."""
    embeddings = np.array(runtime.embed(prompt.ids), dtype=np.float32)  # [n, d_model]
    add_features(embeddings, prompt.token_index, features)
    return embeddings


def add_features(embeddings: np.ndarray, positions: np.ndarray, features: np.ndarray) -> None:
    """Add image features to `embeddings`, float32 [n, d_model], at `positions`; negative ones are left out."""
    kept = positions >= 0  # [n_crops, cells^2], or [n_cells]
    # Added to the embedding of <im_patch> rather than replacing it: released weights were trained this way.
    embeddings[positions[kept]] += features[kept]


def prefill(runtime: Runtime, embeddings: np.ndarray, image: np.ndarray, cache: Cache) -> np.ndarray:
    """Append a prompt to `cache`, embeddings [n, d_model] -> logits [embedding_size] of its last position.

    image: bool [n], True for image tokens. They attend to each other where the decoder says so, see ImageBlockRuntime.
    """
    if runtime.config.decoder.bidirectional_images:
        return cast("ImageBlockRuntime", runtime).prefill_image(embeddings, image, cache)
    return runtime.forward(embeddings, cache)

"""Checkpoints of Molmo's anatomy at a hundredth of its size, and a batch and a recipe to train them with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, save_checkpoint
from molmo_edge.training.encoding import Batch, Encoder, Encoding, collate
from molmo_edge.training.forward import ForwardConfig, Trainable
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.sharding import Layout

PLAIN = ForwardConfig(answer_dropout=0.0)
GOLDEN = Path(__file__).parent / "golden"
_DECODER = DecoderConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=48,
    vocab_size=500,
    embedding_size=512,
    additional_vocab_size=16,
)
DECODERS = {
    "experts": dataclasses.replace(_DECODER, ffn_dim=16, n_experts=8, top_k=2, qk_norm=True),
    "dense": dataclasses.replace(_DECODER, qkv_bias=True),
}


def write_checkpoint(directory: Path, kind: str, seed: int = 0, dtype: str = "F32") -> Path:
    """Molmo's anatomy, a hundredth of a second a step. The last of its three ViT blocks is for nothing."""
    config = MolmoConfig(
        ImageConfig(crop_size=56, overlap_margins=(0, 0), max_crops=2),
        VisionConfig("openai", 32, 3, 4, 64, n_pos=17, layers=(-2, -3)),
        DECODERS[kind],
        projector_dim=32,
    )
    model = Molmo(config).init_weights(std=0.15, generator=torch.Generator().manual_seed(seed))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", directory, dtype=dtype)
    return directory


def spelled(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokens without most merges, and with other ids."""
    definition = json.loads(tokenizer.definition)
    definition["model"]["merges"] = definition["model"]["merges"][:40]
    vocabulary = definition["model"]["vocab"]
    special = {entry["content"] for entry in definition["added_tokens"]}
    plain = sorted((token for token in vocabulary if token not in special), key=lambda token: token[::-1])
    ids = sorted(vocabulary[token] for token in plain)
    definition["model"]["vocab"] = vocabulary | dict(zip(plain, ids, strict=True))
    return Tokenizer(json.dumps(definition))


def a_batch(checkpoint: Path) -> Batch:
    encode = Encoder(Tokenizer.from_file(checkpoint / "tokenizer.json"), read_config(checkpoint).image, Encoding())
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    asked = (Annotation("demo", ("Why?", "Because it is red.")), Annotation("demo", ("How many?", "Seven of them.")))
    return collate([encode(Example(picture, asked), rng)])


def hidden(molmo: Molmo, batch: Batch) -> Tensor:
    """[n, d_model] behind everything that has an adapter."""
    with torch.no_grad():
        model = Trainable(molmo, PLAIN).eval()
        features = model.features(batch)
        cells = molmo.connector(features, batch.masks).flatten(0, 1)[batch.cells]
        return molmo.decoder.ln_f(model.states(batch, cells, features))[0, : batch.lengths[0]]


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def a_recipe(**changes: object) -> Recipe:
    recipe = Recipe(
        steps=8,
        batch=4,
        micro=2,
        mixture=(),
        precision="fp32",
        encoding=Encoding(sequence=1024),
        forward=ForwardConfig(answer_dropout=0.1),
        optimizer=OptimizerConfig(Rate(3e-3, 2), Rate(1e-3, 2), Rate(2e-2, 2)),
        layout=Layout(),
        max_crops=1,
        save_every=4,
        log_every=1,
        workers=0,
    )
    return dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]

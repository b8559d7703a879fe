"""The checkpoint that nano starts from: a ViT, a detector's tower, a language model's layers, a scaled connector.

`recipes.nano.parts` reads the ViT and the language model, `recipes.nano.detector` the detector.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from molmo_edge.config import MolmoConfig
from molmo_edge.data.annotated_photos import Photo
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.modeling import Molmo
from molmo_edge.modeling.weights import save_checkpoint
from molmo_edge.presets import PRESETS
from molmo_edge.system.files import replaced_directory
from molmo_edge.training.features import encode_pictures
from recipes.nano.detector import tower_state
from recipes.nano.parts import fit_qk_norms, load_decoder, load_vit, make_tokenizer, read_gguf

_NANO = PRESETS["nano"]
# Without the ViT's last two blocks: they take a sixth of its time, and the convolutional tower takes less. The stage
# "answers" adds the grounding head.
CONFIG: MolmoConfig = replace(_NANO, decoder=replace(_NANO.decoder, additional_head=False), point_head=None)


SAMPLE = (
    "The dog lies on a couch beside two cups. A man in a red shirt rides a bicycle down the street, and a bus waits "
    "at the traffic light. There are three apples, a knife and a bowl of soup on the wooden table near the window."
)


@torch.no_grad()
def make_start(vit: Path, lm: Path, detector: Path, photos: list[Photo], out: Path, seed: int = 0) -> None:
    """Write the starting checkpoint to `out`, in hub layout, with all experts active (top_k = n_experts).

    The features of `photos` set the scale of the connector's random weights.
    """
    from tokenizers import Tokenizer as Bpe

    torch.manual_seed(seed)
    decoder = replace(CONFIG.decoder, top_k=CONFIG.decoder.n_experts)
    model = Molmo(replace(CONFIG, decoder=decoder)).init_weights()
    load_vit(model, vit)
    get, tokens, merges = read_gguf(lm)
    definition, rows = make_tokenizer(tokens, merges, decoder.vocab_size)
    load_decoder(model, get, rows)
    text = json.dumps(definition, ensure_ascii=False) + "\n"
    fit_qk_norms(model, torch.tensor([Bpe.from_str(text).encode(SAMPLE).ids]))
    assert model.conv_tower is not None
    model.conv_tower.load_state_dict(tower_state(detector, model.conv_tower.config))
    scale_connector(model, [photo.rgb() for photo in photos], torch.Generator().manual_seed(seed))
    with replaced_directory(out) as part:
        (part / "tokenizer.json").write_text(text, encoding="utf-8")
        save_checkpoint(model, part / "tokenizer.json", part)


@torch.no_grad()
def scale_connector(model: Molmo, pictures: list[np.ndarray], generator: torch.Generator) -> None:
    """Initialise the connector for standardised features, with outputs as large as token embeddings.

    A few channels of DINOv2's block outputs are hundreds of times larger than the others. Without scaling they would
    dominate the connector for thousands of steps.
    """
    processor = ImageProcessor(replace(model.config.image, max_crops=0))
    prepared = [processor(picture) for picture in pictures]
    cpu = torch.device("cpu")
    features = torch.cat([encode_pictures(model, [one], cpu) for one in prepared])
    flat = features.flatten(0, 1)
    mean, std = flat.mean(0), flat.std(0).clamp(min=1e-3)
    pooling, projector = model.connector.pooling, model.connector.projector
    for linear in (pooling.wq, pooling.wk, pooling.wv):
        weight = torch.randn(linear.weight.shape, generator=generator) / len(mean) ** 0.5 / std
        linear.weight.copy_(weight)
        linear.bias.copy_(-(weight @ mean))
    for linear in (pooling.wo, projector.w1, projector.w3, projector.w2):
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / linear.weight.shape[1] ** 0.5)
    cells = model.connector(features, torch.ones(features.shape[:2]))
    projector.w2.weight.mul_(model.decoder.embedding.std() / cells.std())

"""An optional stage: votes in the grounding head, from the detector, whose classes are linear in its pyramid.

The connector pools patches and mixes the levels of the pyramid, in which an object is visible at one level only. A vote
for each level keeps them apart. The queries are fitted to the states of the decoder that choose a patch, by least
squares, so that the votes find the detector's names without training. The rest of the grounding head is trained with
them; they and everything else stay, because the fit is one to the states of this decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from molmo_edge.config import MolmoConfig
from molmo_edge.data.annotated_photos import Photo
from molmo_edge.data.annotation_prompts import counting, pointing
from molmo_edge.data.english import plural
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.frontend.points import Point
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.training.encoding import Encoder, Encoding, collate
from molmo_edge.training.forward import ForwardConfig, Trainable
from molmo_edge.training.optimizer import Rate
from recipes.nano import answers
from recipes.nano.detector import COCO_NAMES

LEVELS = 3  # of the pyramid, one vote each
DIM = 96  # of a vote: the rank of the detector's classes, a constant, and room to learn
PICTURES, ASKED = 160, 24  # that the queries are fitted to, and names that each is asked for
RIDGE = 1e-2  # of the variance of the states
TRAINED = ("patch_q", "patch_k", "no_more", "subpatch_q", "subpatch_k", "location")  # of the grounding head
RECIPE = replace(
    answers.RECIPE,
    steps=300,
    frozen=("vision", "connector", "decoder"),
    optimizer=replace(answers.RECIPE.optimizer, point_head=Rate(5e-4, 15)),
)


def with_votes(config: MolmoConfig) -> MolmoConfig:
    """The configuration with votes and sequential choices of patches."""
    assert config.point_head is not None
    return replace(config, point_head=replace(config.point_head, votes=LEVELS, vote_dim=DIM, sequential=True))


@torch.no_grad()
def add_votes(
    before: Path, classes: Sequence[tuple[Tensor, Tensor]], photos: Sequence[Photo], out: Path, seed: int = 0
) -> None:
    """Write the checkpoint `before`, which has a grounding head, with votes to `out`.

    classes: the detector's, see `detector.score_layers`. The queries are fitted on some of the photos.
    """
    old, _, config = load_checkpoint(before)
    config, tokenizer = with_votes(config), Tokenizer.from_file(before / "tokenizer.json")
    model = Molmo(config).init_weights(generator=torch.Generator().manual_seed(seed))
    left = model.load_state_dict(old.state_dict(), strict=False)
    assert not left.unexpected_keys
    some = photos[:: max(1, len(photos) // PICTURES)]
    states, names = choosing_states(model, tokenizer, (photo.rgb() for photo in some), seed)
    keys, bias, queries = detector_votes(config, classes, seed)
    head = model.point_head
    assert head is not None
    _set(head.vote_k, keys, bias)
    _set(head.vote_q, *fitted(head.x_norm(states), queries[names]))
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, before / "tokenizer.json", out)


def detector_votes(
    config: MolmoConfig, classes: Sequence[tuple[Tensor, Tensor]], seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of the keys, and the queries of COCO_NAMES [80, votes * dim].

    classes: weight [80, pyramid_dim] and bias [80] of the detector's classes at each level, finest first. The finest
    level has four samples in a patch, whose mean is used.
    """
    tower = config.conv_tower
    assert tower is not None
    width, generator = tower.pyramid_dim, torch.Generator().manual_seed(seed)
    weight = torch.zeros(LEVELS, DIM, config.feature_dim)
    bias, queries = torch.zeros(LEVELS, DIM), torch.zeros(len(COCO_NAMES), LEVELS, DIM)
    samples = torch.eye(6)
    shares = (samples[:4].mean(0), samples[4], samples[5])
    for level, ((matrix, offsets), share) in enumerate(zip(classes, shares, strict=True)):
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)  # [80, r], [r], [r, pyramid_dim]
        rank, root = len(sizes), sizes.sqrt()
        weight[level, :rank, -6 * width :] = torch.einsum("rw,s->rsw", root[:, None] * right, share).flatten(1)
        queries[:, level, :rank] = left * root
        bias[level, rank] = 1.0  # a key that is always 1: its query is the offset
        queries[:, level, rank] = offsets
        free = weight[level, rank + 1 :, : -6 * width]  # keys of the ViT's features, with queries of 0
        free.copy_(torch.randn(free.shape, generator=generator) * 0.5 / free.shape[1] ** 0.5)
    return weight.flatten(0, 1), bias.flatten(), queries.flatten(1)


def choosing_states(
    model: Molmo, tokenizer: Tokenizer, pictures: Iterable[np.ndarray], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """States before the final norm that choose a patch [n, d_model], and the number of the name they look for [n].

    pictures: uint8 [h, w, 3]. Each is asked for some of COCO_NAMES, whether they are in it or not.
    """
    rng = np.random.default_rng(seed)
    encoder = Encoder(tokenizer, model.config.image, Encoding(sequence=2048, shuffle=False), config=model.config)
    trainable = Trainable(model, ForwardConfig(answer_dropout=0.0, recompute=False)).eval()
    states, names = [], []
    for rgb in pictures:
        asked = rng.permutation(len(COCO_NAMES))[:ASKED]
        sample = encoder(Example(rgb, tuple(_question(COCO_NAMES[int(n)], rng) for n in asked)), rng)
        assert sample.points is not None
        chosen = sample.points.patch_targets[:, 0]
        states.append(trainable.run(collate([sample])).states[torch.from_numpy(chosen)].float())
        names.append(asked[sample.packed.segments[chosen] - 1])
    return torch.cat(states), torch.from_numpy(np.concatenate(names))


def _question(name: str, rng: np.random.Generator) -> Annotation:
    """A question about a name, and an answer with points at random."""
    points = tuple(Point(*map(float, at)) for at in np.round(rng.uniform(0, 100, (int(rng.integers(1, 3)), 2)), 1))
    ask = pointing if rng.random() < 0.5 else counting
    return Annotation("demo", ask(plural(name), points, rng).messages)


def fitted(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear map from inputs [n, d] to outputs [n, m] with the least squared error."""
    x, y = inputs.double(), outputs.double()
    mean, centre = x.mean(0), y.mean(0)
    x, y = x - mean, y - centre
    penalty = RIDGE * x.square().mean() * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ y).T
    left = (y - x @ weight.T).square().sum() / y.square().sum()
    print(f"queries of votes: {len(x)} states, {1 - float(left):.3f} of the variance explained")
    return weight.float(), (centre - weight @ mean).float()


def _set(linear: torch.nn.Module, weight: Tensor, bias: Tensor) -> None:
    linear.load_state_dict({"weight": weight, "bias": bias})

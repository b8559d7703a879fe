"""The votes of nano's grounding head, as they are before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from molmo_edge.config import ConvTowerConfig, DecoderConfig, ImageConfig, MolmoConfig, PointHeadConfig, VisionConfig
from molmo_edge.data.annotated_photos import Photo
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from recipes.nano.detector import COCO_NAMES
from recipes.nano.votes import DIM, LEVELS, add_votes, choosing_states, detector_votes, fitted, with_votes

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = Path(__file__).parent / "golden" / "molmoe" / "tokenizer.json"
WIDTH = 8  # of the pyramid
CONFIG = MolmoConfig(
    ImageConfig(crop_size=56, overlap_margins=(0, 0), max_crops=1, resize="dino", overview=64),
    VisionConfig("dino", 32, 2, 4, 64, n_pos=17, layers=(-1, -2)),
    DecoderConfig(
        d_model=32,
        n_layers=1,
        n_heads=4,
        n_kv_heads=4,
        ffn_dim=16,
        vocab_size=500,
        embedding_size=512,
        additional_vocab_size=16,
        additional_head=True,
    ),
    projector_dim=32,
    conv_tower=ConvTowerConfig(stem_dim=4, steps=(1, 1, 1, 1), pyramid_dim=WIDTH),
    point_head=PointHeadConfig(517, 518, 519, dim=16, numbered=False),
)


def classes() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The weights and offsets of a detector."""
    generator = torch.Generator().manual_seed(0)
    shape = len(COCO_NAMES), WIDTH
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)) for _ in range(LEVELS)
    ]


def test_votes_begin_as_the_logits_of_the_detector() -> None:
    layers = classes()
    weight, bias, queries = detector_votes(CONFIG, layers)
    features = torch.randn(5, CONFIG.feature_dim, generator=torch.Generator().manual_seed(1))
    samples = torch.unflatten(features[:, -6 * WIDTH :], -1, (6, WIDTH))
    keys = (features @ weight.T + bias).unflatten(-1, (LEVELS, DIM))
    votes = torch.einsum("nvd,fvd->nfv", queries.unflatten(-1, (LEVELS, DIM)), keys)
    for level, ((matrix, offsets), level_samples) in enumerate(
        zip(layers, (samples[:, :4].mean(1), samples[:, 4], samples[:, 5]), strict=True)
    ):
        torch.testing.assert_close(votes[:, :, level].T, level_samples @ matrix.T + offsets, rtol=1e-4, atol=1e-4)


def test_the_fit_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) + 3
    weight, bias = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    found = fitted(x, x @ weight.T + bias)
    torch.testing.assert_close(found[0], weight, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found[1], bias, rtol=0.02, atol=0.1)


def test_a_checkpoint_keeps_its_weights_and_gains_votes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(30)]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    before = Molmo(CONFIG).init_weights(std=0.1, generator=torch.Generator().manual_seed(0))
    save_checkpoint(before, TOKENIZER, tmp_path / "before")
    photos = [Photo(tmp_path / f"{number}.png", {}) for number in range(len(pictures))]
    add_votes(tmp_path / "before", classes(), photos, tmp_path / "after")
    after, _, config = load_checkpoint(tmp_path / "after")
    assert config == with_votes(CONFIG)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)), name
    with torch.no_grad():
        states, names = choosing_states(after, Tokenizer.from_file(TOKENIZER), pictures)
        assert after.point_head is not None
        weight, bias = fitted(after.point_head.x_norm(states), detector_votes(CONFIG, classes())[2][names])
    assert set(names.tolist()) == set(range(len(COCO_NAMES)))
    torch.testing.assert_close(after.point_head.vote_q.weight, weight)
    torch.testing.assert_close(after.point_head.vote_q.bias, bias)

"""The two auxiliary losses, and where a cell stands in the picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from molmo_edge.config import PRESETS
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.frontend.tokenizer import MOLMOE_SPECIAL_IDS
from molmo_edge.training.grounding import NamedRegions, cell_centres, cells_in_box, looking_loss, naming_loss

IMAGE = PRESETS["nano"].image


def test_cell_centres_find_a_bright_square() -> None:
    """The cells that a box selects are the ones whose pixels changed when the box was painted."""
    processor = ImageProcessor(IMAGE, MOLMOE_SPECIAL_IDS)
    rgb = np.zeros((480, 640, 3), np.uint8)
    dark = processor(rgb)
    box = np.array([50.0, 25.0, 75.0, 50.0])  # percent
    rgb[120:240, 320:480] = 255
    bright = processor(rgb)
    changed = np.zeros(len(bright.tokens), bool)
    difference = np.abs(bright.crops - dark.crops).mean(-1)  # [n_crops, patches^2]
    side = IMAGE.patches
    cells = difference.reshape(-1, side // 2, 2, side // 2, 2).mean((2, 4)).reshape(len(difference), -1)
    kept = bright.token_index >= 0
    changed[bright.token_index[kept]] = cells[kept] > 0.5 * cells.max()
    at, xy = cell_centres(IMAGE, bright.tokens, MOLMOE_SPECIAL_IDS.im_patch, bright.tiling)
    chosen = np.zeros(len(bright.tokens), bool)
    chosen[at[cells_in_box(xy, box)]] = True
    assert (chosen == changed).mean() > 0.97
    assert (chosen & changed).sum() >= 0.8 * changed.sum()


def test_a_tiny_box_still_has_a_cell() -> None:
    xy = np.array([[10.0, 10.0], [90.0, 90.0]], np.float32)
    assert cells_in_box(xy, np.array([84.0, 84.0, 85.0, 85.0])).tolist() == [False, True]


def test_looking_loss_equals_the_attention_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(2))
    queries = torch.tensor([[0, 3], [1, 5], [1, 2]])
    visible = torch.arange(6)[None] <= queries[:, 1:]
    wanted = torch.zeros(3, 6, dtype=torch.bool)
    wanted[0, 1] = wanted[1, 0] = wanted[1, 4] = wanted[2, 2] = True
    losses = []
    for i, (row, at) in enumerate(queries.tolist()):
        for head in range(2):
            attention = torch.softmax(q[row, head, at] @ k[row, head, : at + 1].T / math.sqrt(8), 0)
            losses.append(-attention[wanted[i, : at + 1]].sum().log())
    ours = looking_loss(q, k, queries, visible, wanted, heads=2)
    assert ours.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_naming_loss_falls_as_cells_turn_to_their_names() -> None:
    table = torch.nn.functional.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    regions = NamedRegions(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([2, 4]))
    right = table[[2, 2, 4]] * 3
    wrong = table[[1, 1, 0]]
    assert naming_loss(right, regions, table) < 0.1 < naming_loss(wrong, regions, table)

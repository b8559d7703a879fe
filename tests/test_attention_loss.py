"""The attention loss: its formula, which tokens it supervises, and which cells they should attend to."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from molmo_edge.config import ImageConfig
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.frontend.crops import ImageProcessor, patch_grid
from molmo_edge.frontend.points import Point, format_points
from molmo_edge.frontend.tokenizer import MOLMOE_SPECIAL_IDS
from molmo_edge.modeling import load_checkpoint
from molmo_edge.presets import PRESETS
from molmo_edge.training.attention_loss import AttentionLoss, attention_loss, cells_in_box
from molmo_edge.training.encoding import Encoder, Encoding, collate
from molmo_edge.training.forward import ForwardConfig, ForwardError, Trainable
from molmo_edge.training.regions import cell_grid

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("image", [PRESETS["nano"].image, ImageConfig(max_crops=4)], ids=["dino", "default"])
def test_cells_of_a_box_are_those_whose_pixels_changed_when_it_was_painted(image: ImageConfig) -> None:
    processor = ImageProcessor(image, MOLMOE_SPECIAL_IDS)
    rgb = np.zeros((480, 640, 3), np.uint8)
    dark = processor(rgb)
    box = np.array([50.0, 25.0, 75.0, 50.0])  # percent
    rgb[120:240, 320:480] = 255
    bright = processor(rgb)
    difference = np.abs(bright.crops - dark.crops).mean(-1)  # [n_crops, patches^2]
    side = image.patches
    cells = difference.reshape(-1, side // 2, 2, side // 2, 2).mean((2, 4)).reshape(len(difference), -1)
    kept = bright.token_index >= 0
    changed = cells[kept] > 0.5 * cells.max()
    centres = cell_grid(image, 100 * patch_grid(image, bright.tiling, 480, 640)[0])
    chosen = cells_in_box(centres[kept], np.nonzero(kept)[0] > 0, box)
    assert (chosen == changed).mean() > 0.97
    assert (chosen & changed).sum() >= 0.8 * changed.sum()


def test_a_tiny_box_has_the_nearest_cell_of_each_view() -> None:
    xy = np.array([[10.0, 10.0], [90.0, 90.0], [80.0, 80.0], [20.0, 20.0]], np.float32)
    detail = np.array([False, False, True, True])
    assert cells_in_box(xy, detail, np.array([84.0, 84.0, 85.0, 85.0])).tolist() == [False, True, True, False]


def test_the_loss_equals_the_attention_by_hand() -> None:
    """With two query heads per key head, and a query that does not see the annotation before its own."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2))
    segments = torch.tensor([[9, 9, 1, 1, 2, 2], [9, 9, 9, 1, 1, 1]])
    queries = torch.tensor([[0, 5], [1, 5], [1, 2]])
    attended = torch.zeros(3, 6, dtype=torch.bool)
    attended[0, 1] = attended[1, 0] = attended[1, 2] = attended[2, 2] = True
    losses = []
    for i, (row, at) in enumerate(queries.tolist()):
        seen = [j for j in range(at + 1) if segments[row, at] <= segments[row, j]]
        for head in range(3):
            attention = torch.softmax(q[row, head, at] @ k[row, head // 2, seen].T / math.sqrt(8), 0)
            losses.append(-attention[attended[i, seen]].sum().log())
    ours = attention_loss(q, k, segments, queries, attended, heads=3)
    assert ours.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def example() -> Example:
    boxes = ((10.0, 20.0, 30.0, 40.0), (60.0, 60.0, 90.0, 80.0))
    points = [Point(20.0, 30.0), Point(75.0, 70.0)]
    asked = (
        Annotation("demo", ("Why?", "Because 1 x2 is 3.")),
        Annotation("demo", ("Point to the cups.", format_points(points, "cups")), boxes=boxes),
        Annotation("demo", ("Point to the first cup.", format_points(points[:1], "cup")), boxes=boxes[:1]),
    )
    return Example(np.random.default_rng(0).integers(0, 256, (120, 150, 3), dtype=np.uint8), asked)


@pytest.mark.parametrize("family", ["molmoe", "qwen", "olmo"])
def test_the_supervised_tokens_precede_each_x(family: str) -> None:
    _, tokenizer, config = load_checkpoint(GOLDEN / family)
    sample = Encoder(tokenizer, config.image, Encoding())(example(), np.random.default_rng(0))
    assert sample.attended is not None
    assert len(sample.attended.queries) == 3
    ids = sample.packed.input_ids
    for at, cells in zip(sample.attended.queries, sample.attended.cells, strict=True):
        text = tokenizer.decode(ids[: at + 1].tolist())
        assert text.endswith('="'), text[-20:]
        assert text[-5:-2].strip(" x0123456789t") == "", text[-20:]
        assert tokenizer.decode([int(ids[at + 1])])[0].isdigit()
        assert (ids[cells] == tokenizer.special.im_patch).all()
        assert len(cells)


def test_a_cut_sequence_supervises_what_is_left() -> None:
    _, tokenizer, config = load_checkpoint(GOLDEN / "molmoe")
    whole = Encoder(tokenizer, config.image, Encoding(shuffle=False))(example(), np.random.default_rng(0))
    assert whole.attended is not None
    last = whole.attended.queries[-1]
    encoding = Encoding(shuffle=False, sequence=last)
    cut = Encoder(tokenizer, config.image, encoding)(example(), np.random.default_rng(0))
    assert cut.attended is not None
    assert cut.attended.queries == whole.attended.queries[:-1]
    assert all((cells < last).all() for cells in cut.attended.cells)


@pytest.mark.parametrize("family", ["molmoe", "qwen"])
def test_the_loss_falls_and_recomputed_activations_give_the_same_gradients(family: str) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for recompute in (False, True):
        molmo, tokenizer, config = load_checkpoint(GOLDEN / family)
        batch = collate([Encoder(tokenizer, config.image, Encoding())(example(), np.random.default_rng(0))] * 2)
        supervised = AttentionLoss(weight=2.0, layer=1, heads=2)
        forward = ForwardConfig(answer_dropout=0.0, recompute=recompute, attention_loss=supervised)
        model = Trainable(molmo, forward).train()
        sums = model(batch)
        (sums.cross_entropy + sums.attention_loss).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-5, atol=1e-7, msg=name)
    first = sums.attention_loss.item()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(15):  # of the model that recomputes: the other's gradients are equal
        optimizer.zero_grad()
        loss = model(batch).attention_loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first


def test_a_batch_without_boxes_has_no_attention_loss() -> None:
    molmo, tokenizer, config = load_checkpoint(GOLDEN / "molmoe")
    plain = Example(example().image, example().annotations[:1])
    batch = collate([Encoder(tokenizer, config.image, Encoding())(plain, np.random.default_rng(0))])
    assert batch.queries is None
    model = Trainable(molmo, ForwardConfig(attention_loss=AttentionLoss(1.0, 0, 1)))
    with torch.no_grad():
        assert float(model(batch).attention_loss) == 0
    with pytest.raises(ForwardError, match="no layer 7"):
        Trainable(molmo, ForwardConfig(attention_loss=AttentionLoss(1.0, 7, 1)))

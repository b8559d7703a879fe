"""Trained scales of four-bit weights: closer to float32 on prompts that they have not seen, and the same every time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import GOLDEN, bundle
from small_checkpoints import write_checkpoint

from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.tensor_names import hub_layout
from molmo_edge.export import ExportError, export_bundle, load_bundle_weights
from molmo_edge.export.source import open_source
from molmo_edge.modeling import Molmo, load_checkpoint
from molmo_edge.modeling.decoder import Decoder
from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.calibration_prompts import DecoderInput, find_prompts
from molmo_edge.quantize.rounding import Blocks, nearest
from molmo_edge.quantize.scale_training import memory_needed, train_scales
from molmo_edge.system.memory import RoomError

MATRICES = ("att_proj.weight", "attn_out.weight", "ff_proj.weight", "ff_out.weight", "_proj.weight")


def prompts(count: int, seed: int, width: int, answer: int = 0) -> list[DecoderInput]:
    """An image of a few directions, and a text of which the end is the answer."""
    random = np.random.default_rng(seed)
    directions = np.random.default_rng(0).standard_normal((6, width))
    rows = random.standard_normal((count, 24, 6)) @ directions + 0.3 * random.standard_normal((count, 24, width))
    image = (np.arange(24) > 0) & (np.arange(24) < 12)
    return [DecoderInput(one.astype(np.float32), image, answer) for one in rows]


def rounded_matrices(directory: Path) -> dict[str, Blocks]:
    _, tensors = open_source(directory)
    names = [name for name in tensors.names() if name.endswith(MATRICES) and ".blocks." in name]
    matrices = {name.removesuffix(".weight"): tensors.get(name) for name in names}
    return {name: nearest(name, w, 32 if w.shape[1] % 32 == 0 else 16, False) for name, w in matrices.items()}


def divergence(exact: Molmo, blocks: dict[str, Blocks], asked: list[DecoderInput], directory: Path) -> float:
    """Mean KL at the positions that predict the answer, or at the text's, with the weights written one by one."""
    found, _, config = load_checkpoint(directory)
    total = []
    with torch.inference_mode():
        for parameter, hubs in hub_layout(config).items():
            for e, hub in enumerate(hubs):
                if (name := hub.removesuffix(".weight")) in blocks:
                    target = found.get_parameter(parameter)
                    value = torch.from_numpy(blocks[name].restored())
                    (target[e] if len(hubs) > 1 else target).copy_(value)
        for one in asked:
            x, at = torch.from_numpy(one.embeddings)[None], np.flatnonzero(~one.image)[1:]
            at = at[-one.answer - 1 :] if one.answer else at
            p, q = (
                F.log_softmax(model.decoder.logits(model.decoder(x)[0, at]).double(), -1) for model in (exact, found)
            )
            total.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return float(np.mean(total))


@pytest.mark.parametrize(("kind", "answer"), [("experts", 0), ("dense", 7)])
def test_trained_scales_are_closer_on_other_prompts(kind: str, answer: int, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / kind, kind)
    exact, _, config = load_checkpoint(directory)
    _, tensors = open_source(directory)
    before = rounded_matrices(directory)
    width, heard = config.decoder.d_model, list[float]()
    after = train_scales(
        config, tensors, prompts(16, 1, width, answer), before, 5, on_pass=lambda _n, kl: heard.append(kl)
    )  # fmt: skip
    unseen = prompts(10, 2, width, answer)
    losses = [divergence(exact, blocks, unseen, directory) for blocks in (before, after)]
    print(f"{kind}: KL {losses[0]:.4g}, trained {losses[1]:.4g}; held out {heard[0]:.4g}, {min(heard):.4g}")
    assert losses[1] < 0.9 * losses[0]
    assert len(heard) == 6
    assert set(after) == set(before)
    for name, blocks in before.items():
        assert np.array_equal(after[name].codes, blocks.codes), "only scales change"
    assert any(not np.array_equal(after[name].scale, blocks.scale) for name, blocks in before.items())


def test_the_same_seed_trains_the_same_scales(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "dense", "dense")
    config, tensors = open_source(directory)
    before, asked = rounded_matrices(directory), prompts(9, 1, config.decoder.d_model)
    first, again, other = (train_scales(config, tensors, asked, before, 2, seed=seed) for seed in (3, 3, 4))
    for name, blocks in first.items():
        np.testing.assert_array_equal(again[name].scale, blocks.scale)
    assert any(not np.array_equal(other[name].scale, blocks.scale) for name, blocks in first.items())
    with pytest.raises(QuantizeError, match=r"at least two prompts.*but got 1: add photos"):
        train_scales(config, tensors, asked[:1], before, 2)


def test_matrices_without_a_gradient_keep_their_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "dense", "dense")
    config, tensors = open_source(directory)
    before, asked = rounded_matrices(directory), prompts(4, 1, config.decoder.d_model)
    foreign = {"elsewhere": next(iter(before.values()))}
    assert train_scales(config, tensors, asked, foreign, 1) == foreign, "nothing of the decoder's is rounded"

    def forward(_self: Decoder, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        assert mask is None
        return x

    monkeypatch.setattr(Decoder, "forward", forward)  # only the head is used
    head = "model.transformer.ff_out"
    rounded = before | {head: nearest(head, tensors.get(f"{head}.weight"), 32, False)}
    after = train_scales(config, tensors, asked, rounded, 2)
    for name, blocks in rounded.items():
        assert np.array_equal(after[name].scale, blocks.scale) == (name != head), name


def test_a_bundle_with_trained_scales(tmp_path: Path) -> None:
    """The same codes as without training, and other scales; the weights of every kind are restored in their places."""
    options = {"calibrate": GOLDEN, "train_scales": 2, "measure": False}
    heard: list[float] = []
    export_bundle(GOLDEN / "molmoe", tmp_path / "out", "q4", on_pass=lambda _n, kl: heard.append(kl), **options)
    recorded = open_bundle(tmp_path / "out").components["decoder"].trained_scales
    assert recorded is not None
    assert recorded.divergences == pytest.approx(heard, rel=1e-3)
    assert len(heard) == 3
    assert heard[recorded.kept_pass] == min(heard)
    plain, trained = (load_bundle_weights(one) for one in (bundle("molmoe", "q4", calibrate=GOLDEN), tmp_path / "out"))
    changed = 0
    for (name, a), (_, b) in zip(plain.named_parameters(), trained.named_parameters(), strict=True):
        assert (a != 0).equal(b != 0), name
        assert torch.allclose(a, b, rtol=0.1, atol=1e-3), name
        changed += not a.equal(b)
    assert changed > 4


def test_the_memory_counts_the_distributions_of_all_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = open_source(GOLDEN / "molmoe")
    none, short, long, both = (memory_needed(config, 1000, lengths) for lengths in ([], [101], [301], [101, 301]))
    assert none == 4 * 4 * 1000
    assert both - long == 2 * 100 * config.decoder.n_logits, "another prompt is stored in float16"
    assert long - none == 3 * (short - none)

    asked: dict[str, int] = {}

    def refuse(needed: int, what: str) -> None:
        asked[what] = needed
        raise RoomError("no room")

    monkeypatch.setattr("molmo_edge.export.bundle.check_room", refuse)
    with pytest.raises(RoomError):
        export_bundle(GOLDEN / "molmoe", tmp_path / "out", "q4", calibrate=GOLDEN, train_scales=1, measure=False)
    weights = sum(tensor.numel() for tensor in load_checkpoint(GOLDEN / "molmoe")[0].decoder.parameters())
    stored = 2 * config.decoder.n_logits * 100 * len(find_prompts(GOLDEN))  # every golden photo has more positions
    assert asked["train_scales"] > 16 * weights + stored
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    shutil.copyfile(GOLDEN / "coffee.png", one / "coffee.png")
    for options, message in (
        ({"precision": "q4"}, "learns from calibration photos"),
        ({"precision": "int8", "calibrate": GOLDEN}, "applies to a decoder in q4"),
        ({"precision": "q4", "calibrate": GOLDEN, "train_scales": -1}, "a number of passes"),
        ({"precision": "q4", "calibrate": one}, "at least two prompts.*one has 1: add photos"),
    ):
        with pytest.raises(ExportError, match=message):
            export_bundle(GOLDEN / "molmoe", tmp_path / "out", **{"train_scales": 2, **options})
    assert not (tmp_path / "out").exists()

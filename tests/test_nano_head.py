"""Nano's stage "head": votes begin as the detector's classes, and the checkpoint scores as the fit did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molmo_edge.checkpoints.manifest import MANIFEST, POINT_HEAD, read_manifest
from molmo_edge.config import ConvTowerConfig, DecoderConfig, ImageConfig, MolmoConfig, PointHeadConfig, VisionConfig
from molmo_edge.data.drawn.sprites import Assets
from molmo_edge.data.examples import Example
from molmo_edge.export.bundle import CheckPhoto, export_bundle
from molmo_edge.export.safetensors_checkpoint import export_checkpoint
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.selfcheck import check_bundle
from molmo_edge.training.encoding import Encoder, Encoding, collate
from molmo_edge.training.forward import ForwardConfig, Trainable
from molmo_edge.training.regions import PEAK, UNKNOWN
from recipes.nano import head, head_states
from recipes.nano.asked_pictures import AskedPictures, follow_ups
from recipes.nano.detector import COCO_NAMES
from recipes.nano.head_targets import heat_of
from recipes.nano.photos import Vocabulary
from recipes.nano.replace_head import replace_head
from recipes.nano.student import PRECISION
from recipes.nano.votes import DIM, LEVELS, detector_votes, fitted, with_votes

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


def drawn() -> AskedPictures:
    """Scenes of two shapes, asked for them and for names that are absent."""
    shapes = {"red square": (220, 30, 30), "blue disc": (30, 30, 220)}
    sprites = {name: (Image.new("RGBA", (40, 40), (*color, 255)),) for name, color in shapes.items()}
    return AskedPictures([], Vocabulary([], [], shapes), None, Assets(sprites), scenes=8)


def test_the_head_keeps_the_rest_of_the_model_and_scores_as_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Molmo(CONFIG).init_weights(std=0.1, generator=torch.Generator().manual_seed(0))
    save_checkpoint(before, TOKENIZER, tmp_path / "before")
    run, data = tmp_path / "run", drawn()
    head.read_pictures(tmp_path / "before", data, run, 2)
    (folder,) = run.glob("choices-*")
    first = (folder / "00000.npz").stat().st_mtime_ns
    files, seconds = head.read_pictures(tmp_path / "before", data, run, 4)
    assert (len(files), len(seconds)) == (4, 2)
    assert files[0].stat().st_mtime_ns == first, "what was there before an interruption is not computed again"
    assert head.choices_of(tmp_path / "before", data, run) == folder
    assert head.choices_of(tmp_path / "before", replace(data, scenes=9), run) != folder, "of other pictures"

    trained: list[head.Weights] = []
    train = head.train

    def remember(*args: Any) -> head.Weights:
        trained.append(train(*args))
        return trained[0]

    monkeypatch.setattr(head, "train", remember)
    out = head.add_votes(tmp_path / "before", classes(), files, run, head.Fit(steps=40, batch=2, log_every=10))
    losses = [json.loads(line)["point_loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    after, _, config = load_checkpoint(out)
    assert config == with_votes(CONFIG)
    for name, parameter in before.named_parameters():
        if not name.startswith("point_head.patch_q"):
            assert torch.equal(parameter, after.get_parameter(name)), name

    rng = np.random.default_rng(5)
    rgb, names = head_states.named_in(data, 3, rng)
    asked = follow_ups([head_states.question(one, rng) for one in names], rng)
    assert any(len(one.messages) > 2 for one in asked), "some follow other questions"
    numbered = [(data.vocabulary.numbers[one.name], one) for one in names]
    tokenizer = Tokenizer.from_file(TOKENIZER)
    monkeypatch.setattr(head_states, "STORED", torch.float32)
    choices = head_states.Reader(after, tokenizer)(rgb, numbered, asked, rng)
    assert choices.names.tolist() == [number for number, _ in numbered]
    unfitted = Molmo(config).init_weights()
    unfitted.load_state_dict(before.state_dict(), strict=False)
    with torch.no_grad():
        assert unfitted.point_head is not None
        assert config.point_head is not None
        keys, bias, queries = detector_votes(config, classes())
        head.put_keys(unfitted.point_head, keys, bias, *fitted(*head.named_states(files, queries)))
        expected = trained[0](head.maps_of(unfitted.point_head, config.point_head, choices)) - head.THRESHOLD
        encoder = Encoder(tokenizer, config.image, Encoding(sequence=2048, shuffle=False), config=config)
        sample = encoder(Example(rgb, tuple(asked)), np.random.default_rng(0))
        points = Trainable(after, ForwardConfig()).eval().run(collate([sample])).points
    assert sample.points is not None
    assert points is not None
    found = points.patches[points.begins][:, :-1][:, torch.from_numpy(sample.points.chosen)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.1


def test_a_map_has_a_peak_at_each_object_and_gaps_where_a_name_may_be() -> None:
    rows, columns = np.indices((4, 6))
    places = np.stack([rows, columns], -1)[None].astype(np.float32)  # [1, 4, 6, 2]
    places = places.reshape(2, 2, 3, 2, 2).transpose(0, 2, 1, 3, 4).reshape(6, 4, 2)
    boxes = np.array([[0, 0, 20, 40], [70, 55, 95, 95], [40, 60, 60, 90]], np.float32)
    none = np.zeros(0)
    choices = head_states.Choices(
        np.array([0, 1]), none, none, none, none, np.ones((6, 4), bool), places, np.array([4, 6]), none,
        boxes, np.array([0, 0, 0]), np.array([True, True, False]),
    )  # fmt: skip
    heat = heat_of(choices)  # of two rows and three columns of patches
    assert heat[1].tolist() == [0] * 6
    assert heat[0, [0, 5]].tolist() == [PEAK, PEAK]
    assert heat[0, 4] == UNKNOWN, "the unsure box is in this patch alone"
    assert 0 <= heat[0, 1] < PEAK


def test_a_bundle_gets_the_head_of_a_checkpoint(tmp_path: Path) -> None:
    before = Molmo(CONFIG).init_weights(std=0.1, generator=torch.Generator().manual_seed(0))
    save_checkpoint(before, TOKENIZER, tmp_path / "before")
    photo, bundle, new = tmp_path / "photo.png", tmp_path / "bundle", tmp_path / "new"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(photo)
    export_bundle(tmp_path / "before", bundle, PRECISION, check=CheckPhoto(photo, "Point to the cup.", 4))
    export_checkpoint(bundle, tmp_path / "restored", "fp32")
    files, _ = head.read_pictures(tmp_path / "restored", drawn(), tmp_path / "run", 2)
    exact = tmp_path / "exact"
    exact.mkdir()
    tokenizer = Tokenizer.from_file(TOKENIZER)
    head_states.write_choices(before, tokenizer, drawn(), exact, 1)
    states = [
        head_states.load(file).states.astype(np.float32)
        for file in (
            files[0],
            head.read_pictures(tmp_path / "before", drawn(), tmp_path / "run", 1).files[0],
            exact / files[0].name,
        )
    ]
    size = np.abs(states[0]).max()
    assert np.abs(states[0] - states[1]).max() < 0.001 * size, "the head is fitted to the weights of the bundle"
    assert np.abs(states[0] - states[2]).max() > 0.02 * size
    fit = head.Fit(steps=2, batch=2)
    replace_head(bundle, head.add_votes(tmp_path / "restored", classes(), files, tmp_path / "run", fit), new)
    changed = {MANIFEST, read_manifest(new).components[POINT_HEAD].file}
    for file in bundle.rglob("*"):
        if file.is_file():
            same = file.read_bytes() == (new / file.relative_to(bundle)).read_bytes()
            assert same == (file.name not in changed), file
    assert read_manifest(new).config == with_votes(CONFIG)
    assert check_bundle(new).passed

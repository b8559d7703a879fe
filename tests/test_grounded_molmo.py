"""Grounding tokens in a model with the images, prompts and answers of Molmo v1: trained, exported and asked."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from molmo_edge import Molmo as Sdk
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import (
    ConfigError,
    ConvTowerConfig,
    DecoderConfig,
    ImageConfig,
    MolmoConfig,
    PointHeadConfig,
    VisionConfig,
)
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.regions import Regions
from molmo_edge.evaluation.loss import ModelSpec, measure_loss
from molmo_edge.evaluation.questions import UNSCORED, Question
from molmo_edge.export import export_bundle, export_checkpoint
from molmo_edge.frontend.crops import image_in_grid, pointable_cells, pointing_grid, select_tiling
from molmo_edge.frontend.grounding_tokens import GroundingIds
from molmo_edge.frontend.points import NONE, Point, format_absent, format_count, format_points, parse_points
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, save_checkpoint
from molmo_edge.runtimes.grounding import DigitWriter, GroundedParser
from molmo_edge.training.encoding import Encoder, Encoding
from molmo_edge.training.forward import ForwardConfig
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.trainer import Data, Trainer, build
from recipes.nano.student import PRECISION

TOKENIZER = Path(__file__).parent / "golden" / "molmoe" / "tokenizer.json"
D = 64
CONFIG = MolmoConfig(  # two towers, as nano has
    ImageConfig(crop_size=112, overlap_margins=(2, 2), max_crops=2, overview=96),
    VisionConfig("openai", D, 3, 4, 2 * D, n_pos=65, layers=(-1, -2)),
    DecoderConfig(
        d_model=D,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        ffn_dim=D,
        n_experts=4,
        top_k=4,
        vocab_size=500,
        embedding_size=500,
        additional_vocab_size=16,
        additional_head=True,
        qk_norm=True,
    ),
    projector_dim=D,
    conv_tower=ConvTowerConfig(stem_dim=4, steps=(1, 1, 1, 2), pyramid_dim=6),
    point_head=PointHeadConfig(505, 506, 507, dim=32, numbered=False, votes=2, vote_dim=8),
)
POINT, COUNT = "Point to the discs.", "How many discs are there?"
POINT_CUPS, COUNT_CUPS = "Point to the cups.", "How many cups are there?"
NO_CUPS = "Counting the cups shows a total of 0."
SIZE = (80, 150)  # height and width: with bars above and below


@dataclass(frozen=True)
class Discs:
    """Pictures with one, two, ... discs, and questions about cups, which are absent."""

    count: int
    name: str = "discs"
    cups: bool = False

    def __len__(self) -> int:
        return self.count

    def points(self, index: int) -> list[Point]:
        rng = np.random.default_rng(index)
        return [Point(*map(float, rng.uniform(10, 90, 2))) for _ in range(1 + index % 3)]

    def picture(self, index: int) -> np.ndarray:
        height, width = SIZE
        y, x = np.mgrid[:height, :width]
        out = np.full((height, width, 3), 230, np.uint8)
        for point in self.points(index):
            px, py = point.pixel(width, height)
            out[(x - px) ** 2 + (y - py) ** 2 < 8**2] = (200, 30, 30)
        return out

    def example(self, index: int, _rng: np.random.Generator) -> Example:
        points = self.points(index)
        asked = [(POINT, format_points(points, "discs")), (COUNT, format_count(points, "discs"))]
        if self.cups:
            tag = format_absent("cups")
            asked += [(POINT_CUPS, tag), (COUNT_CUPS, f"Counting the {tag} shows a total of 0.")]
        return Example(self.picture(index), tuple(Annotation("demo", each) for each in asked))


def _train(start: Path, directory: Path, data: Discs, steps: int, save_every: int = 1000) -> Path:
    from molmo_edge.checkpoints.weight_files import open_tensors
    from molmo_edge.frontend.tokenizer import Tokenizer

    rate = Rate(3e-3, 10)
    recipe = Recipe(
        steps=steps,
        batch=2,
        micro=2,
        mixture=(),
        precision="fp32",
        encoding=Encoding(sequence=512),
        forward=ForwardConfig(answer_dropout=0.0, recompute=False),
        optimizer=OptimizerConfig(rate, Rate(1e-3, 10), rate, rate),
        max_crops=None,
        workers=0,
        save_every=save_every,
        log_every=1000,
    )
    with world("cpu") as here:
        model = build(read_config(start), open_tensors(start), str(start), recipe, here)
        trainer = Trainer(model, Tokenizer.from_file(TOKENIZER), Data([data], [1.0]), recipe, directory, here)
        return trainer.train()


def untrained(directory: Path) -> Path:
    """A checkpoint of CONFIG with random weights."""
    model = Molmo(CONFIG).init_weights(std=D**-0.5, generator=torch.Generator().manual_seed(0))
    save_checkpoint(model, TOKENIZER, directory)
    return directory


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def trained(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(start, tmp_path_factory.mktemp("run"), Discs(2, cups=True), 80)


def test_a_trained_model_points_in_the_grammar_of_molmo(trained: Path, tmp_path: Path) -> None:
    """Read back, and exported to ONNX: both find the discs, and write digits where the model chose tokens."""
    assert read_config(trained) == CONFIG
    bundle = tmp_path / "bundle"
    export_bundle(trained, bundle)
    data = Discs(2)
    with Sdk(trained) as torch_model, Sdk(bundle) as onnx_model:
        for index in range(2):
            picture, points = data.picture(index), data.points(index)
            answer = torch_model.ask(picture, POINT)
            assert answer.text == format_points(answer.points, "discs")
            assert parse_points(answer.text) == [
                dataclasses.replace(p, x=round(p.x, 1), y=round(p.y, 1)) for p in answer.points
            ]
            assert len(answer.points) == len(points)
            assert all(p.label == "discs" and p.image is None for p in answer.points)
            for found, wanted in zip(answer.points, sorted(points, key=lambda p: p.x), strict=True):
                assert abs(found.x - wanted.x) < 2
                assert abs(found.y - wanted.y) < 3
            counted = torch_model.ask(picture, COUNT)
            assert counted.text == format_count(counted.points, "discs")
            assert counted.count == len(points)
            other = onnx_model.ask(picture, POINT)
            assert (other.text, other.token_ids, other.points) == (answer.text, answer.token_ids, answer.points)
            # Three tokens a point and one for the end, which are the only ones beyond the vocabulary.
            assert sum(token >= CONFIG.decoder.n_logits for token in answer.token_ids) == 3 * len(points) + 1
            pieces = list(torch_model.stream(picture, POINT))
            assert "".join(piece for piece in pieces if isinstance(piece, str)) == answer.text
            inputs = torch_model.encode(picture).grounding
            assert inputs is not None
            ids = inputs.token_ids
            unlabelled = [dataclasses.replace(point, label="") for point in answer.points]
            assert [piece for piece in pieces if isinstance(piece, Point)] == unlabelled
            for question, text in ((POINT_CUPS, NONE), (COUNT_CUPS, NO_CUPS)):
                absent = torch_model.ask(picture, question)
                assert (absent.text, absent.points) == (text, ())
                assert not any(ids.slots <= token < ids.end for token in absent.token_ids), "only that there are none"
                assert onnx_model.ask(picture, question).token_ids == absent.token_ids
            assert torch_model.count(picture, "cups").count == 0
            cut = torch_model.ask(picture, POINT, max_new_tokens=len(answer.token_ids) - 8)
            assert "POINT_" not in cut.text
            assert inputs.with_coordinates(answer.text) == answer.text, "an earlier answer is text already"
            assert parse_points(cut.text) == parse_points(answer.text.replace("discs", "")[: len(cut.text)])


def test_what_a_bundle_of_nanos_precisions_holds_goes_to_the_other_engines(trained: Path, tmp_path: Path) -> None:
    export_bundle(trained, tmp_path / "mixed", PRECISION)
    export_checkpoint(tmp_path / "mixed", tmp_path / "checkpoint", "fp32")
    assert read_config(tmp_path / "checkpoint") == CONFIG
    models = ["mixed", "checkpoint"]
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        export_bundle(tmp_path / "mixed", tmp_path / "gguf", "f32", engine="gguf", measure=False)
        models.append("gguf")
    data, said = Discs(2), {}
    for name in models:
        with Sdk(tmp_path / name, threads=1) as model:
            answers = [model.ask(data.picture(i), question) for i in range(2) for question in (POINT, COUNT)]
        said[name] = [answer.token_ids for answer in answers]
        assert [len(answer.points) for answer in answers] == [1, 1, 2, 2]
        assert [answer.count for answer in answers] == [1, 1, 2, 2]
    assert all(ids == said["mixed"] for ids in said.values()), "far from ties, so rounded inputs change no id"


def test_the_loss_of_a_copy_is_zero_and_its_points_are_those_of_the_sdk(trained: Path) -> None:
    picture = Discs(2).picture(1)
    asked = Question("0", "points", UNSCORED, "0", lambda: picture, POINT, lambda _: {}, max_new_tokens=100)
    spec = ModelSpec(trained, precision="fp32", threads=1)
    (copy,) = measure_loss(spec, [spec], [asked], noise="none").candidates
    (answer,) = copy.comparison.answers
    with Sdk(trained, threads=1) as model:
        expected = model.ask(picture, POINT)
    assert answer.reference_text == answer.text == expected.text
    assert answer.reference_points == parse_points(expected.text) != []
    assert copy.metrics["kl_mean"].value < 1e-7
    assert copy.metrics["kl_grounding"].n == 3 * len(expected.points) + 1
    assert copy.metrics["router"].value == 1


def test_a_resumed_run_equals_an_uninterrupted_one(start: Path, tmp_path: Path) -> None:
    whole = _train(start, tmp_path / "whole", Discs(3), 4, save_every=2)
    saved = tmp_path / "again" / "checkpoints"
    saved.mkdir(parents=True)
    (first,) = (p for p in (tmp_path / "whole" / "checkpoints").iterdir() if p.name.endswith("2"))
    first.rename(saved / first.name)
    again = _train(start, tmp_path / "again", Discs(3), 4, save_every=2)
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_adapters_take_the_head_along(start: Path, tmp_path: Path) -> None:
    from molmo_edge.checkpoints.weight_files import open_tensors
    from molmo_edge.frontend.tokenizer import Tokenizer
    from molmo_edge.training.adapters import LoraTrainer
    from molmo_edge.training.lora import LoraConfig, build_adapted, trained_whole
    from molmo_edge.training.recipe import POINTS

    lora = LoraConfig(rank=2, expert_rank=2)
    assert {name.partition(".")[0] for name in trained_whole(CONFIG, lora)} == {"connector", "point_head"}
    recipe = dataclasses.replace(POINTS, steps=2, batch=1, micro=1, workers=0, max_crops=2, log_every=2)
    with world("cpu") as here:
        model = build_adapted(start, recipe, here, lora)
        tokenizer, data = Tokenizer.from_file(TOKENIZER), Data([Discs(3)], [1.0])
        trainer = LoraTrainer(model, tokenizer, data, recipe, tmp_path, here, checkpoint=start, lora=lora)
        merged = trainer.train()
    before, after = open_tensors(start), open_tensors(merged)
    changed = {name for name in before.names() if not np.array_equal(before.get(name), after.get(name))}
    for part in ("patch_q", "subpatch_k", "subpatch_loc_k"):
        assert f"model.point_predictor.{part}.weight" in changed
    assert "model.transformer.blocks.0.attn.att_proj.weight" in changed
    assert "lm_head.weight" not in changed
    assert read_config(merged) == CONFIG


# --- the parts --------------------------------------------------------------------------------------------------------


def test_the_image_lies_in_its_grid_as_on_the_canvas() -> None:
    image = CONFIG.image
    tiling = select_tiling(*SIZE, image)
    grid, (left, top, width, height) = pointing_grid(image, tiling), image_in_grid(image, tiling, *SIZE)
    rows, cols = grid.shape
    assert abs(width / height - SIZE[1] / SIZE[0]) < 0.05, "its aspect is kept"
    assert width == cols or height == rows
    assert left == pytest.approx((cols - width) / 2, abs=1 / 16)
    assert top == pytest.approx((rows - height) / 2, abs=1 / 16)
    chosen = pointable_cells(image, tiling)
    assert not chosen[: image.cells**2].any(), "the global view is not pointed at where there are crops"
    assert chosen.sum() == grid.size / image.pool**2
    alone = dataclasses.replace(image, max_crops=0)
    assert pointable_cells(alone, (0, 0)).all()
    assert pointing_grid(alone, (0, 0)).tolist() == np.arange(64).reshape(8, 8).tolist()


def test_points_without_numbers_follow_the_order_of_tokens() -> None:
    ids = GroundingIds(100, 10, 4, numbered=False)
    patch, slot, location = 103, ids.slots + 2, ids.locations + 5
    assert ids.allowed([1, patch]) == [(ids.slots, ids.locations)]
    assert ids.allowed([1, patch, slot]) == [(ids.locations, ids.end)]
    assert ids.allowed([1, patch, slot, location]) == [(0, 100), (patch, ids.slots)]
    assert ids.allowed([1, patch, slot, location, patch]) == [(slot + 1, ids.locations)], "slots ascend in a patch"
    last = ids.locations - 1
    assert ids.allowed([1, patch, last, location]) == [(0, 100), (patch + 1, ids.slots)], "the patch is used up"


def test_tokens_outside_of_a_tag_are_written_as_points(start: Path) -> None:
    """A weak model gives them. Whatever the pieces, the text has no tokens, and its points are those of the answer."""
    with Sdk(start, max_crops=0) as model:
        inputs = model.encode(Discs(1).picture(0)).grounding
    assert inputs is not None
    ids = inputs.token_ids

    def tokens(patch: int) -> str:
        return "".join(map(ids.token, (ids.first + patch, ids.slots + 1, ids.locations + 4)))

    right, left, middle = map(tokens, (7, 1, 4))
    tag = f'<points coords="{middle}{ids.token(ids.end)}" alt="disc">disc</points>'
    for text, labels in (
        (f"Here{right}{left}, or{middle} it is.", ["", "", ""]),
        (f"Counting{left}{ids.token(ids.end)}{tag}{right}", ["", "disc", ""]),
        (f"{tag} and{right}{left}", ["disc", "", ""]),
        (f"None{ids.token(ids.first)}{ids.token(ids.slots)}.", []),
    ):
        written = inputs.with_coordinates(text)
        assert "POINT_" not in written
        found = inputs.points(text)
        assert [point.label for point in found] == labels
        again = [(point.x, point.y, point.label) for point in parse_points(written)]
        assert again == [(round(point.x, 1), round(point.y, 1), point.label) for point in found]
        parser, writer = GroundedParser(inputs), DigitWriter(inputs)
        pieces = [parser.feed(char) for char in text] + [parser.close()]
        assert [point for piece in pieces for point in piece] == [dataclasses.replace(p, label="") for p in found]
        assert "".join(map(writer.feed, text)) + writer.close() == written


def test_a_tag_without_points_is_written_as_text(start: Path) -> None:
    with Sdk(start, max_crops=0) as model:
        inputs = model.encode(Discs(1).picture(0)).grounding
    assert inputs is not None
    assert inputs.token_ids.no_more is not None
    tag = f'<points coords="{inputs.token_ids.token(inputs.token_ids.no_more)}">cups</points>'
    for text, written in (
        (tag, NONE),
        (f"Counting the {tag} shows a total of 0.", NO_CUPS),
        (f"{tag[:-5]}", ""),  # cut off
    ):
        assert inputs.with_coordinates(text) == written
        writer = DigitWriter(inputs)
        assert "".join(map(writer.feed, text)) + writer.close() == written
        assert inputs.points(text) == []


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_total_is_the_number_of_the_points_before_it(start: Path, size: int) -> None:
    with Sdk(start, max_crops=0) as model:
        inputs = model.encode(Discs(1).picture(0)).grounding
    assert inputs is not None
    ids = inputs.token_ids
    one = "".join(map(ids.token, (ids.first, ids.slots, ids.locations)))
    two = one + "".join(map(ids.token, (ids.first + 9, ids.slots, ids.locations)))
    none = ids.token(ids.no_more or 0)
    for tokens, after, expected in (
        (two, " shows a total of 7.", " shows a total of 2."),
        (one, " shows a total of 12", " shows a total of 1"),
        (none, " shows a total of 3.", " shows a total of 0."),
        (one, " shows a total of cups.", " shows a total of cups."),
        (one, " shows a total of ", " shows a total of "),
        (one, " shows a to", " shows a to"),
        (one, " is what it shows a total of 7.", " is what it shows a total of 7."),
        (one, " shows a total of 1,000.", " shows a total of 1,000."),
        (one, " shows a total of 3.5 m", " shows a total of 3.5 m"),
        (one, " shows a total of 7, or so", " shows a total of 1, or so"),
    ):
        text = f'Counting the <points coords="{tokens}">cups</points>{after}'
        writer = DigitWriter(inputs)
        pieces = [writer.feed(text[at : at + size]) for at in range(0, len(text), size)]
        written = "".join(pieces) + writer.close()
        assert written == inputs.with_coordinates(text)
        assert written.endswith(f"</point>{expected}" if tokens == one else expected)
        assert len(parse_points(written)) == len(inputs.points(text))


def test_all_crops_are_computed_where_points_refer_to_their_patches() -> None:
    encoder = Encoder(Tokenizer.from_file(TOKENIZER), CONFIG.image, Encoding(crops=0), config=CONFIG)
    example = Example(Discs(1).picture(0), regions=Regions((), np.array([True])))
    sample = encoder(example, np.random.default_rng(0))
    assert sample.pooling is not None
    assert sample.points is not None
    assert len(sample.crops) > 1
    assert sample.pooling.max() < sample.masks.size
    assert len(sample.points.turns) == len(sample.pooling) == (sample.token_index >= 0).sum()


def test_an_earlier_answer_is_trained_on_as_it_stands_in_a_prompt() -> None:
    """Points have coordinates there, and no loss; answers without points keep theirs."""
    tokenizer, data = Tokenizer.from_file(TOKENIZER), Discs(1)
    encode = Encoder(tokenizer, CONFIG.image, Encoding(weighting="none"), config=CONFIG)
    pointed, counted = (a.messages for a in data.example(0, np.random.default_rng(0)).annotations)

    def encoded(*messages: str) -> tuple[np.ndarray, np.ndarray, int]:
        sample = encode(Example(data.picture(0), (Annotation("demo", messages),)), np.random.default_rng(0))
        assert sample.points is not None
        head = int((sample.packed.segments == 10000).sum())
        return (
            sample.packed.input_ids[head:],
            sample.packed.loss_weights[head - 1 :] > 0,
            len(sample.points.patch_targets),
        )

    ids, trained, choices = encoded(*pointed, *counted)
    prompt = text_ids(tokenizer, [*pointed, counted[0]])
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert not trained[: len(prompt)].any()
    assert trained[len(prompt) :].all()
    alone, _, same = encoded(*counted)
    assert choices == same == 2, "the disc, and that there are no more"
    assert ids[len(prompt) :].tolist() == alone[len(text_ids(tokenizer, [counted[0]])) :].tolist()
    ids, trained, choices = encoded(POINT_CUPS, format_absent("cups"), *counted)
    prompt = text_ids(tokenizer, [POINT_CUPS, NONE, counted[0]])
    assert ids[: len(prompt)].tolist() == prompt.tolist(), "as the SDK shows it"
    assert not trained[: len(prompt)].any()
    assert choices == 2
    _, _, choices = encoded(POINT_CUPS, format_absent("cups"))
    assert choices == 1, "that there are none"
    _, trained, _ = encoded("Is there a cup?", "No.", *counted)
    first = len(text_ids(tokenizer, ["Is there a cup?"]))
    assert trained[first], "an answer without points"


def test_a_marker_needs_a_logit() -> None:
    with pytest.raises(ConfigError, match="grounding token 505 has no logit"):
        dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, additional_head=False))

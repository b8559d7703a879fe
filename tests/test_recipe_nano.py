"""Nano's recipe: what is known about names survives augmentation, and the detector's weights land where they belong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from PIL import Image
from test_conv_tower import CONFIG, GOLDEN

from molmo_edge.config import ConvTowerConfig, ImageConfig
from molmo_edge.data.annotated_photos import Photo, load_photos
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.frontend.image_files import ImageError
from molmo_edge.modeling import Molmo, save_checkpoint
from molmo_edge.modeling.conv_tower import ConvTower
from molmo_edge.training.recipe import Recipe
from recipes.nano import answers, budget, curves, pointing, sight, stages
from recipes.nano.__main__ import parser, required, unused
from recipes.nano.detector import COCO_NAMES, box_layers, score_layers, tower_state
from recipes.nano.errors import NotTrainedError
from recipes.nano.head import Pictures
from recipes.nano.photos import Augmentation, Picture, RegionPhotos, Vocabulary, cut, flip, mosaic
from recipes.nano.score_sight import local_maxima, stitched, suppress

RED, BLUE = (230, 30, 30), (30, 30, 230)
COLOURS = {"red": RED, "blue": BLUE}
BOXES = {"red": (10.0, 20.0, 30.0, 60.0), "blue": (55.0, 40.0, 95.0, 90.0)}


def picture(height: int = 200, width: int = 300) -> Picture:
    """A red and a blue box on grey, both known, and an area that says nothing about "green"."""
    rgb = np.full((height, width, 3), 128, np.uint8)
    for name, (x0, y0, x1, y1) in BOXES.items():
        rgb[round(y0 * height / 100) : round(y1 * height / 100), round(x0 * width / 100) : round(x1 * width / 100)] = (
            COLOURS[name]
        )
    return Picture(rgb, list(BOXES.items()), [("green", (0.0, 0.0, 50.0, 50.0))], {"red", "blue", "green"})


def inside(found: Picture, box: tuple[float, ...]) -> np.ndarray:
    """The mean colour of the middle of a box."""
    h, w = found.rgb.shape[:2]
    x0, y0, x1, y1 = (v * s / 100 for v, s in zip(box, (w, h, w, h), strict=True))
    y, x = (
        slice(int(y0 + (y1 - y0) * 0.3), int(y1 - (y1 - y0) * 0.3) + 1),
        slice(int(x0 + (x1 - x0) * 0.3), int(x1 - (x1 - x0) * 0.3) + 1),
    )
    return found.rgb[y, x].reshape(-1, 3).mean(0)


def assert_true(found: Picture) -> None:
    for name, box in found.objects:
        assert np.abs(inside(found, box) - COLOURS[name]).max() < 12, (name, box)


def test_boxes_stay_on_their_objects() -> None:
    rng = np.random.default_rng(0)
    kept = lost = 0
    for _ in range(200):
        low = rng.uniform(0, 50, 2)
        window = (*map(float, low), *map(float, low + rng.uniform(30, 50, 2)))
        part = cut(picture(), window, kept=0.5)
        assert_true(part)
        assert_true(flip(part))
        names = [name for name, _ in part.objects]
        for name, (x0, y0, x1, y1) in BOXES.items():
            across = max(0, min(x1, window[2]) - max(x0, window[0])) * max(0, min(y1, window[3]) - max(y0, window[1]))
            share = across / ((x1 - x0) * (y1 - y0))
            if abs(share - 0.5) > 0.03 and share > 0.03:  # away from where a pixel decides
                assert (name in names) == (share > 0.5)
                assert (name in [n for n, _ in part.unsure]) == (share < 0.5)
                kept, lost = kept + (share > 0.5), lost + (share < 0.5)
    assert kept > 20
    assert lost > 20


def test_a_mosaic_knows_what_its_parts_know() -> None:
    rng = np.random.default_rng(1)
    other = picture()
    other.known, other.objects = {"red"}, [("red", BOXES["red"])]
    whole = mosaic([picture(), other, picture(120, 90), picture()], rng)
    assert_true(whole)
    assert whole.known == {"red", "blue", "green"}
    assert len(whole.objects) == 7
    blue = [box for name, box in whole.unsure if name == "blue"]
    assert len(blue) == 1
    assert blue[0][1:3] == (0, 100), "nothing is known of blue in the upper right part"


def annotated(folder: Path) -> Path:
    """Two sources: one labels "cup" everywhere, the other has boxes of a detector."""
    cup = {"label": "cup", "boxes": [[0, 0, 50, 50]], "points": [[25, 25]]}
    rows = [
        {"image": "a.png", "source": "cup_scissors", "objects": [cup]},
        {
            "image": "b.png",
            "source": "street",
            "objects": [{"label": "lamp", "boxes": [[10, 10, 20, 20]], "points": [[15, 15]]}],
            "pseudo": [{"label": "car", "boxes": [[0, 0, 9, 9], [50, 50, 80, 80]], "scores": [0.3, 0.8]}],
        },
    ]  # fmt: skip
    folder.mkdir()
    (folder / "annotations.jsonl").write_text("".join(json.dumps({**row, "split": "train"}) + "\n" for row in rows))
    (folder / "classes.json").write_text(json.dumps({"cup_scissors": ["cup", "scissors"]}))
    for row in rows:
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / row["image"])
    return folder


def test_a_name_is_known_where_its_source_or_the_detector_says_so(tmp_path: Path) -> None:
    root = annotated(tmp_path / "photos")
    photos = load_photos(root, "train")
    vocabulary = Vocabulary(photos, [root])
    assert vocabulary.names == (*COCO_NAMES, "lamp")
    cups, street = (vocabulary.picture(photo) for photo in photos)
    assert cups.known == {"cup", "scissors"}
    assert cups.objects == [("cup", (0, 0, 50, 50))]
    assert street.known == set(COCO_NAMES), "its own label, lamp, is not labelled everywhere"
    assert ("car", (50, 50, 80, 80)) in street.objects
    assert street.unsure == [("car", (0, 0, 9, 9))]
    regions = vocabulary.regions(street)
    assert regions.known.sum() == len(COCO_NAMES)
    assert not regions.known[vocabulary.numbers["lamp"]]


def test_examples_depend_on_the_generator_alone(tmp_path: Path) -> None:
    root = annotated(tmp_path / "photos")
    photos: list[Photo] = load_photos(root, "train")
    data = RegionPhotos(photos, Vocabulary(photos, [root]), Augmentation(), "photos")
    for index in range(2):
        a, b = (data.example(index, np.random.default_rng(7)) for _ in range(2))
        assert np.array_equal(a.image, b.image)
        assert a.regions is not None
        assert b.regions is not None
        assert a.regions.objects == b.regions.objects
        assert a.regions.unsure == b.regions.unsure
    plain = RegionPhotos(photos, data.vocabulary, None, "photos")
    assert np.array_equal(
        plain.example(0, np.random.default_rng(0)).image, plain.example(0, np.random.default_rng(1)).image
    )


def test_the_detectors_weights_land_where_they_belong(tmp_path: Path) -> None:
    """A graph file as TensorFlow.js writes it, of a small tower with weights in float16."""
    config = ConvTowerConfig(stem_dim=4, steps=(1, 1, 2, 1), pyramid_dim=6)
    tower = ConvTower(config)
    convolutions: list[torch.nn.Conv2d] = [tower.stem]
    for stage in tower.stages:
        convolutions += [stage.first, *(conv for step in stage.steps for conv in step), stage.last]
    convolutions += list(tower.lateral)
    scores = [torch.nn.Conv2d(6, len(COCO_NAMES) + 44, 1) for _ in range(3)]
    for level in range(3):
        convolutions += [tower.output[level], scores[level]]
    nodes, entries, raw = [], [], b""
    for n, conv in enumerate(convolutions):
        conv.half().float()
        name = "P/convolution" + (f"_{n}" if n else "")
        nodes.append({"op": "Conv2D", "name": name, "input": [f"x{n}", f"kernel{n}"]})
        nodes.append({"op": "Add", "name": f"P/Add_{n}", "input": [name, f"bias{n}"]})
        kernel = conv.weight.detach().numpy()
        kernel = kernel[:, ::-1] if n == 0 else kernel  # the detector sees BGR
        for key, values in ((f"kernel{n}", kernel.transpose(2, 3, 1, 0)), (f"bias{n}", conv.bias.detach().numpy())):
            entries.append(
                {"name": key, "shape": list(values.shape), "dtype": "float32", "quantization": {"dtype": "float16"}}
            )
            raw += np.ascontiguousarray(values, np.float16).tobytes()
    order = np.random.default_rng(0).permutation(len(nodes))
    model = {
        "modelTopology": {"node": [nodes[int(i)] for i in order]},
        "weightsManifest": [{"paths": ["net.bin"], "weights": entries}],
    }
    (tmp_path / "net.json").write_text(json.dumps(model))
    (tmp_path / "net.bin").write_bytes(raw)
    again = ConvTower(config)
    again.load_state_dict(tower_state(tmp_path / "net.json", config))
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        levels = tower.pyramid(pixels)
        for ours, theirs in zip(again.pyramid(pixels), levels, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
        found = zip(score_layers(tmp_path / "net.json"), box_layers(tmp_path / "net.json"), scores, levels, strict=True)
        for (sw, sb), (bw, bb), conv, level in found:
            x = level[0].permute(1, 2, 0)
            ours = torch.cat([F.linear(x, sw, sb), F.linear(x, bw, bb)], -1).permute(2, 0, 1)
            assert torch.allclose(ours, conv(level)[0], atol=1e-5)


def test_kept_cells_are_stitched_row_by_row() -> None:
    config = ImageConfig(crop_size=112, overlap_margins=(2, 2), max_crops=4, resize="dino")
    for size in ((300, 300), (100, 400)):
        prepared = ImageProcessor(config)(np.zeros((*size, 3), np.uint8))
        grid, crop, cell = stitched(prepared.token_index, prepared.tiling, config)
        rows, columns = ((n * config.window + 4) // config.pool for n in prepared.tiling)
        assert grid.shape == (rows, columns)
        assert (crop > 0).all()
        places = prepared.token_index[crop, cell].reshape(rows, columns)
        assert (np.diff(places, axis=1) == 1).all()
        assert (np.diff(places, axis=0) == columns + 1).all()


def test_peaks_and_overlaps() -> None:
    heat = torch.tensor([[[0.1, 0.9, 0.2], [0.3, 0.4, 0.1], [0.0, 0.1, 0.8]]])
    assert local_maxima(heat).nonzero().tolist() == [[0, 0, 1], [0, 2, 2]]
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    kept = suppress(boxes, torch.tensor([0.5, 0.9, 0.3, 0.1]), least=0.2)
    assert kept.tolist() == [1, 2], "the first overlaps a better one, the last is not sure enough"


def test_a_stage_is_timed_once_and_keeps_its_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timed: list[Path] = []

    def train(recipe: Recipe, directory: Path) -> None:
        timed.append(directory)
        assert recipe.steps == budget.PROBE
        directory.mkdir()
        lines = [
            {"step": 1, "seconds_per_step": 99.0},
            {"step": 12, "seconds_per_step": 4.0},
            {"step": 12, "note": "."},
        ]
        (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    recipe = stages.recipe_of("sight")
    stage = tmp_path / "sight"
    assert [budget.steps_within(stage, 0.5, recipe, train) for _ in range(2)] == [450, 450]
    assert timed == [tmp_path / "sight-probe"]
    assert not timed[0].exists()
    assert budget.steps_within(stage, 9.0, recipe, train) == 450, "of the run that was interrupted"
    assert "keeps its length of 450 steps" in capsys.readouterr().out


def test_the_pictures_of_the_head_fill_its_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = stages.Sources(tmp_path, ())

    def compute(_sources: stages.Sources, pictures: int, directory: Path) -> Pictures:
        directory.mkdir()
        return Pictures([], [99.0, *[2.0] * (pictures - 1)])

    monkeypatch.setattr(stages, "head_pictures", compute)
    assert budget.pictures_within(sources, 0.5) == 900, "the first picture is not counted"
    monkeypatch.setattr(stages, "head_pictures", pytest.fail)
    assert budget.pictures_within(sources, 9.0) == 900, "of the run that was interrupted"
    assert "keeps its length of 900 pictures" in capsys.readouterr().out


def test_a_complete_run_is_not_repeated_and_bad_files_are_reported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "start", pytest.fail)
    sources = stages.Sources(tmp_path, ())
    with pytest.raises(ImageError, match="missing"):
        budget.train_within(sources, 1.0, None, tmp_path / "missing.jpg")
    (tmp_path / "scores.json").write_text("{}")
    assert budget.train_within(sources, 1.0, None, tmp_path / "missing.jpg") == tmp_path / "bundle"


def test_sight_without_a_checkpoint_has_no_score(tmp_path: Path) -> None:
    root, start = annotated(tmp_path / "photos"), tmp_path / "start"
    model = Molmo(CONFIG).init_weights(generator=torch.Generator().manual_seed(0))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", start)
    with pytest.raises(NotTrainedError, match='no checkpoint of the stage "sight"'):
        sight.score(start, [root], tmp_path / "sight", sight.RECIPE, tmp_path / "detector")


def test_answers_begin_with_the_latest_sight_until_they_have_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = annotated(tmp_path / "photos"), tmp_path / "run"
    made: list[Path] = []
    monkeypatch.setattr(pointing, "add_point_head", lambda *given: made.append(given[-1]))
    monkeypatch.setattr(answers, "train", lambda start, *_: start)
    recipe, sources = stages.recipe_of("answers"), stages.Sources(run, (root,))
    for _ in range(2):
        assert stages.answers(sources, recipe) == run / "answers" / "start"
    assert made == [run / "answers" / "start"] * 2
    (run / "answers" / "checkpoints" / "step-00000100").mkdir(parents=True)
    assert stages.answers(sources, recipe) == run / "answers" / "start"
    assert len(made) == 2


def test_the_head_needs_a_model_and_takes_the_last(tmp_path: Path) -> None:
    sources = stages.Sources(tmp_path, ())
    with pytest.raises(NotTrainedError, match="run one of them first"):
        stages.before_head(sources)
    for stage in ("answers", "student"):
        (tmp_path / stage / "model").mkdir(parents=True)
        assert stages.before_head(sources) == tmp_path / stage / "model"


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ([], ["run", "photos", "hours", "vit", "lm", "detector"]),
        (["--hours", "1", "--run", "r", "--photos", "p", "--vit", "v"], ["lm", "detector"]),
        (["sight", "--run", "r"], ["photos"]),
        (["score-sight", "--run", "r", "--photos", "p"], ["detector"]),
        (["head", "--run", "r", "--photos", "p"], ["detector"]),
        (["score-answers", "--sprites", "s"], []),
    ],
)
def test_the_command_says_what_a_stage_needs(line: list[str], missing: list[str]) -> None:
    args = parser().parse_args(line)
    assert [name for name in required(args) if not getattr(args, name)] == missing


@pytest.mark.parametrize(
    ("line", "left"),
    [
        (["--hours", "1", "--steps", "3", "--points", "digits"], ["points", "steps"]),
        (["student", "--points", "digits"], ["points"]),
        (["answers", "--points", "digits", "--steps", "3"], []),
        (["sight", "--hours", "1"], ["hours"]),
        (["sight", "--sprites", "s", "--vit", "v"], ["vit", "sprites"]),
        (["score-answers", "--sprites", "s", "--scenes", "5"], []),
    ],
)
def test_options_of_other_stages_are_refused(line: list[str], left: list[str]) -> None:
    assert unused(parser().parse_args(line)) == left


def test_curves_are_drawn_from_the_logs_of_a_run_that_was_killed_and_resumed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match=r"no stage has a log\.jsonl"):
        curves.draw(tmp_path)
    log = [{"step": step, "heat_map_loss": loss} for step, loss in ((20, 5.0), (40, 4.0), (60, 9.0))]
    again = [{"step": 40, "note": "resumed"}, {"step": 60, "heat_map_loss": 3.0}]
    measured = {"step": 60, "validation_loss": 0.0, "validation_heat_map_loss": 3.5}
    (tmp_path / "sight").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in log) + '{"step": 60, "grou\n'
    (tmp_path / "sight" / "log.jsonl").write_text(
        text + "".join(json.dumps(line) + "\n" for line in [*again, measured])
    )
    lines = curves.read_log(tmp_path / "sight")
    assert curves.curve(lines, "heat_map_loss") == curves.Curve((20, 40, 60), (5.0, 4.0, 3.0))
    assert curves.curve(lines, "heat_map_loss").smoothed().values == (5.0, 4.5, 4.0)
    assert curves.curve(lines, "validation_heat_map_loss") == curves.Curve((60,), (3.5,))
    drawn = curves.draw(tmp_path).read_text()
    assert "heat maps" in drawn
    assert "answer tokens" not in drawn, "a stage that has not begun"

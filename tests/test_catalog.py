"""Data sets by name from one folder: copies, shared copies, pictures by URL, and missing sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo_edge.data.catalog import CatalogError, at_hand, copy_of, fetch_pictures, in_mixture, open_sets
from molmo_edge.data.downloads import MANIFEST, OK
from molmo_edge.training.recipe import CAPTION, MULTITASK


def write_rows(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    points = []
    for i in range(30):
        (tmp_path / "pixmo-points").mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (i, 0, 0)).save(tmp_path / "pixmo-points" / f"{i}.png")
        method = "pointing" if i % 2 else "counting"
        points.append(
            {"image": f"{i}.png", "label": "cup", "points": [{"x": i, "y": 5}], "count": 1, "collection_method": method}
        )
    write_rows(tmp_path / "pixmo-points", points)
    write_rows(
        tmp_path / "tally_qa",
        [{"image": str(tmp_path / "pixmo-points" / "3.png"), "questions": [{"question": "How many?", "answer": 2}]}],
    )
    return tmp_path


def test_sets_of_one_hub_repository_share_a_copy(data: Path) -> None:
    names = ["pixmo_points", "pixmo_points_counting", "tally_qa"]
    assert copy_of("pixmo_points", data) == copy_of("pixmo_points_high_freq_counting", data) == data / "pixmo-points"
    opened = open_sets(names, data)
    assert [each.name for each in opened] == names
    example = opened[0].example(0, np.random.default_rng(0))
    assert example.annotations[0].style == "pointing"
    assert opened[1].example(0, np.random.default_rng(0)).annotations[0].style == "point_count"
    (annotation,) = opened[2].example(0, np.random.default_rng(0)).annotations
    assert annotation.messages == ("How many?", "2")


def test_a_mixture_is_taken_as_far_as_it_is_at_hand(data: Path) -> None:
    here = at_hand(MULTITASK.mixture, data)
    assert here == ["tally_qa", *(n for n in in_mixture(MULTITASK.mixture) if n.startswith("pixmo_points"))]
    assert at_hand(CAPTION.mixture, data) == []


def test_what_is_missing_is_said(data: Path) -> None:
    with pytest.raises(CatalogError, match="no copies of pixmo_cap, doc_qa"):
        open_sets(["pixmo_cap", "pixmo_points", "doc_qa"], data)
    with pytest.raises(CatalogError, match="unknown data sets: nonsense"):
        open_sets(["nonsense"], data)
    with pytest.raises(CatalogError, match="tally_qa have no pictures to download"):
        fetch_pictures(["tally_qa"], data, jobs=1, retry_failed=False, progress=None)


def test_pictures_that_judge_pointing_are_not_trained_on(data: Path) -> None:
    urls = [f"http://localhost/{i}.png" for i in range(40)]
    cell = {"image_sha256": "ab" * 32, "label": "cup", "points": [], "count": 0, "collection_method": "pointing"}
    write_rows(data / "pixmo-points", [{"image_url": url} | cell for url in urls])
    images, lines = data / "images", []
    images.mkdir()
    for i, url in enumerate(urls):
        Image.new("RGB", (9, 9)).save(images / f"{i}", "PNG")
        lines.append(json.dumps({"url": url, "outcome": OK, "file": f"{i}", "sha256": "ab" * 32}))
    (images / MANIFEST).write_text("\n".join(lines))
    (every,) = open_sets(["pixmo_points"], data)
    write_rows(data / "pixmo-points-eval", [{"image_url": url} for url in urls[:10]])
    (fewer,) = open_sets(["pixmo_points"], data)
    assert len(fewer) < len(every)
    shown = {Path(fewer.example(i, np.random.default_rng(0)).image).name for i in range(len(fewer))}
    assert not shown & {str(i) for i in range(10)}

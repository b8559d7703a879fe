"""The example programs run on nano, and examples/README.md lists them all."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from molmo_edge import Molmo

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
COFFEE = EXAMPLES / "coffee.jpg"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="needs the source tree")


def run(folder: Path, *command: object) -> str:
    """Run Python in `folder`, and return what it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=folder, env=env, input="", capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def notebook_code() -> str:
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "clear the outputs"
    return "\n".join("".join(cell["source"]) for cell in cells)


def test_the_table_lists_every_file() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = [
        file for file in EXAMPLES.iterdir() if file.name != "README.md" and file.suffix in (".py", ".ipynb", ".jpg")
    ]
    assert len(files) >= 10
    for file in files:
        assert f"`{file.name}`" in table, file.name


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_every_example_says_how_to_run_it(file: Path) -> None:
    module = compile(file.read_text(encoding="utf-8"), file.name, "exec")
    assert f"python examples/{file.name}" in (module.co_consts[0] or "")


@pytest.mark.parametrize("name", sorted(file.stem for file in EXAMPLES.glob("*.py")))
def test_no_example_hides_a_package(name: str) -> None:
    """The folder of a script comes first in its sys.path: a click.py would break every script that imports typer."""
    assert importlib.util.find_spec(name) is None


@contextlib.contextmanager
def serving(molmo: Molmo) -> Iterator[int]:
    """Serve the app of fastapi_app.py on a free port."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    app = runpy.run_path(str(EXAMPLES / "fastapi_app.py"))["create_app"](molmo)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            yield sock.getsockname()[1]  # the socket listens already: requests wait for the server
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


def test_the_web_service_answers_as_the_sdk_does() -> None:
    pytest.importorskip("fastapi")
    from serving import send

    photo = COFFEE.read_bytes()
    raw = {"Content-Type": "application/octet-stream"}
    with Molmo(max_crops=1) as molmo, serving(molmo) as port:
        expected = molmo.point(photo, "cup")
        reply = send(port, "/point?label=cup", photo, headers=raw)
        assert reply.status == 200, reply.body
        assert reply.json["text"] == expected.text
        assert [(p["x"], p["y"]) for p in reply.json["points"]] == expected.pixels()
        streamed = send(port, "/ask?question=Point%20to%20the%20cup.", photo, headers=raw)
        assert streamed.body.decode() == expected.text
        assert send(port, "/point?label=cup", b"not a photo", headers=raw).status == 400
        assert send(port, "/ask?question=Why", b"not a photo", headers=raw).status == 400
        assert send(port, "/ask?question=", photo, headers=raw).status == 400
        assert send(port, "/point?label=cup", bytes(20_000_001), headers=raw).status == 413


def test_the_camera_loop_on_a_video_file(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    frame = cv2.imread(str(COFFEE))
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, frame.shape[1::-1])
    for _ in range(3):
        writer.write(frame)
    writer.release()
    loop = ("--frames", 2, "--save", tmp_path / "frames")
    lines = run(tmp_path, EXAMPLES / "webcam.py", "--source", tmp_path / "clip.avi", *loop).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["frame 1", "frame 2"]
    assert all(re.search(r"\(\d+, \d+\)", line) for line in lines)
    assert sorted(file.name for file in (tmp_path / "frames").iterdir()) == ["00001.jpg", "00002.jpg"]
    assert cv2.imread(str(tmp_path / "frames" / "00001.jpg")).shape == frame.shape


@pytest.mark.slow
def test_the_camera_loop_without_a_camera(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    lines = run(tmp_path, EXAMPLES / "webcam.py", "--source", 99, "--save", "frames").splitlines()
    assert lines[0] == "camera 99 cannot be opened; using coffee.jpg"
    assert [line.partition(":")[0] for line in lines[1:]] == ["frame 1"]


def test_where_it_would_click(tmp_path: Path) -> None:
    printed = run(tmp_path, EXAMPLES / "screenshot.py", "cup", "--image", COFFEE, "--save", "found.png")
    found = re.match(r"would click at \((\d+), (\d+)\) of 600x400: ", printed)
    assert found, printed
    with Molmo() as molmo:
        assert (int(found[1]), int(found[2])) == tuple(round(v) for v in molmo.point(COFFEE, "cup").pixels()[0])
    assert (tmp_path / "found.png").is_file()


def test_a_folder_to_csv(tmp_path: Path) -> None:
    """The command that examples/README.md shows."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "coffee.jpg").write_bytes(COFFEE.read_bytes())
    (command,) = re.findall(r"^molmo-edge (point .* --csv .*)$", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    run(tmp_path, "-m", "molmo_edge", *command.split())
    with (tmp_path / "cups.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all("coffee.jpg" in row["image"] for row in rows)


def test_the_notebook(tmp_path: Path) -> None:
    (tmp_path / "coffee.jpg").write_bytes(COFFEE.read_bytes())
    (tmp_path / "cells.py").write_text(notebook_code(), encoding="utf-8")
    printed = run(tmp_path, tmp_path / "cells.py")
    assert re.search(r"^cup: \d+, first token after \d+ ms$", printed, re.MULTILINE)
    assert "Count the cups." in printed


@pytest.mark.parametrize("name", ["ask", "chat", "scene"])
def test_the_short_examples(name: str, tmp_path: Path) -> None:
    assert run(tmp_path, EXAMPLES / f"{name}.py").strip()


@pytest.mark.slow
def test_fine_tuning_nano(tmp_path: Path) -> None:
    for package in ("torch", "safetensors"):
        pytest.importorskip(package)
    short = ("--steps", 2, "--workers", 0, "--device", "cpu")
    printed = run(tmp_path, EXAMPLES / "finetune.py", "--", *short)
    assert re.search(r"^before: spoon: .*^after: spoon: ", printed, re.MULTILINE | re.DOTALL)
    with (tmp_path / "run-points" / "points.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 5
    start, model = tmp_path / "run-start", tmp_path / "run" / "model"
    assert (start / "config.json").read_text() == (model / "config.json").read_text()
    assert (start / "model.safetensors").read_bytes() != (model / "model.safetensors").read_bytes()

"""The command line: stdout and stderr, exit statuses, and one-line errors for bad input."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import molmo_edge
from molmo_edge.cli.output import OutputError
from molmo_edge.cli.saving import check_save, save_image

HOME = Path(molmo_edge.__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(HOME)}
COMMAND = [sys.executable, "-m", "molmo_edge.cli"]


Cli = Callable[..., tuple[int, str, str]]  # the fixture of conftest.py


@pytest.fixture
def photo(golden: Path) -> Path:
    return golden / "astronaut.png"


def expected(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "molmoe" / "expected.json").read_text())["square"]


def test_ask_json_is_the_golden_answer_and_nothing_else(cli: Cli, tiny_bundle: Path, golden: Path, photo: Path) -> None:
    case = expected(golden)
    status, out, err = cli("ask", photo, case["question"], "-m", tiny_bundle, "--json", "--max-new-tokens", 24)
    assert status == 0
    answer = json.loads(out)
    assert answer["token_ids"] == case["generated_ids"]
    assert answer["usage"]["tokens"]["image"] + answer["usage"]["tokens"]["prompt"] == case["n_tokens"]
    assert answer["saved"] is None
    assert "cut off after 24 tokens" in err


@pytest.mark.parametrize("command", [("point", "dog"), ("count", "cups"), ("caption",)])
def test_the_verbs_answer(cli: Cli, tiny_bundle: Path, photo: Path, command: tuple[str, ...]) -> None:
    verb, *label = command
    status, out, err = cli(verb, photo, *label, "-m", tiny_bundle, "--max-new-tokens", 4, "--max-crops", 1, "-q")
    assert (status, err) == (0, "")
    assert out.strip()


def test_saying_the_points(cli: Cli, tmp_path: Path, photo: Path, saying: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'Here: <points x1="25.0" y1="50.0" x2="75.0" y2="50.0" alt="dogs">dogs</points>.'
    monkeypatch.setattr("molmo_edge.molmo.Molmo", lambda *_, **__: saying(text))
    save = tmp_path / "out.png"
    status, out, err = cli("point", photo, "dogs", "--save", save)
    assert status == 0
    assert out.splitlines() == ["Here: dogs.", "   1  x    128  y    256  dogs", "   2  x    384  y    256  dogs"]
    assert f"wrote {save}" in err
    marked = np.asarray(Image.open(save)).astype(int) - np.asarray(Image.open(photo).convert("RGB"))
    assert abs(marked)[250:262, 120:136].any()
    assert abs(marked)[250:262, 376:392].any()
    assert not abs(marked)[:100].any()
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_saved_in_the_format_of_its_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    save_image(Image.new("RGB", (8, 8)), path)
    with Image.open(path) as image:
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.webp"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="could not be written"):
        save_image(Image.new("RGB", (20000, 1)), path)  # WebP holds 16383
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_save_is_checked_before_any_work(cli: Cli, tmp_path: Path, photo: Path) -> None:
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for path, says in (
        (tmp_path / "out.gif", "must end in"),
        (tmp_path / "out", "must end in"),
        (tmp_path / "no" / "out.png", "there is no directory"),
        (folder, "is a directory"),
        (photo, "overwrite the photo"),
    ):
        status, out, err = cli("ask", photo, "What?", "-m", "/no/model", "--save", path)
        assert (status, out) == (2, "")
        assert says in err
        assert "Traceback" not in err
    check_save(None, photo)


def png_bomb(path: Path) -> None:
    """30,000 x 30,000 pixels that take a few hundred KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + 30_000 // 8)
    rows = b"".join([packer.compress(row * 1000) for _ in range(30)]) + packer.flush()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def bad_images(directory: Path) -> dict[str, Path]:
    jpeg = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8)
    Image.fromarray(noise).save(jpeg, "JPEG")
    paths = {name: directory / name for name in ("missing.jpg", "text.jpg", "cut.jpg", "empty.jpg", "bomb.png")}
    paths["text.jpg"].write_text("This is not a picture.\n" * 20)
    paths["cut.jpg"].write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    paths["empty.jpg"].touch()
    png_bomb(paths["bomb.png"])
    return paths


@pytest.mark.parametrize("name", ["missing.jpg", "text.jpg", "cut.jpg", "empty.jpg", "bomb.png"])
def test_bad_images_are_one_line(cli: Cli, tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    image = bad_images(tmp_path)[name]
    save = tmp_path / "out.png"
    before = set(tmp_path.iterdir())
    status, out, err = cli("ask", image, "What?", "-m", tiny_bundle, "--save", save, "--json")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("molmo-edge: ")
    assert image.name in err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("question", ["", "  ", "x" * 100_000, "\udcff"])
@pytest.mark.parametrize("verb", ["ask", "point", "count"])
def test_bad_questions_are_one_line(cli: Cli, tiny_bundle: Path, photo: Path, verb: str, question: str) -> None:
    status, out, err = cli(verb, photo, question, "-m", tiny_bundle)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert len(err) < 300
    assert err.startswith("molmo-edge: ")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("ask",),
        ("ask", "a.png"),
        ("ask", "a.png", "What?", "--max-crops", "-1"),
        ("ask", "a.png", "What?", "--max-new-tokens", "0"),
        ("ask", "a.png", "What?", "--temperature", "hot"),
        ("ask", "a.png", "What?", "--seed", "-3"),
        ("ask", "a.png", "What?", "--flux"),
        ("ask", "a.png", "What?", "--device", "tpu"),
        ("chat", "a.png", "--device", "gpu"),
        ("ask", "a.png", "What?", "--save", "a.gif"),
        ("frobnicate",),
        ("export", "checkpoint"),
        ("export", "checkpoint", "--out", "x", "--precision", "decoder="),
    ],
)
def test_wrong_use_is_status_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    status, _, err = cli(*arguments)
    assert status == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "/no/such/model"), "there is no directory"),
        (("--device", "cuda"), "no CUDAExecutionProvider"),
    ],
)
def test_failures_are_status_1(cli: Cli, tiny_bundle: Path, photo: Path, arguments: tuple[str, ...], says: str) -> None:
    status, out, err = cli("ask", photo, "What?", "-m", tiny_bundle, *arguments)
    assert (status, out) == (1, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_what_the_system_refuses_is_one_line(cli: Cli, golden: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    status, out, err = cli("export", golden / "molmoe", "--out", in_the_way / "bundle")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("molmo-edge: ")
    assert str(in_the_way) in err


@pytest.mark.parametrize("command", [("ask", "What?"), ("chat",)])
def test_a_photo_that_is_no_file_opens_no_model(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr("molmo_edge.molmo.Molmo", lambda *_, **__: pytest.fail("a model was opened"))
    verb, *question = command
    status, out, err = cli(verb, tmp_path / "missing.jpg", *question)
    assert (status, out) == (1, "")
    assert "there is no image" in err


@pytest.mark.parametrize("command", [("ask", "What?"), ("chat",)])
def test_a_photo_that_cannot_be_read_closes_the_model(
    cli: Cli, tmp_path: Path, saying: Any, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    molmo = saying("ok")
    monkeypatch.setattr("molmo_edge.molmo.Molmo", lambda *_, **__: molmo)
    verb, *question = command
    empty = tmp_path / "empty.jpg"
    empty.touch()
    assert cli(verb, empty, *question)[0] == 1
    assert molmo.fake.closed


def test_debug_shows_the_traceback(photo: Path) -> None:
    arguments = ["--debug", "ask", str(photo), "What?", "--model", "/no/such/model"]
    run = subprocess.run([*COMMAND, *arguments], env=ENV, capture_output=True, text=True)
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "BundleError" in run.stderr


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version") == (0, f"molmo-edge {molmo_edge.__version__}\n", "")
    status, out, _ = cli("--help")
    assert status == 0
    for command in ("ask", "point", "count", "caption", "chat", "verify", "doctor", "bench", "export"):
        assert f"  {command} " in out
        assert cli(command, "--help")[0] == 0
    assert "--install-completion" in out


def test_verify(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    status, out, _ = cli("verify", tiny_bundle)
    assert status == 0
    assert "answered with the same tokens" in out
    status, out, _ = cli("verify", tiny_bundle, "--json")
    assert json.loads(out)["passed"] is True
    status, out, err = cli("verify", tmp_path)
    assert (status, out) == (1, "")
    assert "contains neither a bundle" in err


def test_doctor(cli: Cli) -> None:
    status, out, _ = cli("doctor", "--json")
    facts = json.loads(out)
    assert status == bool(facts["problems"])
    assert "CPUExecutionProvider" in facts["onnxruntime_providers"]
    assert facts["versions"]["numpy"]
    assert isinstance(facts["extras"]["torch"], bool)
    assert cli("doctor")[1].startswith("molmo edge")


def test_bench_times_every_stage_on_both_engines(cli: Cli, tiny_bundle: Path, golden: Path) -> None:
    pytest.importorskip("torch")
    arguments = ("bench", "-m", tiny_bundle, "--repeat", 1, "--threads", 1, "--max-new-tokens", 3, "--max-crops", 1)
    for weights in ((), ("--checkpoint", golden / "molmoe")):
        status, out, _ = cli(*arguments, *weights, "--json")
        assert status == 0
        ours, torch = json.loads(out)["timings"]
        assert (ours["engine"], torch["engine"]) == ("onnxruntime", "pytorch fp32")
        for timing in (ours, torch):
            assert min(timing[stage] for stage in ("cold", "preprocess", "vision", "prefill", "decode")) > 0
        assert ours["prompt_tokens"] == torch["prompt_tokens"]
        assert ours["generated"] == torch["generated"]
    status, out, _ = cli(*arguments)
    assert status == 0
    assert "preprocessing" in out
    assert "pytorch" in out
    assert cli(*arguments, "--checkpoint", "/no/such/checkpoint")[0] == 1


def test_export_then_ask(cli: Cli, golden: Path, photo: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    out_dir = tmp_path / "bundle"
    precision = "vision_encoder=q8,embed_tokens=int8"
    status, out, err = cli("export", golden / "molmoe", "--out", out_dir, "--precision", precision, "--json")
    assert status == 0
    assert json.loads(out)["manifest"]["components"]["vision_encoder"]["precision"] == "q8"
    assert cli("ask", photo, "What?", "-m", out_dir, "--max-new-tokens", 2)[0] == 0
    status, out, err = cli("export", golden / "molmoe", "--out", out_dir)
    assert (status, out) == (1, "")
    assert "exists already" in err


def test_chat(tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    lines = f"\nWhat?\n/save {tmp_path / 'a.gif'}\n/save {tmp_path / 'a.png'}\n{'x' * 30000}\nWhat else?\n/new\n/quit\n"
    run = subprocess.run(
        [*COMMAND, "chat", str(photo), "-m", str(tiny_bundle), "--max-new-tokens", "3"],
        input=lines,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr  # a question failed, and stdin is not a terminal
    assert len(run.stdout.splitlines()) == 2
    assert "must end in" in run.stderr
    assert "wrote" in run.stderr
    assert "shorten it" in run.stderr
    assert (tmp_path / "a.png").exists()


def test_chat_survives_bytes_that_are_no_text(tiny_bundle: Path, photo: Path) -> None:
    run = subprocess.run(
        [*COMMAND, "chat", str(photo), "-m", str(tiny_bundle), "--max-new-tokens", "3"],
        input=b"Wh\xffat?\nWhat?\n",
        env={**ENV, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2
    assert b"Traceback" not in run.stderr


def test_a_closed_pipe_is_quiet(tiny_bundle: Path, photo: Path) -> None:
    command = [*COMMAND, "ask", str(photo), "What?", "-m", str(tiny_bundle), "-q", "--max-new-tokens", "3"]
    read, write = os.pipe()
    os.close(read)  # closes the reading end
    run = subprocess.run(command, env=ENV, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert run.returncode == 1
    assert run.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent differently there")
def test_an_interrupt_is_quiet(tiny_bundle: Path, photo: Path) -> None:
    command = [*COMMAND, "chat", str(photo), "-m", str(tiny_bundle)]
    process = subprocess.Popen(command, env=ENV, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stderr is not None
    assert "a question" in process.stderr.readline()  # it is ready for input
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert process.stderr.read() == ""

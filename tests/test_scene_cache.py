"""The cache of scenes on disk: equal answers without vision, a limit on its size, and processes that share it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge import Answer, LlamaOptions, Molmo
from molmo_edge.sdk.scene_file import SceneFileError
from molmo_edge.sdk.scene_store import SceneCacheError, SceneStore

RNG = np.random.default_rng(5)
PHOTOS = [RNG.integers(0, 255, (60, 80, 3), np.uint8) for _ in range(3)]
QUESTION = "Point to the helmet."

Cli = Callable[..., tuple[int, str, str]]


def cached(tiny_bundle: Path, folder: Path, **options: Any) -> Molmo:
    return Molmo(tiny_bundle, **({"threads": 1, "max_crops": 0, "scene_cache": folder} | options))


def ask(molmo: Molmo, image: Any = PHOTOS[0]) -> Answer:
    return molmo.ask(image, QUESTION, max_new_tokens=5)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.scene"))


def test_the_second_question_about_a_picture_skips_vision(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    with Molmo(tiny_bundle, threads=1, max_crops=0) as molmo:
        expected = ask(molmo)
    with cached(tiny_bundle, folder) as molmo:
        first, second = ask(molmo), ask(molmo)
    assert first == second == expected
    assert first.usage.seconds.vision > 0 == second.usage.seconds.vision
    assert first.usage.tokens.prefilled == expected.usage.tokens.prefilled
    assert second.usage.tokens.prefilled == second.usage.tokens.prompt
    assert len(files(folder)) == 1
    with cached(tiny_bundle, folder) as molmo:  # another process, a file with the same pixels
        Image.fromarray(PHOTOS[0]).save(tmp_path / "photo.png")
        third = ask(molmo, tmp_path / "photo.png")
        assert third == expected
        assert third.usage.seconds.vision == 0
        chat = molmo.chat(PHOTOS[0])
        assert chat.ask(QUESTION, max_new_tokens=5).token_ids == expected.token_ids
        assert molmo.encode(PHOTOS[0]).seconds.vision == 0
        batch = molmo.point_batch([PHOTOS[0]], "cup", max_new_tokens=2, errors="raise")
        assert batch[0].usage.seconds.vision == 0
    assert len(files(folder)) == 1


def test_other_pixels_crops_and_models_have_their_own_scenes(tiny_bundle: Path, tmp_path: Path) -> None:
    changed = PHOTOS[0].copy()
    changed[0, 0, 0] ^= 1
    with cached(tiny_bundle, tmp_path) as molmo:
        for image in (PHOTOS[0], changed, PHOTOS[0].reshape(80, 60, 3)):
            assert ask(molmo, image).usage.seconds.vision > 0
    with cached(tiny_bundle, tmp_path, max_crops=1) as molmo:
        assert ask(molmo).usage.seconds.vision > 0
    assert len(files(tmp_path)) == 4
    pytest.importorskip("torch")
    checkpoint = Path(__file__).parent / "golden" / "molmoe"
    with cached(checkpoint, tmp_path) as molmo:
        assert ask(molmo).usage.seconds.vision > 0


def test_videos_and_several_images(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from molmo_edge import Video

    model = Path(__file__).parent / "golden2" / "molmo_point"
    with cached(model, tmp_path, max_crops=1) as molmo:
        for shown in (PHOTOS[:2], Video(PHOTOS, fps=1.0)):
            first, second = ask(molmo, shown), ask(molmo, shown)
            assert first == second
            assert first.usage.seconds.vision > 0 == second.usage.seconds.vision
        assert ask(molmo, PHOTOS[1::-1]).usage.seconds.vision > 0  # another order
        assert ask(molmo, Video(PHOTOS, fps=0.5)).usage.seconds.vision > 0  # other times


def test_the_scenes_that_were_not_used_for_longest_are_removed(tiny_bundle: Path, tmp_path: Path) -> None:
    with cached(tiny_bundle, tmp_path) as molmo:
        ask(molmo, PHOTOS[0])
    (only,) = tmp_path.glob("*.scene")
    with cached(tiny_bundle, tmp_path, scene_cache_size=int(only.stat().st_size * 2.5)) as molmo:
        ask(molmo, PHOTOS[1])
        for path in tmp_path.glob("*.scene"):
            os.utime(path, (1, 1) if path != only else (2, 2))
        ask(molmo, PHOTOS[0])  # used again
        ask(molmo, PHOTOS[2])
        assert len(files(tmp_path)) == 2
        assert only.name in files(tmp_path)
        assert ask(molmo, PHOTOS[0]).usage.seconds.vision == 0
    with cached(tiny_bundle, tmp_path, scene_cache_size=1000) as molmo:  # less than one scene
        assert ask(molmo, PHOTOS[1]).usage.seconds.vision > 0
    assert files(tmp_path) == []


def test_a_damaged_file_is_replaced(tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cached(tiny_bundle, tmp_path) as molmo:
        expected = ask(molmo)
        (path,) = tmp_path.glob("*.scene")
        contents = path.read_bytes()
        path.write_bytes(contents[:-1000])
        assert ask(molmo) == expected
        assert path.read_bytes() == contents
    assert "truncated" in caplog.text


def test_a_file_that_cannot_be_read_now_stays(tmp_path: Path) -> None:
    store = SceneStore(tmp_path, 100)
    store.put("a", lambda path: path.write_bytes(b"scene") and None)

    def fail(path: Path) -> bytes:
        raise SceneFileError(f"{path} cannot be read: Too many open files")

    assert store.get("a", fail) is None
    assert store.get("a", Path.read_bytes) == b"scene"


def settings_of(engine: str) -> list[Callable[[Path], Molmo]]:
    """Opens one model in ways whose keys and values cannot be exchanged, with a folder for its scenes."""
    if engine == "pytorch":
        pytest.importorskip("torch")
        checkpoint = Path(__file__).parent / "golden" / "molmoe"
        return [partial(cached, checkpoint, precision=precision) for precision in ("fp32", "bf16")]
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from exported import EXACT, gguf_bundle

    options = EXACT, LlamaOptions(cache="f16", flash_attention=False), LlamaOptions(cache="f16", flash_attention=True)
    return [partial(cached, gguf_bundle("molmoe", "f32"), engine_options=one) for one in options]


@pytest.mark.parametrize("engine", ["pytorch", "llama.cpp"])
def test_settings_of_one_model_keep_their_own_scenes(
    engine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(engine)
    for again in (False, True):
        for opened in settings:
            with opened(tmp_path) as molmo:
                assert (ask(molmo).usage.seconds.vision == 0) is again
    assert len(files(tmp_path)) == len(settings)
    assert not caplog.records


def test_a_folder_that_cannot_be_written_costs_no_answer(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cached(tiny_bundle, tmp_path / "cache") as molmo:
        expected = ask(molmo, PHOTOS[1])

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("molmo_edge.system.files.os.replace", full)
        assert ask(molmo, PHOTOS[0]).complete == expected.complete
    assert "No space left on device" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.endswith(".part")] == []


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    store = SceneStore(tmp_path, 100)
    old, new = tmp_path / ".a.scene.1.2.part", tmp_path / ".b.scene.1.2.part"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    store.put("c", lambda path: path.write_bytes(b"scene") and None)
    assert not old.exists()
    assert new.exists()
    assert store.get("c", Path.read_bytes) == b"scene"
    assert store.get("d", Path.read_bytes) is None


@pytest.mark.parametrize(("size", "says"), [(0, "at least 1 byte"), ("x", "2GB or 500MB"), (None, "2GB or 500MB")])
def test_wrong_sizes_and_folders_are_refused(size: Any, says: str, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(SceneCacheError, match=says):
        cached(tiny_bundle, tmp_path, scene_cache_size=size)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SceneCacheError, match="cannot be used as a folder"):
        cached(tiny_bundle, tmp_path / "file")


def test_processes_share_a_cache(tiny_bundle: Path, tmp_path: Path) -> None:
    for number, photo in enumerate(PHOTOS):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    code = (
        "import sys; from molmo_edge import Molmo\n"
        "molmo = Molmo(sys.argv[1], threads=1, max_crops=0, scene_cache=sys.argv[2], scene_cache_size=700_000)\n"
        "for _ in range(6):\n"
        "  for n in range(3): print(*molmo.ask(f'{sys.argv[3]}/{n}.png', sys.argv[4], max_new_tokens=3).token_ids)\n"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle), str(tmp_path / "cache"), str(tmp_path), QUESTION]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in running]
    with Molmo(tiny_bundle, threads=1, max_crops=0) as molmo:
        answers = [molmo.ask(photo, QUESTION, max_new_tokens=3).token_ids for photo in PHOTOS]
    expected = "".join(f"{' '.join(map(str, ids))}\n" for ids in answers) * 6
    assert [output for output, _ in outputs] == [expected, expected], outputs


def test_the_command_line(cli: Cli, tiny_bundle: Path, golden: Path, tmp_path: Path) -> None:
    command = ("ask", golden / "astronaut.png", "What?", "-m", tiny_bundle, "--max-crops", "0", "--max-new-tokens", "3")
    plain = cli(*command)
    assert cli(*command, "--scene-cache", tmp_path)[1] == plain[1]
    assert len(files(tmp_path)) == 1
    assert cli(*command, "--scene-cache", tmp_path, "--scene-cache-size", "1GB")[1] == plain[1]
    status, _, error = cli(*command, "--scene-cache", tmp_path, "--scene-cache-size", "many")
    assert status == 2
    assert "not a size such as" in error

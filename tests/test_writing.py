"""Atomic writes, and errors that name the requested file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from molmo_edge.cli.output import OutputError
from molmo_edge.cli.saving import save_image
from molmo_edge.system.files import atomic_write, name_os_errors, replaced_directory
from molmo_edge.system.scratch import work_folder


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with atomic_write(path) as part:
        part.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["a.txt"]

    def fail() -> None:
        with atomic_write(path) as part:
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for content in ("first", "second"):
        (tmp_path / "model.part").mkdir()
        (tmp_path / "model.part" / "left").write_text("by a killed process")
        with replaced_directory(path) as part:
            (part / content).write_text(content)
            assert path.exists() == (content == "second"), "the one before stays until the block ends"
        assert os.listdir(path) == [content]

    def fail() -> None:
        with replaced_directory(path) as part:
            (part / "half").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(path) == ["second"]
    assert os.listdir(tmp_path) == ["model"]


def test_errors_name_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "no-folder" / "a.txt"
    with pytest.raises(FileNotFoundError) as error, atomic_write(path) as part:
        part.write_text("x")
    assert error.value.filename == str(path)
    with pytest.raises(OutputError) as refused:
        save_image(Image.new("RGB", (2, 2)), path.with_suffix(".png"))
    assert ".part" not in str(refused.value)
    assert str(path.with_suffix(".png")) in str(refused.value)
    with pytest.raises(FileNotFoundError) as error, work_folder(path):
        pass
    assert error.value.filename == str(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left") as error,
        name_os_errors(tmp_path / "a"),
        open("/dev/full", "w") as file,
    ):
        file.write("x")
    assert error.value.filename == str(tmp_path / "a")


def test_an_error_of_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, name_os_errors(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert error.value.filename == str(tmp_path / "b")

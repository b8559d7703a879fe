"""Models by name: short names, and the commands pull, list and rm, with a fake hub."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import Client, refused
from hub_server import Hub, serve

from molmo_edge.checkpoints.bundle import resolve_model
from molmo_edge.checkpoints.local_models import cached_models, models_in, remove_bundle
from molmo_edge.checkpoints.manifest import BundleError
from molmo_edge.model_names import NAMED_MODELS, full_name, short_name
from molmo_edge.presets import PRESETS

HUB_ID = "allenai/MolmoE-1B-0924"


@pytest.fixture
def hub(tmp_path: Path, tiny_bundle: Path) -> Iterator[Hub]:
    with serve(Hub(HUB_ID, shutil.copytree(tiny_bundle, tmp_path / "served"))) as served:
        yield served


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def test_a_model_is_pulled_listed_and_removed_by_its_short_name(hub: Hub, client: Client, tmp_path: Path) -> None:
    tried = client("pull", "molmoe-1b", "--dry-run")
    assert hub.downloads == []
    assert f"{HUB_ID}: " in tried.stdout
    assert "MB to download to" in tried.stdout

    pulled = client("pull", "molmoe-1b")
    assert pulled.returncode == 0, pulled.stderr
    assert "MB to download to" in pulled.stderr
    assert Path(pulled.stdout.strip(), "molmo_edge.json").is_file()
    (entry,) = [one for one in listed(client, tmp_path) if one["name"] == HUB_ID]
    assert entry["short_name"] == "molmoe-1b"
    assert entry["kind"] == "bundle"
    on_disk = {p.stat().st_ino: p.stat().st_size for p in Path(entry["directory"]).rglob("*") if p.is_file()}
    assert entry["bytes"] == sum(on_disk.values())

    hub.downloads.clear()
    again = client.ask("--model", "molmoe-1b")  # the last --model counts
    assert again.returncode == 0, again.stderr
    assert hub.downloads == []
    assert "to download" not in again.stderr

    assert "confirm with --yes" in refused(client("rm", "molmoe-1b"))
    removed = client("rm", "molmoe-1b", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert HUB_ID not in [one["name"] for one in listed(client, tmp_path)]
    assert not Path(entry["directory"]).exists()


def listed(client: Client, folder: Path) -> list[dict[str, Any]]:
    process = client("list", str(folder), "--json")
    assert process.returncode == 0, process.stderr
    models: list[dict[str, Any]] = json.loads(process.stdout)["models"]
    return models


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("answer", ["n\n", "y\n"])
def test_a_terminal_is_asked_before_a_download(hub: Hub, client: Client, answer: str) -> None:
    """`pull` is the request itself; other commands ask."""
    main, terminal = pty.openpty()
    program = "from molmo_edge.cli import main; main(['verify', 'molmoe-1b'])"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=client.environment, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal
    )
    os.close(terminal)
    os.write(main, answer.encode())
    try:
        process.communicate(timeout=100)
        said = os.read(main, 100_000).decode()
    finally:
        process.kill()
        os.close(main)
    assert "MB to download to" in said
    if answer == "n\n":
        assert process.returncode == 1
        assert f"{HUB_ID} was not downloaded" in said
        assert hub.downloads == []
    else:
        assert process.returncode == 0
        assert hub.downloads != []


def test_a_directory_with_a_short_name_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bundle: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert full_name("molmoe-1b") == HUB_ID
    shutil.copytree(tiny_bundle, tmp_path / "molmoe-1b")
    assert full_name("molmoe-1b") == "molmoe-1b"
    assert resolve_model("molmoe-1b") == Path("molmoe-1b")


def test_a_misspelt_name_gets_a_suggestion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match='did you mean the model "molmo2-4b"'):
        resolve_model("Molmo2-4b")
    with pytest.raises(BundleError, match="nor a short name"):
        resolve_model("something")


def test_the_table_of_names_is_consistent() -> None:
    assert set(PRESETS) <= set(NAMED_MODELS)
    ids = [model.hub_id for model in NAMED_MODELS.values() if model.hub_id is not None]
    assert len(set(ids)) == len(ids)
    for model in NAMED_MODELS.values():
        assert model.hub_id is None or short_name(model.hub_id) == model.name
        assert model.license
        assert model.bases
        if model.name in PRESETS and model.download:  # in float32
            from molmo_edge.checkpoints.tensor_names import hub_shapes

            count = sum(_product(shape) for shape in hub_shapes(PRESETS[model.name]).values())
            assert model.download == pytest.approx(4 * count, rel=0.01)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def test_the_cache_lists_molmos_and_unfinished_downloads_only(tmp_path: Path) -> None:
    for name, kind in (("bert", "bert"), ("molmo", "molmo")):
        snapshot = tmp_path / f"models--someone--{name}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": kind}))
    blobs = tmp_path / "models--someone--stopped" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{'0' * 64}.part").write_bytes(b"12345")
    found = {model.name: model for model in cached_models(tmp_path)}
    assert {name: model.kind for name, model in found.items()} == {
        "someone/molmo": "checkpoint",
        "someone/stopped": "incomplete download",
    }
    assert found["someone/stopped"].bytes == 5
    assert cached_models(tmp_path / "nothing") == []


def test_only_the_files_of_a_bundle_are_removed(cli: Any, tmp_path: Path, tiny_bundle: Path) -> None:
    for name in ("alone", "shared"):
        shutil.copytree(tiny_bundle, tmp_path / name)
    (tmp_path / "shared" / "notes.txt").write_text("mine")
    assert {model.name for model in models_in(tmp_path)} == {str(tmp_path / "alone"), str(tmp_path / "shared")}
    remove_bundle(tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    status, _, err = cli("rm", tmp_path / "shared", "--yes")
    assert status == 0
    assert "not part of the bundle" in err
    assert [p.name for p in (tmp_path / "shared").rglob("*") if p.is_file()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["nano", "someone/nothing", "molmo-72b", "."])
def test_what_is_not_there_is_not_removed(cli: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = cli("rm", name, "--yes")
    assert status == 1
    assert "molmo-edge: " in err


def test_published_models_are_listed(cli: Any) -> None:
    status, out, _ = cli("list", "--all", "--json")
    assert status == 0
    assert [model["name"] for model in json.loads(out)["models"]] == list(NAMED_MODELS)
    status, out, _ = cli("list", "--all")
    assert "Tongyi Qianwen" in out

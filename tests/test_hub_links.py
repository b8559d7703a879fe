"""The hub's cache without symlinks: large files are stored once and downloaded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
from hub_client import Client, refused, with_large_weights
from hub_server import COMMIT, Hub, serve
from huggingface_hub import constants

WITHOUT = {"NO_SYMLINKS": "1"}
WEIGHTS = "pytorch_model.bin"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    directory = tmp_path / "served"
    directory.mkdir()
    with serve(Hub("someone/a-model", directory)) as served:
        with_large_weights(served)
        yield served


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def folder(client: Client) -> Path:
    return client.home / "hub" / "models--someone--a-model"


def on_disk(client: Client, size: int) -> list[Path]:
    """The files of `size` bytes in the cache, each listed once even if it has several names."""
    found = {p.stat().st_ino: p for p in client.home.rglob("*") if p.is_file() and not p.is_symlink()}
    return [p for p in found.values() if p.stat().st_size == size]


def fetched(client: Client, revision: str = "", **environment: str) -> Path:
    """The directory of the model."""
    run = client.fetch(revision, **environment)
    assert run.returncode == 0, run.stderr
    assert "symlinks" not in run.stderr
    return Path(run.stdout.strip())


@pytest.mark.parametrize(
    "how",
    [
        WITHOUT,
        pytest.param(
            {"HF_HUB_DISABLE_SYMLINKS": "1"},
            marks=pytest.mark.skipif(
                not hasattr(constants, "HF_HUB_DISABLE_SYMLINKS"), reason="older clients do not know the variable"
            ),
        ),
    ],
    ids=["none", "disabled"],
)
def test_large_files_lie_on_the_disk_once_and_are_fetched_once(hub: Hub, client: Client, how: dict[str, str]) -> None:
    size = (hub.directory / WEIGHTS).stat().st_size
    snapshot = folder(client) / "snapshots" / COMMIT
    # Space for one copy of the file and the spare space.
    assert fetched(client, **how, FREE=str(size + 510_000_000)) == snapshot
    assert not any(p.is_symlink() for p in client.home.rglob("*"))
    assert on_disk(client, size) == [snapshot / WEIGHTS]
    assert (snapshot / WEIGHTS).read_bytes() == (hub.directory / WEIGHTS).read_bytes()
    assert [file for file, _ in hub.downloads].count(WEIGHTS) == 1
    hub.downloads.clear()
    assert fetched(client, **how, FREE="0") == snapshot
    assert hub.downloads == [], "a second ask has downloaded something"
    assert fetched(client, **how, HF_HUB_OFFLINE="1") == snapshot
    assert on_disk(client, size) == [snapshot / WEIGHTS]
    asked = client.ask(**how)
    assert asked.returncode == 0
    assert len(json.loads(asked.stdout)["token_ids"]) == 2
    assert hub.downloads == []


def test_what_is_written_is_what_the_disk_check_counts(hub: Hub, client: Client) -> None:
    wanted = (WEIGHTS, "config.json", "preprocessor_config.json", "tokenizer.json")
    size = sum((hub.directory / name).stat().st_size for name in wanted)
    assert "needs 0.1 GB more" in refused(client.fetch(**WITHOUT, FREE=str(499_000_000 + size)))
    assert hub.downloads == []
    fetched(client, **WITHOUT, FREE=str(500_000_000 + size))
    written = sum(p.stat().st_size for p in folder(client).rglob("*") if p.is_file())
    assert size <= written < size + 10_000


def test_an_interrupted_download_goes_on_where_it_stopped(hub: Hub, client: Client) -> None:
    size = (hub.directory / WEIGHTS).stat().st_size
    hub.cut_after = 35_000_000
    assert "it resumes where it stopped" in refused(client.fetch(**WITHOUT, HF_HUB_DOWNLOAD_TIMEOUT="1"))
    hub.cut_after = None
    hub.downloads.clear()
    fetched(client, **WITHOUT, FREE="540000000")
    assert all(
        wanted and int(wanted[6:].split("-")[0]) >= 30_000_000 for file, wanted in hub.downloads if file == WEIGHTS
    )
    assert len(on_disk(client, size)) == 1
    assert not list(client.home.rglob("*.part"))


def test_what_an_older_version_left_under_its_hash_is_moved(hub: Hub, client: Client) -> None:
    data = (hub.directory / WEIGHTS).read_bytes()
    blob = folder(client) / "blobs" / hashlib.sha256(data).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)
    fetched(client, **WITHOUT, FREE="510000000")
    assert on_disk(client, len(data)) == [folder(client) / "snapshots" / COMMIT / WEIGHTS]
    assert WEIGHTS not in [file for file, _ in hub.downloads]


def test_a_new_commit_fetches_only_what_has_changed(hub: Hub, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without symlinks huggingface_hub does not reuse the files of other revisions."""
    size = (hub.directory / WEIGHTS).stat().st_size
    fetched(client, **WITHOUT)
    later = COMMIT[::-1]
    monkeypatch.setattr(hub_server, "COMMIT", later)
    config = hub.directory / "config.json"
    config.write_text(config.read_text() + "\n")
    hub.downloads.clear()
    assert fetched(client, **WITHOUT, FREE="510000000").name == later
    assert WEIGHTS not in [file for file, _ in hub.downloads]
    assert "config.json" in [file for file, _ in hub.downloads]
    for commit in (COMMIT, later):
        assert (folder(client) / "snapshots" / commit / WEIGHTS).stat().st_size == size
    assert len(on_disk(client, size)) == 1
    # Without hard links it is downloaded, and its size is checked.
    monkeypatch.setattr(hub_server, "COMMIT", "f" * 40)
    assert "GB more" in refused(client.fetch(**WITHOUT, NO_HARD_LINKS="1", FREE="510000000"))
    assert fetched(client, **WITHOUT, NO_HARD_LINKS="1").name == "f" * 40
    assert len(on_disk(client, size)) == 2


def test_a_blob_that_links_point_to_stays(hub: Hub, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """After developer mode was switched off, earlier downloads still work."""
    before = fetched(client)
    (blob,) = on_disk(client, (hub.directory / WEIGHTS).stat().st_size)
    assert blob.parent.name == "blobs"
    monkeypatch.setattr(hub_server, "COMMIT", COMMIT[::-1])
    assert "GB more" in refused(client.fetch(**WITHOUT, FREE="510000000"))  # a copy is needed
    assert fetched(client, **WITHOUT).name == COMMIT[::-1]
    assert (folder(client) / "snapshots" / COMMIT / WEIGHTS).resolve() == blob.resolve()
    assert fetched(client, COMMIT, HF_HUB_OFFLINE="1") == before


@pytest.mark.parametrize("name", ["../../evil.bin", "/evil.bin", "a\\..\\evil.bin", "c:evil.bin"])
def test_a_hub_cannot_name_files_outside_of_its_folder(hub: Hub, client: Client, name: str) -> None:
    honest = hub_server.Handler.info

    class Hostile(hub_server.Handler):
        def info(self) -> dict[str, object]:
            said = honest(self)
            said["siblings"][0]["rfilename"] = name  # type: ignore[index]
            return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_server.Handler, "info", Hostile.info)
        says = refused(client.fetch(**WITHOUT))
    assert "names a file outside of its folder" in says
    assert hub.downloads == []

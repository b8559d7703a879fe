"""Models by hub id, with a fake hub: downloads, resumed downloads, the cache, and one-line errors."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import GOLDEN, Client, refused, with_large_weights
from hub_server import COMMIT, Hub, serve
from pickled import copy_pickled_molmoe

from molmo_edge.checkpoints.bundle import resolve_model
from molmo_edge.checkpoints.manifest import BundleError
from molmo_edge.export import export_checkpoint

CHECKPOINT_FILES = {"config.json", "preprocessor_config.json", "tokenizer.json"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with the golden Qwen2-style model, in shards, and Python code as in real checkpoints."""
    directory = tmp_path / "served"
    export_checkpoint(GOLDEN / "qwen", directory, shard_bytes=150_000)
    (directory / "modeling_molmo.py").write_text("raise SystemExit('code of the hub was run')")
    (directory / "README.md").write_text("a card")
    (directory / "pytorch_model.bin").write_bytes(b"the same once more")
    with serve(Hub("someone/a-model", directory)) as served:
        yield served


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def test_a_checkpoint_is_fetched_once_without_code_and_answers(hub: Hub, client: Client) -> None:
    first = client.ask()
    assert first.returncode == 0, first.stderr
    fetched = {file for file, _ in hub.downloads}
    shards = {p.name for p in hub.directory.glob("model*.safetensors*")}
    assert len(shards) > 2
    assert fetched == CHECKPOINT_FILES | shards
    hub.downloads.clear()
    again = client.ask()
    assert hub.downloads == []
    offline = client.ask(HF_HUB_OFFLINE="1")
    hub.url = ""
    unreachable = client.ask(HF_ENDPOINT="http://127.0.0.1:9")
    local = client("ask", str(GOLDEN / "astronaut.png"), "Who?", "--model", str(hub.directory), "--max-crops", "0",
                   "--max-new-tokens", "2", "--json")  # fmt: skip
    answers = [json.loads(p.stdout)["token_ids"] for p in (first, again, offline, unreachable, local)]
    assert answers == [answers[0]] * 5


def test_a_bundle_is_fetched_whole(hub: Hub, client: Client, tiny_bundle: Path) -> None:
    shutil.rmtree(hub.directory)
    shutil.copytree(tiny_bundle, hub.directory)
    assert client.ask().returncode == 0
    assert {file for file, _ in hub.downloads} == {
        str(p.relative_to(tiny_bundle)) for p in tiny_bundle.rglob("*") if p.is_file()
    }


def test_a_pickle_is_fetched_where_there_is_nothing_else(hub: Hub, client: Client, tmp_path: Path) -> None:
    shutil.rmtree(hub.directory)
    copy_pickled_molmoe(hub.directory)
    process = client("export", hub.name, "--engine", "torch", "--out", str(tmp_path / "out"), "--quiet")
    assert process.returncode == 0
    assert process.stderr == ""
    assert {file for file, _ in hub.downloads} == CHECKPOINT_FILES | {"pytorch_model.bin"}
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_interrupted_download_goes_on_where_it_stopped(hub: Hub, client: Client) -> None:
    """huggingface_hub itself discards a partial file."""
    large = with_large_weights(hub)
    hub.cut_after = 35_000_000
    assert "it resumes where it stopped" in refused(client.ask(HF_HUB_DOWNLOAD_TIMEOUT="1"))
    hub.cut_after = None
    hub.downloads.clear()
    # Space for the rest of the file and the spare space, but not for the whole file again.
    process = client.ask(FREE="540000000")
    assert process.returncode == 0, process.stderr
    starts = [int(wanted.removeprefix("bytes=").split("-")[0]) for file, wanted in hub.downloads if wanted]
    assert starts
    assert min(starts) >= 30_000_000
    (blob,) = [p for p in (client.home / "hub").rglob("blobs/*") if p.stat().st_size == len(large)]
    assert blob.read_bytes() == large
    assert not list((client.home / "hub").rglob("*.part"))


def test_what_arrives_damaged_is_thrown_away(hub: Hub, client: Client) -> None:
    with_large_weights(hub)
    hub.hashes["pytorch_model.bin"] = "0" * 64
    assert "pytorch_model.bin of someone/a-model was damaged" in refused(client.ask())
    assert not [p for p in (client.home / "hub").rglob("blobs/*") if p.stat().st_size > 1_000_000]


@pytest.mark.parametrize("left", [b"x" * 70_000_000, b"x" * 20_000_000])
def test_what_an_attempt_left_is_not_trusted(hub: Hub, client: Client, left: bytes) -> None:
    """A partial file that is too long is restarted; one with other contents is discarded and downloaded again."""
    large = with_large_weights(hub)
    sha256 = hashlib.sha256(large).hexdigest()
    blobs = client.home / "hub" / "models--someone--a-model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256}.part").write_bytes(left)
    if len(left) < len(large):
        assert "was damaged during the download" in refused(client.ask())
    assert client.ask().returncode == 0
    assert (blobs / sha256).read_bytes() == large


def test_a_token_and_a_revision_reach_the_hub(hub: Hub, client: Client) -> None:
    hub.token = "hf_secret"
    assert "set HF_TOKEN" in refused(client.ask())
    assert client.ask(HF_TOKEN="hf_secret").returncode == 0
    assert client.ask("--revision", COMMIT, HF_TOKEN="hf_secret").returncode == 0
    says = refused(client.ask("--revision", "no-such", HF_TOKEN="hf_secret"))
    assert 'has no revision "no-such"' in says
    hub.gated = True
    assert "is gated: accept the conditions" in refused(Client(hub, client.home / "other").ask(HF_TOKEN="hf_secret"))


def test_a_disk_too_small_is_seen_before_the_download(hub: Hub, client: Client) -> None:
    shard = next(p.name for p in hub.directory.glob("model-00001*"))
    hub.sizes[shard] = 10**15
    says = refused(client.ask())
    assert "needs 1000000.0 GB more" in says
    assert "HF_HOME" in says
    assert hub.downloads == []


def test_what_is_not_there_is_said_in_one_sentence(hub: Hub, client: Client) -> None:
    offline = refused(client.ask(HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE is set" in offline
    assert "hf download someone/a-model --local-dir" in offline
    assert "cannot be reached" in refused(client.ask(HF_ENDPOINT="http://127.0.0.1:9"))
    other = client("ask", str(GOLDEN / "astronaut.png"), "Who?", "--model", "someone/other")
    assert "the hub has no such public model" in refused(other)
    (hub.directory / "config.json").unlink()
    assert "contains neither a bundle" in refused(client.ask())


@pytest.mark.usefixtures("hub")
def test_a_copy_that_is_not_whole_is_named_offline(client: Client) -> None:
    assert client.ask().returncode == 0
    cached = next((client.home / "hub").rglob("snapshots/*"))
    (cached / "tokenizer.json").unlink()
    says = refused(client.ask(HF_HUB_OFFLINE="1"))
    assert "lacks tokenizer.json" in says


def test_without_pytorch_a_checkpoint_is_not_fetched(hub: Hub, client: Client) -> None:
    program = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "from molmo_edge.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "ask", str(GOLDEN / "astronaut.png"), "Who?", "--model", hub.name]
    process = subprocess.run(command, env=client.environment, capture_output=True, text=True, timeout=60, check=False)
    assert "runs on PyTorch: pip install" in refused(process)
    assert hub.downloads == []


@pytest.mark.parametrize("model", [None, "nano", GOLDEN / "qwen"])
def test_a_revision_is_for_the_hub(model: Any) -> None:
    with pytest.raises(BundleError, match="a revision needs a hub id"):
        resolve_model(model, revision="main")

"""A bundle of the golden tiny MolmoE, exported once per session, and a runtime that answers from a script."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from once import FOLDER, once

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import MolmoConfig
from molmo_edge.frontend.crops import Overview
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.molmo import Molmo
from molmo_edge.system.cores import available_cores

GOLDEN = Path(__file__).parent / "golden"
MAX_WORKERS = 8  # each takes up to 1.5 GB
sys.path.append(str(Path(__file__).parent.parent))  # last, for recipes/, which is not installed


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run several files on all cores if pytest-xdist is installed. `-n` overrides this; `-n 0` uses one process."""
    option = config.option
    files = {argument.partition("::")[0] for argument in config.args}
    several = len(files) > 1 or any(Path(file).is_dir() for file in files)
    alone = option.usepdb or option.trace or option.capture == "no"  # the terminal is for the tests
    if not several or alone or hasattr(config, "workerinput") or getattr(option, "numprocesses", 0) is not None:
        return
    option.numprocesses = min(available_cores(), MAX_WORKERS)
    if option.dist == "no":
        option.dist = "worksteal"
    # PyTorch's threads of all workers together: one per core.
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores() // option.numprocesses))


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of what is made once for all workers, and let processes that tests start receive interrupts."""
    # Background jobs of a shell ignore interrupts, their children too, and the tests may run in one.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="molmo-edge-test-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ[FOLDER] = folder.name  # inherited by the workers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests half an hour in place of the timeout in pyproject.toml."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the stamps of verified hashes in a folder of the session, not in the developer's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLMO_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit status, stdout, stderr)."""
    from molmo_edge.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """tests/golden/molmoe as a bundle in fp32 with a check."""
    pytest.importorskip("onnx")
    from molmo_edge.export import CheckPhoto, export_bundle

    check = CheckPhoto(GOLDEN / "astronaut.png", "Point to the helmet.", max_new_tokens=8)
    return once("tiny", lambda out: export_bundle(GOLDEN / "molmoe", out, check=check))


@dataclass
class FakeCache:
    capacity: int
    length: int = 0
    step: int = 0

    def copy(self, capacity: int | None = None) -> FakeCache:
        return replace(self, capacity=self.capacity if capacity is None else capacity)


@dataclass
class FakeRuntime:
    """Answers every prompt with `script`. Column 0 of an embedding is its id, column 1 the image feature."""

    config: MolmoConfig
    script: list[int]
    fed: list[np.ndarray] = field(default_factory=list)  # the embeddings of each forward
    images: int = 0
    closed: bool = False
    engine: str = "a script"

    def encode_image(
        self,
        crops: np.ndarray,
        _masks: np.ndarray,
        _overview: Overview | None = None,
        _pooling: np.ndarray | None = None,
    ) -> np.ndarray:
        self.images += 1
        features = np.zeros((len(crops), self.config.image.cells**2, self.config.decoder.d_model), np.float32)
        features[:, :, 1] = 1 + np.arange(features[:, :, 1].size).reshape(len(crops), -1)
        return features

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        embeddings = np.zeros((len(token_ids), self.config.decoder.d_model), np.float32)
        embeddings[:, 0] = token_ids
        return embeddings

    def new_cache(self, capacity: int) -> FakeCache:
        return FakeCache(capacity)

    def forward(self, embeddings: np.ndarray, cache: FakeCache) -> np.ndarray:
        self.fed.append(embeddings)
        cache.length += len(embeddings)
        assert cache.length <= cache.capacity
        cache.step = cache.step + 1 if len(embeddings) == 1 else 0
        logits = np.zeros(self.config.decoder.embedding_size, np.float32)
        logits[-1] = 2.0  # a padding row, which must never be chosen
        logits[self.script[cache.step] if cache.step < len(self.script) else 499] = 1.0
        return logits

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(GOLDEN / "molmoe" / "tokenizer.json")


@pytest.fixture
def saying(any_saying: Callable[..., Molmo]) -> Callable[..., Molmo]:
    return any_saying


@pytest.fixture(scope="session")
def any_saying(tokenizer: Tokenizer) -> Callable[..., Molmo]:
    """`saying(text)` is a Molmo that answers every question with `text`; `context` shortens its context."""

    def make(text: str, *, context: int = 4096, max_crops: int | None = 2) -> Molmo:
        config = read_config(GOLDEN / "molmoe")
        config = replace(config, decoder=replace(config.decoder, max_position_embeddings=context))
        runtime = FakeRuntime(config, [*tokenizer.encode(f" {text}"), tokenizer.special.eos])
        molmo = Molmo.from_parts(runtime, tokenizer, max_crops=max_crops)
        molmo.fake = runtime  # type: ignore[attr-defined]
        return molmo

    return make


@pytest.fixture(scope="session")
def small_checkpoints() -> dict[str, Path]:
    """Checkpoints to train: "experts", of MolmoE's anatomy, and "dense"; a step takes a hundredth of a second."""
    from small_checkpoints import DECODERS, write_checkpoint

    return {kind: once(kind, lambda out, kind=kind: write_checkpoint(out, kind)) for kind in DECODERS}


@pytest.fixture(scope="session")
def small_molmoe(small_checkpoints: dict[str, Path]) -> Path:
    return small_checkpoints["experts"]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread for tiny matrices, and skip the measurement of the machine's speed."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("molmo_edge.training.trainer.device_flops", lambda *_: 1e9)
        yield
    torch.set_num_threads(threads)

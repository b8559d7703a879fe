"""Find and open bundles: directories with a manifest, model graphs, a tokenizer and a self-check.

`molmo_edge.json` lists every file with its size and SHA-256, and holds a SHA-256 of its own content. Opening a bundle
always verifies that hash and the sizes, and the hashes of the files once per machine. Damaged, edited and
unlisted files, and bundles of newer versions, are refused before an engine reads them; the error names them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from molmo_edge.checkpoints.hub_config import is_checkpoint
from molmo_edge.checkpoints.manifest import (
    GRAPHS,
    MANIFEST,
    TOKENIZER,
    BundleError,
    Check,
    Component,
    Manifest,
    read_manifest,
)
from molmo_edge.config import MolmoConfig
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.model_names import NAMED_MODELS, full_name
from molmo_edge.system.cache import cache_directory
from molmo_edge.system.files import sha256_of

if TYPE_CHECKING:
    from molmo_edge.checkpoints.hub import Download

MOST_STAMPS = 1000  # maximum number of recorded verifications

_DAY = 24 * 60 * 60  # seconds
_STAMP_DAYS = 180  # a file that was not opened for longer is hashed again
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    directory: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The model's name, for answers."""
        return self.manifest.name

    @property
    def config(self) -> MolmoConfig:
        """The configuration of the model."""
        return self.manifest.config

    @property
    def components(self) -> Mapping[str, Component]:
        """The files of the bundle, by component."""
        return self.manifest.components

    @property
    def check(self) -> Check | None:
        """The recorded check question; None if the bundle has none."""
        return self.manifest.check

    @property
    def device(self) -> str:
        """The device that the bundle was exported for: "cpu", "cuda", "tensorrt" or "coreml"."""
        return self.manifest.target.device if self.manifest.target else "cpu"

    def path(self, component: str) -> Path:
        """The file of `component`. Raises BundleError if the bundle has no such component."""
        if component not in self.components:
            raise BundleError(f"{self.directory}: the manifest has no component {component!r}")
        return self.directory / self.components[component].file


def default_bundle() -> Path:
    """The directory of the embedded nano model. Raises BundleError if this installation lacks it."""
    directory = Path(__file__).parent.parent / "nano"
    if not (directory / MANIFEST).is_file():
        raise BundleError(
            f"this installation of molmo-edge has no embedded model ({directory / MANIFEST} is missing): "
            "reinstall molmo-edge, or pass a bundle directory"
        )
    return directory


def is_bundle(directory: str | Path) -> bool:
    """Whether `directory` holds a manifest, and so a bundle."""
    return (Path(directory) / MANIFEST).is_file()


def is_hub_id(model: object) -> bool:
    """Whether a model argument is a hub id `owner/name` rather than an existing path."""
    return isinstance(model, str) and _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def resolve_model(
    model: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    to_run: bool = True,
    announce: Callable[[Download], None] | None = None,
) -> Path:
    """Find the directory of a model.

    None or "nano": the embedded bundle. A directory of a bundle or a checkpoint: itself. A short name of
    `molmo_edge.model_names` or a hub id `owner/name`: its files at `revision`, downloaded once into the cache of
    huggingface_hub. `to_run`, `announce`: see `molmo_edge.checkpoints.hub.fetch_model`.
    Raises BundleError for anything else, and HubError if the download fails.
    """
    named = full_name(model)
    if is_hub_id(named):
        from molmo_edge.checkpoints.hub import fetch_model

        return fetch_model(str(named), revision, to_run=to_run, announce=announce)
    if revision is not None:
        given = "no model was given" if model is None else f"the model is {model}"
        raise BundleError(f"a revision needs a hub id of the form owner/name, but {given}")
    if model is None:
        return default_bundle()
    if not isinstance(model, (str, os.PathLike)):
        raise BundleError(f"the model must be a path or a hub id, got {type(model).__name__}")
    path = Path(model)
    if path.is_dir():
        if is_bundle(path) or is_checkpoint(path):
            return path
        raise BundleError(f"{path} contains neither a bundle ({MANIFEST}) nor a checkpoint (config.json)")
    if path.exists():
        raise BundleError(f"{path} is a file: pass the directory of the bundle or the checkpoint")
    if str(model) == "nano":
        return default_bundle()
    if near := difflib.get_close_matches(str(model).lower(), NAMED_MODELS, n=1):
        raise BundleError(f'there is no directory {path}: did you mean the model "{near[0]}"?')
    raise BundleError(
        f"there is no directory {path}, and it is neither a hub id of the form owner/name nor a short name "
        f"({', '.join(NAMED_MODELS)})"
    )


def open_bundle(directory: str | Path, *, hashes: bool | None = None) -> Bundle:
    """Read and validate the bundle in `directory`.

    `hashes`: True verifies every SHA-256, including that of the check's image; False verifies none; None verifies those
    that were not verified on this machine before. Raises BundleError that names the file and the problem.
    """
    bundle = Bundle(Path(directory), read_manifest(Path(directory)))
    for component in bundle.components.values():
        _verify(bundle.directory, component, hashes)
    if bundle.check is not None and hashes:
        _verify(bundle.directory, bundle.check.image, hashes)
    _refuse_unlisted_weights(bundle)
    return bundle


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load the tokenizer of a bundle or a checkpoint directory.

    In a bundle the file is verified, and must have the special ids of the manifest, for which the graphs were exported.
    Raises BundleError or TokenizerError.
    """
    directory = Path(directory)
    if not is_bundle(directory):
        return Tokenizer.from_file(directory / TOKENIZER)
    manifest = read_manifest(directory)
    _verify(directory, manifest.components["tokenizer"], None)
    tokenizer = Tokenizer.from_file(directory / TOKENIZER, bos=manifest.special_ids.bos)
    found, expected = dataclasses.asdict(tokenizer.special), dataclasses.asdict(manifest.special_ids)
    if wrong := next((name for name in expected if found[name] != expected[name]), None):
        raise BundleError(
            f"{directory / TOKENIZER} has {wrong} at {found[wrong]}, the manifest says {expected[wrong]}: they do not "
            "belong together. Fetch or export the bundle again"
        )
    return tokenizer


def _verify(directory: Path, component: Component, hashes: bool | None) -> None:
    path = directory / component.file
    again = "the bundle is damaged or incomplete. Fetch or export it again"
    try:
        stat = path.stat()
        if stat.st_size != component.bytes:
            raise BundleError(f"{path} has {stat.st_size} bytes, the manifest says {component.bytes}: {again}")
        stamp = _stamp(path, stat, component.sha256)
        if hashes is False or (hashes is None and _is_stamped(stamp)):
            return
        found = sha256_of(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): {again}") from None
    if found != component.sha256:
        raise BundleError(f"{path} does not have the sha256 in the manifest: {again}")
    _remember(stamp)


def _refuse_unlisted_weights(bundle: Bundle) -> None:
    """Raise BundleError for unlisted weights next to a graph (decoder.onnx.data), which an engine would read."""
    listed = {component.file for component in bundle.components.values()}
    for name in GRAPHS:
        path = bundle.path(name)
        for beside in path.parent.glob(f"{glob.escape(path.name)}[._]data*"):
            if beside.relative_to(bundle.directory).as_posix() not in listed:
                raise BundleError(f"{beside} is not in the manifest, but the engine would read it: remove it")


def _stamp(path: Path, stat: os.stat_result, sha256: str) -> Path:
    # An empty file per verification: it has no format that could break, and concurrent processes cannot corrupt it.
    fact = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{sha256}"
    return cache_directory() / "verified" / hashlib.sha256(fact.encode()).hexdigest()


def _is_stamped(stamp: Path) -> bool:
    try:
        used = stamp.stat().st_mtime
    except OSError:
        return False
    if time.time() - used > _DAY:
        with contextlib.suppress(OSError):
            stamp.touch()  # in use: `_prune` keeps it
    return True


def _remember(stamp: Path) -> None:
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:
        return  # a read-only home: the hash is computed again next time
    _prune(stamp.parent)


def _prune(directory: Path) -> None:
    """Remove stamps that were not used for half a year, and the oldest ones above MOST_STAMPS.

    Files that were removed or rewritten leave their stamps, and a stamp does not name its file.
    """
    with contextlib.suppress(OSError):  # another process may prune, too
        stamps = sorted((entry.stat().st_mtime, entry.path) for entry in os.scandir(directory))
        old = time.time() - _STAMP_DAYS * _DAY
        for n, (used, path) in enumerate(reversed(stamps)):
            if n >= MOST_STAMPS or used < old:
                os.unlink(path)

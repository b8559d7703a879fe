"""The artefact on disk: a directory with a manifest, graphs, a tokenizer and a check of its own.

`molmo_edge.json` names every file with its size and sha256, and holds a sha256 of its own content. Opening a bundle
compares that hash and the sizes always, and the files' hashes once a machine; whatever is damaged, edited, foreign or
newer than this program is refused by name before any of it reaches an engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from molmo_edge.checkpoints.hub_config import is_checkpoint
from molmo_edge.config import ConfigError, MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.tokenizer import SpecialIds, Tokenizer

MANIFEST = "molmo_edge.json"
FORMAT = "molmo-edge-bundle"
FORMAT_VERSION = 1
SEAL = "sha256"  # the manifest's field with the hash of all the others
MOST_STAMPS = 1000  # verified files that are remembered
TOLERANCE = 2.0  # percent of a side: how far a point of the check may move, where the manifest does not say it
GRAPHS = ("vision_encoder", "connector", "embed_tokens", "decoder")
TOKENIZER = "tokenizer.json"  # in a bundle as in a checkpoint

_DAY = 24 * 60 * 60  # seconds
_STAMP_DAYS = 180  # a file that nobody opened for longer is hashed again
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class BundleError(MolmoEdgeError):
    """A bundle, or a model argument, that cannot be used."""


@dataclass(frozen=True)
class Component:
    """One file of a bundle."""

    name: str  # "decoder"
    file: str  # relative to the bundle, with forward slashes
    bytes: int
    sha256: str
    engine: str = ""  # "onnx", "gguf"; empty for the tokenizer
    precision: str = ""  # "fp32", "int8", "q8", "q4", "mixed"
    onnxruntime: str = ""  # the oldest version that has the graph's operators; empty where it is not said


@dataclass(frozen=True)
class Check:
    """What a sound copy of the bundle answers: greedy ids and their points (percent of a side); see selfcheck.py."""

    image: Component
    question: str
    token_ids: tuple[int, ...]
    complete: bool  # whether the answer stopped by itself behind `token_ids`
    points: tuple[tuple[float, float], ...] = ()
    tolerance: float = TOLERANCE  # percent of a side that a point may move
    sums: dict[str, Any] | None = (
        None  # see molmo_edge/sdk/stage_checksums.py; None of a bundle that was made before there were any
    )


@dataclass(frozen=True)
class Bundle:
    directory: Path
    name: str
    config: MolmoConfig
    special_ids: dict[str, int]  # by the fields of SpecialIds
    components: dict[str, Component]
    check: Check | None
    manifest: dict[str, Any]  # as read, with source and measured errors
    device: str = "cpu"  # what its target runs on: "cpu", "cuda", "tensorrt", "coreml"

    def path(self, component: str) -> Path:
        """The file of `component`. Raises BundleError where the bundle has none."""
        if component not in self.components:
            raise BundleError(f"{self.directory}: the manifest has no component {component!r}")
        return self.directory / self.components[component].file


def default_bundle() -> Path:
    """The embedded nano model. Raises BundleError where this installation has none."""
    directory = Path(__file__).parent.parent / "nano"
    if not (directory / MANIFEST).is_file():
        raise BundleError(
            f"this installation of molmo-edge holds no embedded model ({directory / MANIFEST} is missing): "
            "reinstall molmo-edge, or name a bundle directory"
        )
    return directory


def is_bundle(directory: str | Path) -> bool:
    return (Path(directory) / MANIFEST).is_file()


def is_hub_id(model: object) -> bool:
    """Whether a model argument names one on the hub: `owner/name`, and nothing here is called so."""
    return isinstance(model, str) and _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def resolve_model(model: str | os.PathLike[str] | None, *, revision: str | None = None, to_run: bool = True) -> Path:
    """Find the directory that `model` means.

    None or "nano": the embedded bundle. A bundle directory, or a checkpoint directory: itself. A hub id `owner/name`:
    its files at `revision`, downloaded once into the hub's own cache. `to_run`: see
    `molmo_edge.checkpoints.hub.fetch_model`.
    Raises BundleError for anything else, HubError where the hub cannot give it.
    """
    if model is not None and is_hub_id(model):
        from molmo_edge.checkpoints.hub import fetch_model

        return fetch_model(str(model), revision, to_run=to_run)
    if revision is not None:
        given = "none is named" if model is None else f"the model is {model}"
        raise BundleError(f"a revision is for a model of the hub, owner/name, but {given}")
    if model is None:
        return default_bundle()
    if not isinstance(model, (str, os.PathLike)):
        raise BundleError(f"the model must be a path or a hub id, it is {type(model).__name__}")
    path = Path(model)
    if path.is_dir():
        if is_bundle(path) or is_checkpoint(path):
            return path
        raise BundleError(f"{path} holds neither a bundle ({MANIFEST}) nor a checkpoint (config.json)")
    if path.exists():
        raise BundleError(f"{path} is a file: name the directory of the bundle or of the checkpoint")
    if str(model) == "nano":
        return default_bundle()
    raise BundleError(f"there is no directory {path}, and it is not a hub id of the form owner/name")


def open_bundle(directory: str | Path, *, hashes: bool | None = None) -> Bundle:
    """Read and validate the bundle in `directory`.

    `hashes`: True compares every sha256, that of the check's image too; False none; None those that this machine
    has not compared before. Raises BundleError that names the file and what is wrong with it.
    """
    bundle = _parse(Path(directory))
    for component in bundle.components.values():
        _verify(bundle.directory, component, hashes)
    if bundle.check is not None and hashes:
        _verify(bundle.directory, bundle.check.image, hashes)
    _refuse_unlisted_weights(bundle)
    return bundle


def content_sha256(content: dict[str, Any]) -> str:
    """The sha256 of a manifest or of parts of it, its own hash left out. Formatting and order of keys do not matter."""
    hashed = {key: value for key, value in content.items() if key != SEAL}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest`, with the hash of its content, into a bundle. Raises OSError."""
    manifest[SEAL] = content_sha256(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a bundle or of a checkpoint directory.

    That of a bundle is verified, and must have the special ids that the graphs were made for.
    Raises BundleError or TokenizerError.
    """
    directory = Path(directory)
    if not is_bundle(directory):
        return Tokenizer.from_file(directory / TOKENIZER)
    bundle = _parse(directory)
    _verify(directory, bundle.components["tokenizer"], None)
    tokenizer = Tokenizer.from_file(directory / TOKENIZER)
    found = dataclasses.asdict(tokenizer.special)
    if wrong := [name for name, token_id in bundle.special_ids.items() if found[name] != token_id]:
        raise BundleError(
            f"{directory / TOKENIZER} has {wrong[0]} at {found[wrong[0]]}, the manifest says "
            f"{bundle.special_ids[wrong[0]]}: they do not belong together, fetch or export the bundle again"
        )
    return tokenizer


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: {path.parent} is not a molmo-edge bundle") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}): the bundle is damaged, fetch it again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f'{path} does not say "format": "{FORMAT}": this is not a molmo-edge bundle')
    version = manifest.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise BundleError(f"{path} has the format version {version!r}, which is none")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}, this molmo-edge knows {FORMAT_VERSION}: "
            "pip install --upgrade molmo-edge"
        )
    return manifest


def _parse(directory: Path) -> Bundle:
    where = directory / MANIFEST
    manifest = _read_manifest(where)
    try:
        model, special, listed = manifest["model"], manifest["special_ids"], manifest["components"]
        special_ids = {field.name: int(special[field.name]) for field in dataclasses.fields(SpecialIds)}
        components = {name: _parse_component(where, name, entry, entry["file"]) for name, entry in listed.items()}
        check = _parse_check(where, manifest.get("check"))
        device = str((manifest.get("target") or {}).get("device") or "cpu")
        config = MolmoConfig.from_dict(model)
    except ConfigError as error:
        raise BundleError(f"{where}: {error}") from None
    except KeyError as error:
        raise BundleError(f"{where} has no {error.args[0]!r}: the manifest is incomplete") from None
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise BundleError(f"{where} is malformed: {error}") from None
    missing = [name for name in (*GRAPHS, "tokenizer") if name not in components]
    if missing:
        raise BundleError(f"{where} lists no {', '.join(missing)}: the manifest is incomplete")
    if components["tokenizer"].file != TOKENIZER:
        raise BundleError(f"{where} calls the tokenizer {components['tokenizer'].file}, it has to be {TOKENIZER}")
    _refuse_edited(where, manifest, check)
    name = str(manifest.get("name") or directory.name)
    return Bundle(directory, name, config, special_ids, components, check, manifest, device)


def _refuse_edited(where: Path, manifest: dict[str, Any], check: Check | None) -> None:
    """Raise BundleError for a manifest whose content is not what was written. One without a hash is an older one."""
    sealed = manifest.get(SEAL)
    if sealed is None and (check is None or check.sums is None):
        return
    if sealed != content_sha256(manifest):
        raise BundleError(
            f"{where} was changed after it was written: its content does not have the sha256 that it says. Restore it, "
            "or fetch or export the bundle again"
        )


def _parse_component(where: Path, name: str, entry: dict[str, Any], file: Any) -> Component:
    return Component(
        name=name,
        file=_inside(where, file),
        bytes=int(entry["bytes"]),
        sha256=str(entry["sha256"]).lower(),
        engine=str(entry.get("engine") or ""),
        precision=str(entry.get("precision") or ""),
        onnxruntime=str(entry.get("onnxruntime") or ""),
    )


def _parse_check(where: Path, entry: Any) -> Check | None:
    if entry is None:
        return None
    return Check(
        image=_parse_component(where, "check image", entry, entry["image"]),
        question=str(entry["question"]),
        token_ids=tuple(int(i) for i in entry["token_ids"]),
        complete=bool(entry["complete"]),
        points=tuple((float(x), float(y)) for x, y in entry.get("points") or ()),
        tolerance=_parse_tolerance(entry.get("tolerance", TOLERANCE)),
        sums=None if entry.get("sums") is None else dict(entry["sums"]),
    )


def _parse_tolerance(value: Any) -> float:
    tolerance = float(value)
    if not 0 <= tolerance <= 100:
        raise ValueError(f"the check's tolerance must be 0 to 100 percent of a side, it is {value}")
    return tolerance


def _inside(where: Path, file: Any) -> str:
    """`file` as a relative path that stays inside the bundle; a manifest may come from anybody."""
    parts = PurePosixPath(file).parts if isinstance(file, str) else ()
    if not parts or "\\" in file or ":" in file or file.startswith("/") or ".." in parts:
        raise BundleError(f"{where} names the file {file!r}, which is not inside the bundle: refused")
    return str(PurePosixPath(*parts))


def _verify(directory: Path, component: Component, hashes: bool | None) -> None:
    path = directory / component.file
    again = "the bundle is damaged or incomplete, fetch or export it again"
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
        raise BundleError(f"{path} does not have the sha256 that the manifest says: {again}")
    _remember(stamp)


def _refuse_unlisted_weights(bundle: Bundle) -> None:
    """An engine reads the weights beside a graph (decoder.onnx.data, decoder.onnx_data) whether listed or not."""
    listed = {component.file for component in bundle.components.values()}
    for name in GRAPHS:
        path = bundle.path(name)
        for beside in path.parent.glob(f"{glob.escape(path.name)}[._]data*"):
            if beside.relative_to(bundle.directory).as_posix() not in listed:
                raise BundleError(f"{beside} is not in the manifest, but an engine would read it: remove it")


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_directory() -> Path:
    """Where small facts about this machine are kept. `MOLMO_EDGE_CACHE` names another place."""
    if named := os.environ.get("MOLMO_EDGE_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "molmo-edge"


def _stamp(path: Path, stat: os.stat_result, sha256: str) -> Path:
    # An empty file per verified fact: no format to break, and two processes cannot tear it.
    fact = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{sha256}"
    return cache_directory() / "verified" / hashlib.sha256(fact.encode()).hexdigest()


def _is_stamped(stamp: Path) -> bool:
    try:
        used = stamp.stat().st_mtime
    except OSError:
        return False
    if time.time() - used > _DAY:
        with contextlib.suppress(OSError):
            stamp.touch()  # still in use, see `_prune`
    return True


def _remember(stamp: Path) -> None:
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:
        return  # a read-only home costs the comparison next time, nothing else
    _prune(stamp.parent)


def _prune(directory: Path) -> None:
    """Forget stamps that nobody asked for in half a year, and the oldest of too many.

    Files that are gone, or were written again, leave theirs, and a stamp does not say which file it is of.
    """
    with contextlib.suppress(OSError):  # another process prunes as well
        stamps = sorted((entry.stat().st_mtime, entry.path) for entry in os.scandir(directory))
        old = time.time() - _STAMP_DAYS * _DAY
        for n, (used, path) in enumerate(reversed(stamps)):
            if n >= MOST_STAMPS or used < old:
                os.unlink(path)

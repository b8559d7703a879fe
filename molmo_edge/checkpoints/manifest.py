"""`molmo_edge.json`, the manifest of a bundle, as dataclasses that are read from it and written to it.

Manifests are untrusted input: `read_manifest` checks every field that this package uses. The SHA-256 of the
manifest's own content detects edits, but does not protect against a malicious author.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from molmo_edge.config import ConfigError, MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.tokenizer import SpecialIds
from molmo_edge.system.files import sha256_of

MANIFEST = "molmo_edge.json"
FORMAT = "molmo-edge-bundle"
FORMAT_VERSION = 1
HASH = "sha256"  # the manifest's key for the hash of all its other keys
TOLERANCE = 2.0  # percent of a side: how far a point of the check may move, unless the manifest says otherwise
GRAPHS = ("vision_encoder", "connector", "embed_tokens", "decoder")
POINT_HEAD = "point_head"  # a further graph of a MolmoPoint


def graph_names(config: MolmoConfig) -> tuple[str, ...]:
    """The components of a bundle that are graphs where its decoder is one."""
    return (*GRAPHS, POINT_HEAD) if config.point_head else GRAPHS


TOKENIZER = "tokenizer.json"  # in a bundle as in a checkpoint


class BundleError(MolmoEdgeError):
    """A bundle, or a model argument, that cannot be used."""


@dataclass(frozen=True)
class ScaleTraining:
    """How the scales of four-bit weights were trained, see molmo_edge/quantize/scale_training.py."""

    kept_pass: int  # whose scales were kept; 0: those before the training
    divergences: tuple[float, ...]  # KL on the held-out prompts in nats per token, of each pass from 0

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this training."""
        return {"kept_pass": self.kept_pass, "divergences": list(self.divergences)}

    @classmethod
    def from_dict(cls, entry: Any) -> ScaleTraining:
        """Read a training. Raises KeyError, TypeError or ValueError."""
        kept = _require(entry["kept_pass"], int, "kept_pass")
        return cls(kept, tuple(_number(value) for value in entry["divergences"]))


@dataclass(frozen=True)
class Component:
    """One file of a bundle. Fields that do not apply keep their defaults and are absent from the JSON."""

    file: str  # relative to the bundle, with forward slashes
    bytes: int
    sha256: str  # 64 hexadecimal digits
    engine: str = ""  # "onnx" or "gguf"; empty: not a model file (tokenizer, external weights)
    precision: str = ""  # "fp32", "int8", "q4", ...; for a GGUF "q4_k_m", ...
    onnxruntime: str = ""  # oldest ONNX Runtime with all operators of the graph, "1.23"
    operators: str = ""  # "onnx": the graph uses ONNX's standard operators only
    drafting: bool = False  # of a decoder: its graph has the input n_last, see molmo_edge/export/decoder_graph.py
    cache: str = ""  # of a decoder: "int8" if its keys and values are, see molmo_edge/export/int8_cache.py
    weight_errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    # By tensor that was rounded: norm of the error / norm of the weights, largest absolute error.
    largest_value: float | None = None  # largest activation on the calibration inputs, of float16 graphs; NaN: unknown
    kept_in_fp32: tuple[str, ...] = ()  # matrices of a float16 graph whose activations would overflow
    importance: str = ""  # how llama.cpp's importance matrix was computed
    trained_scales: ScaleTraining | None = None
    max_error: float | None = None  # largest difference of an output from the fp32 graph's
    relative_error: float | None = None  # norm of that difference / norm of the fp32 output

    @classmethod
    def from_file(cls, path: Path, **fields: Any) -> Component:
        """Describe the file at `path`, which is directly in the bundle's directory. Raises OSError."""
        return cls(path.name, path.stat().st_size, sha256_of(path), **fields)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this component, keys in the order of the file format."""
        entry: dict[str, Any] = {"file": self.file}
        entry |= _present(engine=self.engine, precision=self.precision, onnxruntime=self.onnxruntime)
        entry |= {"sha256": self.sha256, "bytes": self.bytes}
        entry |= _present(
            operators=self.operators,
            drafting=self.drafting,
            cache=self.cache,
            weight_errors={name: list(errors) for name, errors in self.weight_errors.items()},
        )
        if self.largest_value is not None:
            entry["largest_value"] = None if math.isnan(self.largest_value) else self.largest_value
        entry |= _present(kept_in_fp32=list(self.kept_in_fp32), importance=self.importance)
        if self.trained_scales is not None:
            entry["trained_scales"] = self.trained_scales.to_dict()
        errors = {"max_error": self.max_error, "relative_error": self.relative_error}
        return entry | {name: error for name, error in errors.items() if error is not None}

    @classmethod
    def from_dict(cls, entry: Any, *, file_key: str = "file") -> Component:
        """Read a component. Raises KeyError, TypeError, ValueError or BundleError (a file outside the bundle)."""
        _require(entry, dict, "a component")
        errors, training = _optional(entry, "weight_errors", dict, {}), entry.get("trained_scales")
        largest = _number(entry["largest_value"]) if entry.get("largest_value") is not None else math.nan
        return cls(
            file=_inside_bundle(entry[file_key]),
            bytes=_require(entry["bytes"], int, "bytes"),
            sha256=_require(entry["sha256"], str, "sha256").lower(),
            engine=_optional(entry, "engine", str, ""),
            precision=_optional(entry, "precision", str, ""),
            onnxruntime=_optional(entry, "onnxruntime", str, ""),
            operators=_optional(entry, "operators", str, ""),
            drafting=_optional(entry, "drafting", bool, False),
            cache=_optional(entry, "cache", str, ""),
            weight_errors={name: _pair(pair) for name, pair in errors.items()},
            largest_value=largest if "largest_value" in entry else None,
            kept_in_fp32=tuple(_require(name, str, name) for name in _optional(entry, "kept_in_fp32", list, [])),
            importance=_optional(entry, "importance", str, ""),
            trained_scales=None if training is None else ScaleTraining.from_dict(training),
            max_error=None if entry.get("max_error") is None else _number(entry["max_error"]),
            relative_error=None if entry.get("relative_error") is None else _number(entry["relative_error"]),
        )


@dataclass(frozen=True)
class Check:
    """A question with the answer that an intact copy of the bundle gives by greedy decoding; see selfcheck.py."""

    image: Component
    question: str
    token_ids: tuple[int, ...]
    complete: bool  # whether the answer ended with a stop token after `token_ids`
    points: tuple[tuple[float, float], ...] = ()  # x, y in percent of a side
    tolerance: float = TOLERANCE  # percent of a side that a point may move
    sums: dict[str, Any] | None = None  # see molmo_edge/sdk/stage_checksums.py; None in bundles of early versions

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this check, keys in the order of the file format."""
        return {
            "image": self.image.file,
            "sha256": self.image.sha256,
            "bytes": self.image.bytes,
            "question": self.question,
            "token_ids": list(self.token_ids),
            "complete": self.complete,
            "points": [list(point) for point in self.points],
            **({} if self.sums is None else {"sums": self.sums}),
            "tolerance": self.tolerance,
        }

    @classmethod
    def from_dict(cls, entry: Any) -> Check:
        """Read a check. Raises KeyError, TypeError, ValueError or BundleError (an image outside the bundle)."""
        _require(entry, dict, "the check")
        tolerance = _number(entry.get("tolerance", TOLERANCE))
        if not 0 <= tolerance <= 100:
            raise ValueError(f"the check's tolerance must be 0 to 100 percent of a side, got {tolerance}")
        sums = entry.get("sums")
        return cls(
            image=Component.from_dict(entry, file_key="image"),
            question=_require(entry["question"], str, "the check's question"),
            token_ids=tuple(_require(i, int, "a token id") for i in entry["token_ids"]),
            complete=_require(entry["complete"], bool, "complete"),
            points=tuple(_pair(point) for point in entry.get("points") or ()),
            tolerance=tolerance,
            sums=None if sums is None else _require(sums, dict, "the check's sums"),
        )


@dataclass(frozen=True)
class Source:
    """What a bundle was exported from."""

    checkpoint: str  # name of the checkpoint's directory
    files: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of its weights and configuration, by file name


@dataclass(frozen=True)
class Target:
    """The kind of machine that a bundle was exported for."""

    name: str  # "cpu-x86", "cuda", ...
    device: str = "cpu"  # "cpu", "cuda", "tensorrt" or "coreml"
    defaults: str = ""  # why the target's precisions were chosen


@dataclass(frozen=True)
class Manifest:
    """Everything that `molmo_edge.json` says."""

    name: str
    config: MolmoConfig
    special_ids: SpecialIds
    components: Mapping[str, Component]  # "vision_encoder", ..., "tokenizer"; external weights as "decoder_data"
    created_by: str = ""  # "molmo-edge 0.1.0"
    source: Source | None = None
    target: Target | None = None  # None: exported without a target
    check: Check | None = None  # None: the bundle has no check
    rotated: tuple[str, ...] = ()  # components whose hidden channels an export rotated, see quantize/rotation.py
    # The JSON that this was read from, for hashes of it; empty for a manifest that was not read.
    content: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this manifest with the hash of its content, keys in the order of the file format."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "created_by": self.created_by,
            "model": self.config.to_dict(),
            "special_ids": self.special_ids.to_dict(),
            "components": {name: component.to_dict() for name, component in self.components.items()},
        }
        if self.source is not None:
            content["source"] = {"checkpoint": self.source.checkpoint, "files": dict(self.source.files)}
        if self.target is not None:
            content["target"] = dataclasses.asdict(self.target)
        content |= _present(rotated=list(self.rotated))
        content[HASH] = ""  # its place; the hash is of all that follows, too
        if self.check is not None:
            content["check"] = self.check.to_dict()
        content[HASH] = content_sha256(content)
        return content

    @classmethod
    def from_dict(cls, content: Any, *, default_name: str = "") -> Manifest:
        """Read a manifest from its JSON object.

        Raises BundleError for another format or a newer version, an incomplete or malformed manifest, and content
        that does not match its hash; the messages do not name the file.
        """
        _check_format(content)
        try:
            manifest = _from_dict(content, default_name)
        except ConfigError as error:
            raise BundleError(str(error)) from None
        except KeyError as error:
            raise BundleError(f"the manifest is incomplete: {error.args[0]!r} is missing") from None
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise BundleError(f"malformed manifest: {error}") from None
        missing = [name for name in (*GRAPHS, "tokenizer") if name not in manifest.components]
        if missing:
            raise BundleError(f"the manifest is incomplete: it lacks the component {', '.join(missing)}")
        if (file := manifest.components["tokenizer"].file) != TOKENIZER:
            raise BundleError(f"the tokenizer's file must be {TOKENIZER}, got {file}")
        hashed = content.get(HASH)
        # Bundles of early versions have neither a hash nor sums.
        required = hashed is not None or (manifest.check is not None and manifest.check.sums is not None)
        if required and hashed != content_sha256(content):
            raise BundleError(
                "the manifest was changed after it was written: its content does not match its sha256. "
                "Restore it, or fetch or export the bundle again"
            )
        return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read and validate the manifest of the bundle in `directory`. Raises BundleError that names the file."""
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: {directory} is not a molmo-edge bundle") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}): the bundle is damaged, fetch it again") from None
    try:
        return Manifest.from_dict(content, default_name=directory.name)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write a manifest's JSON object into a bundle and set the hash of its content. Raises OSError."""
    content[HASH] = content_sha256(content)
    (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def content_sha256(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's JSON object, or of parts of it, without its own hash.

    Formatting and the order of keys do not matter.
    """
    hashed = {key: value for key, value in content.items() if key != HASH}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_format(content: Any) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f'this is not a molmo-edge bundle: "format" is not "{FORMAT}"')
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"the bundle has format version {version}, this molmo-edge supports {FORMAT_VERSION}: "
            "pip install --upgrade molmo-edge"
        )
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise BundleError(f"{version!r} is not a supported format version (supported: {FORMAT_VERSION})")


def _from_dict(content: dict[str, Any], default_name: str) -> Manifest:
    model, special, components = content["model"], content["special_ids"], content["components"]
    # Ids of Molmo2's tokens are absent in Molmo v1.
    names = [f.name for f in dataclasses.fields(SpecialIds) if f.name in special or f.default is dataclasses.MISSING]
    source, target, check = content.get("source"), content.get("target"), content.get("check")
    return Manifest(
        name=_optional(content, "name", str, default_name),
        config=MolmoConfig.from_dict(model),
        special_ids=SpecialIds(**{name: _require(special[name], int, name) for name in names}),
        components={name: Component.from_dict(entry) for name, entry in components.items()},
        created_by=_optional(content, "created_by", str, ""),
        source=None
        if source is None
        else Source(
            _optional(source, "checkpoint", str, ""),
            {file: _require(sha256, str, file) for file, sha256 in _optional(source, "files", dict, {}).items()},
        ),
        target=None
        if target is None
        else Target(
            _optional(target, "name", str, ""),
            _optional(target, "device", str, "cpu"),
            _optional(target, "defaults", str, ""),
        ),
        check=None if check is None else Check.from_dict(check),
        rotated=tuple(_require(part, str, "rotated") for part in _optional(content, "rotated", list, [])),
        content=content,
    )


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _require(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r:.80}")
    return value


def _optional(entry: Any, key: str, kind: type, default: Any) -> Any:
    return _require(entry.get(key) or default, kind, key)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r:.80}")
    return float(value)


def _pair(value: Any) -> tuple[float, float]:
    first, second = value
    return _number(first), _number(second)


def _inside_bundle(file: Any) -> str:
    """Normalise `file` to a relative path that stays inside the bundle, on any system."""
    parts = PurePosixPath(file).parts if isinstance(file, str) else ()
    if not parts or "\\" in file or ":" in file or file.startswith("/") or ".." in parts:
        raise BundleError(f"the manifest names the file {file!r}, which is not inside the bundle")
    return str(PurePosixPath(*parts))

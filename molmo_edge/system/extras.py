"""Optional packages: the extras that install them, which are installed, and the error for a missing one."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from molmo_edge.errors import MolmoEdgeError

P = ParamSpec("P")
T = TypeVar("T")

DISTRIBUTION = "molmo-edge"

# The extras that install a package, smallest first, by the name that is imported. tests/test_extras.py compares them
# with pyproject.toml.
EXTRAS_OF = {
    "av": ("video",),
    "bitsandbytes": ("quantize", "train"),
    "datasets": ("eval", "train"),
    "fastapi": ("serve", "mcp"),
    "gguf": ("gguf", "train"),
    "jinja2": ("eval",),
    "llama_cpp": ("gguf",),
    "llguidance": ("schema",),
    "matplotlib": ("eval",),
    "mcp": ("mcp",),
    "onnx": ("export", "eval", "quantize", "train"),
    "optimum": ("optimum",),
    "prometheus_client": ("serve", "mcp"),
    "resvg_py": ("train",),
    "safetensors": ("train",),
    "scipy": ("eval",),
    "supervision": ("supervision",),
    "tensorboard": ("train",),
    "torch": ("torch", "quantize", "train"),
    "uvicorn": ("serve", "mcp"),
}


class MissingExtra(MolmoEdgeError):  # noqa: N818 (public name)
    """A package of an extra is not installed."""


def pip_command(extra: str) -> str:
    """The command that installs an extra. Its double quotes work in every shell, including cmd.exe."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def with_extra(command: Callable[P, T], what: str, extra: str | None = None) -> Callable[P, T]:
    """Make `command` raise MissingExtra for a missing optional package: "{what} needs torch: pip install ...".

    The message names `extra` if that extra installs the package, else the smallest one that does. A missing module that
    belongs to no extra is a bug: its error is not converted.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRAS_OF:
                raise
            brings = EXTRAS_OF[package]
            named = extra if extra in brings else brings[0]
            raise MissingExtra(f"{what} needs {package}: {pip_command(named)}") from error

    return run


@dataclass(frozen=True)
class Requirement:
    """A package that an extra requires."""

    name: str  # name of the distribution
    bounds: tuple[tuple[str, str], ...]  # (">=", "2.7")

    def __str__(self) -> str:
        return self.name + ",".join(operator + version for operator, version in self.bounds)

    @property
    def installed(self) -> str | None:
        """The installed version; None if the package is not installed."""
        import importlib.metadata

        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def satisfied(self) -> bool:
        """Whether the installed version is within the bounds. Only ">=" and "<" are checked."""
        if (version := self.installed) is None:
            return False
        numbers = _numbers(version)
        return all(
            numbers >= _numbers(bound) if operator == ">=" else numbers < _numbers(bound)
            for operator, bound in self.bounds
            if operator in (">=", "<")
        )


def extras(requirements: Sequence[str] | None = None) -> dict[str, tuple[Requirement, ...]]:
    """Every extra of molmo-edge with its packages, including those of the extras that it refers to.

    `requirements`: lines in the format of package metadata; None: those of the installed molmo-edge. The result is
    empty if molmo-edge is not installed and runs from a checkout.
    """
    import importlib.metadata  # slow to import

    if requirements is None:
        try:
            requirements = importlib.metadata.requires(DISTRIBUTION) or ()
        except importlib.metadata.PackageNotFoundError:
            requirements = ()
    listed: dict[str, list[tuple[str, tuple[str, ...], Requirement]]] = {}
    for line in requirements:
        requirement, _, marker = line.partition(";")
        if (extra := re.search(r"""\bextra\s*==\s*["']([^"']+)["']""", marker)) is None:
            continue
        parts = re.fullmatch(r"\s*([\w.-]+)\s*(?:\[([^\]]*)\])?\s*(.*?)\s*", requirement)
        if parts is None:
            continue
        name, inner, bounds = parts.groups()
        needs = tuple(part.strip() for part in (inner or "").split(",") if part.strip())
        pairs = sorted(re.findall(r"(~=|[=!<>]=?)\s*([\w.*+!-]+)", bounds), reverse=True)
        listed.setdefault(extra[1], []).append((name, needs, Requirement(name, tuple(pairs))))

    def resolve(extra: str, seen: frozenset[str]) -> dict[str, Requirement]:
        found: dict[str, Requirement] = {}
        for name, needs, requirement in listed.get(extra, ()):
            if name.lower().replace("_", "-") != DISTRIBUTION:
                found.setdefault(name, requirement)
                continue
            for other in needs:
                if other not in seen:
                    found |= {k: v for k, v in resolve(other, seen | {other}).items() if k not in found}
        return found

    return {extra: tuple(resolve(extra, frozenset({extra})).values()) for extra in listed}


def _numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0), "2.14.0.dev1" -> (2, 14, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-zA-Z]", version)[0]))

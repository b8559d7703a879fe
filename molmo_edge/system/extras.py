"""Optional packages: the extra that brings each, what this installation has of it, and the error for a missing one."""

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

# By the name that is imported: the extras that bring it, the smallest first. tests/test_extras.py compares them with
# pyproject.toml.
EXTRAS_OF = {
    "bitsandbytes": ("quantize", "train"),
    "datasets": ("eval", "train"),
    "gguf": ("gguf", "train"),
    "llama_cpp": ("gguf",),
    "matplotlib": ("eval",),
    "onnx": ("export", "eval", "quantize", "train"),
    "optimum": ("optimum",),
    "resvg_py": ("train",),
    "safetensors": ("train",),
    "tensorboard": ("train",),
    "torch": ("torch", "quantize", "train"),
}


class MissingExtra(MolmoEdgeError):  # noqa: N818 (a state, not a mistake)
    """A package of an extra that is not installed."""


def pip_command(extra: str) -> str:
    """The command that installs an extra. Double quotes work in every shell, cmd.exe included."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def with_extra(command: Callable[P, T], what: str, extra: str | None = None) -> Callable[P, T]:
    """`command`, whose missing optional packages become MissingExtra: "{what} needs torch: pip install ...".

    `extra`: the one made for `command`. Where it does not bring the missing package, or is None, the smallest that does
    is named. A missing module that belongs to no extra is a bug, and is raised as it is.
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
    """One line of an extra."""

    name: str  # of the distribution
    bounds: tuple[tuple[str, str], ...]  # (">=", "2.7")

    def __str__(self) -> str:
        return self.name + ",".join(operator + version for operator, version in self.bounds)

    @property
    def installed(self) -> str | None:
        """The version that is installed; None without one."""
        import importlib.metadata

        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def satisfied(self) -> bool:
        """Whether the installed version is within the bounds. Only ">=" and "<" are compared."""
        if (version := self.installed) is None:
            return False
        own = _numbers(version)
        return all(
            own >= _numbers(bound) if operator == ">=" else own < _numbers(bound)
            for operator, bound in self.bounds
            if operator in (">=", "<")
        )


def extras(requirements: Sequence[str] | None = None) -> dict[str, tuple[Requirement, ...]]:
    """Every extra of this distribution with all that it brings, extras of its own resolved.

    `requirements`: lines as in a package's metadata; None: those of the installed molmo-edge. Empty where molmo-edge
    runs from a checkout without being installed.
    """
    import importlib.metadata  # it takes longer than the rest of this module

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
        name, own, bounds = parts.groups()
        needs = tuple(part.strip() for part in (own or "").split(",") if part.strip())
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
    """ "2.13.0+cpu" -> (2, 13, 0); of a development version the numbers in front."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-zA-Z]", version)[0]))

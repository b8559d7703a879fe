"""Sessions of ONNX Runtime: how a graph is loaded, with which options, and which version is installed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molmo_edge.errors import EngineError, Unavailable, first_line
from molmo_edge.runtimes.kernels import ONNXRUNTIME, Moved, use_kernels
from molmo_edge.runtimes.providers import CPU, Provider
from molmo_edge.runtimes.rotary_inputs import declared_inputs
from molmo_edge.system import forks
from molmo_edge.system.cores import choose_threads
from molmo_edge.system.log import logger
from molmo_edge.system.memory import forget_mapped

_BROKEN = "onnxruntime is installed but does not load ({}): pip install --force-reinstall onnxruntime"


def import_onnxruntime() -> Any:
    """Return the module onnxruntime. Raises Unavailable if it is missing or does not load."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise Unavailable(_BROKEN.format(first_line(error))) from error
        raise Unavailable("bundles need onnxruntime, which is not installed: pip install onnxruntime") from None
    except ImportError as error:  # a wheel for another Python, or a missing system library
        raise Unavailable(_BROKEN.format(first_line(error))) from error
    return onnxruntime


def onnxruntime_version() -> tuple[int, ...]:
    """The installed version, as `version_numbers`. Raises Unavailable, see `import_onnxruntime`."""
    return version_numbers(import_onnxruntime().__version__)


def version_numbers(version: str) -> tuple[int, ...]:
    """Major and minor number of a version: (1, 22) of "1.22.1"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def is_large(path: Path) -> bool:
    """Return whether a graph has its weights in a separate file."""
    return path.with_name(f"{path.name}.data").exists()


def load_session(
    path: Path,
    threads: int | None,
    providers: Sequence[Provider] = (CPU,),
    *,
    mapped: bool = False,
    spin: bool = False,
    replaced: tuple[str, ...] = (),
) -> Any:
    """Load a graph. `replaced`: its initializers that runs may replace, see molmo_edge.runtimes.rotary_inputs.

    Raises EngineError, and Unavailable if one of `providers` does not start.
    """
    onnxruntime = import_onnxruntime()

    def start(moved: Moved | None, options: Any) -> Any:
        graph: str | bytes = str(path) if moved is None else moved.model
        if replaced:
            graph = (graph if isinstance(graph, bytes) else path.read_bytes()) + declared_inputs(replaced)
        if isinstance(graph, bytes):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return onnxruntime.InferenceSession(graph, options, providers=list(providers))

    options, moved = session_options(threads, mapped=mapped, spin=spin), None
    try:
        if list(providers) == [CPU] and is_large(path) and onnxruntime_version() >= ONNXRUNTIME:
            moved = use_kernels(path, options, copies=not mapped)
        try:
            session = start(moved, options)
        except Exception as error:
            if moved is None:
                raise
            moved, reason = None, first_line(error)
            session = start(None, session_options(threads, mapped=mapped, spin=spin))  # fails for a damaged file, too
            logger.warning("%s runs without the kernels, which cannot load it: %s", path, reason)
    except Exception as error:
        raise EngineError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
    forks.leak_in_children(session)
    if moved is not None and moved.copies:
        forget_mapped(path.with_name(f"{path.name}.data"))
    if replaced and set(replaced) - {value.name for value in session.get_overridable_initializers()}:
        raise Unavailable(
            f"{path} cannot leave out image tokens: it has no rotary tables by the names of this version; export the "
            "model again, or open it without image_tokens"
        )
    if missing := [name for name, _ in providers if name not in session.get_providers()]:
        # ONNX Runtime would continue without it, many times slower, with only a log message.
        raise Unavailable(
            f"onnxruntime has {missing[0]} but cannot start it: check its libraries and driver, or use device='cpu'"
        )
    return session


def session_options(threads: int | None, *, mapped: bool = False, spin: bool = False) -> Any:
    """Return onnxruntime.SessionOptions.

    `mapped`: see molmo_edge.runtimes.onnx.OnnxRuntime. `spin`: threads spin while they wait.
    """
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = choose_threads(threads) or 0
    options.inter_op_num_threads = 1
    # Four sessions have four thread pools: waiting threads that spin take the cores from the pool that works (measured
    # on two busy cores: 3.3 ms per token with spinning, 1.8 ms without), and drain the battery. A large decoder, whose
    # threads wait between the many operators of a token, gains a tenth by it (MolmoE-1B).
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.enable_cpu_mem_arena = False  # equally fast without, and frees activations after a run
    if mapped:  # otherwise matrices are copied into their kernels' preferred layout
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 4  # errors are raised; do not print them too
    return options

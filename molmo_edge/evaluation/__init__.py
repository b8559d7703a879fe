"""Tasks and metrics: how good an answer is, and what a smaller model lost."""

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.extras import pip_command


class EvaluationError(MolmoEdgeError):
    """An extra that is not installed."""


def require_onnx(what: str) -> None:
    """Raises EvaluationError without the package that reads and writes graphs: now, not after an hour of asking."""
    try:
        import onnx  # noqa: F401
    except ModuleNotFoundError as error:
        raise EvaluationError(f"{what} needs {error.name}: {pip_command('eval')}") from None

"""Tasks and metrics: how good an answer is, and what a smaller model lost."""

from molmo_edge.errors import MolmoEdgeError


class EvaluationError(MolmoEdgeError):
    """An extra that is not installed."""


def need_export(what: str) -> None:
    """Raises EvaluationError without the package that writes graphs."""
    try:
        import onnx  # noqa: F401
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"{what} writes graphs, which needs {error.name}: pip install 'molmo-edge[export]'"
        ) from None

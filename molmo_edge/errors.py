"""The exceptions of molmo-edge. A message says what is wrong, where, and what to do."""


class MolmoEdgeError(Exception):
    """Base of every error that molmo-edge raises on purpose."""


class EngineError(MolmoEdgeError):
    """An inference engine failed to load or to run, or was used wrongly."""


class Unavailable(EngineError):  # noqa: N818 (public name)
    """An engine, device or component that this installation or this version does not have."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, to be quoted in one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

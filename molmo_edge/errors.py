"""The one exception family. Every message is a sentence for a person: what, where, what to do."""


class MolmoEdgeError(Exception):
    """Base of every error that molmo-edge raises on purpose."""


class EngineError(MolmoEdgeError):
    """An inference engine failed to load or to run, or was used wrongly."""


class Unavailable(EngineError):  # noqa: N818 (a state, not a mistake)
    """An engine, device or component that this installation or this version does not have."""


def first_line(error: BaseException) -> str:
    """What a library's error says, cut down to what fits into one of our sentences."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""The one exception family. Every message is a sentence for a person: what, where, what to do."""


class MolmoEdgeError(Exception):
    """Base of every error that molmo-edge raises on purpose."""


def first_line(error: BaseException) -> str:
    """What a library's error says, cut down to what fits into one of our sentences."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""The one exception family. Every message is a sentence for a person: what, where, what to do."""


class MolmoEdgeError(Exception):
    """Base of every error that molmo-edge raises on purpose."""

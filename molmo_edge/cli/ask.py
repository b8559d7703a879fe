"""`molmo-edge ask`"""

from __future__ import annotations

from molmo_edge.cli import options
from molmo_edge.cli.answering import answer_command


@options.flat
def ask(
    images: options.Images,
    question: options.Question,
    *,
    opening: options.Opening,
    sampling: options.Sampling,
    json: options.JsonLines = False,
    save: options.Save = None,
    quiet: options.Quiet = False,
) -> None:
    """Ask photos anything."""
    answer_command(images, question, opening, sampling, json=json, save=save, quiet=quiet)

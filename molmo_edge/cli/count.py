"""`molmo-edge count`"""

from __future__ import annotations

from molmo_edge.cli import options
from molmo_edge.cli.answering import answer_command


@options.flat
def count(
    images: options.Images,
    label: options.Label,
    *,
    opening: options.Opening,
    sampling: options.Sampling,
    json: options.JsonLines = False,
    save: options.Save = None,
    quiet: options.Quiet = False,
) -> None:
    """Count everything of a kind, with a point for each."""
    from molmo_edge.frontend.prompts import count_question

    answer_command(images, count_question(label), opening, sampling, json=json, save=save, quiet=quiet)

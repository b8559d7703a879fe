"""`molmo-edge point`"""

from __future__ import annotations

from molmo_edge.cli import options
from molmo_edge.cli.answering import answer_command


@options.flat
def point(
    images: options.Images,
    label: options.Label,
    *,
    opening: options.Opening,
    sampling: options.Sampling,
    json: options.JsonLines = False,
    save: options.Save = None,
    quiet: options.Quiet = False,
) -> None:
    """Point at everything of a kind."""
    from molmo_edge.frontend.prompts import point_question

    answer_command(images, point_question(label), opening, sampling, json=json, save=save, quiet=quiet)

"""`molmo-edge caption`"""

from __future__ import annotations

from molmo_edge.cli import options
from molmo_edge.cli.answering import answer_command


@options.flat
def caption(
    images: options.Images,
    *,
    opening: options.Opening,
    sampling: options.Sampling,
    json: options.JsonLines = False,
    save: options.Save = None,
    quiet: options.Quiet = False,
) -> None:
    """Describe photos."""
    from molmo_edge.frontend.prompts import caption_question

    answer_command(images, caption_question(), opening, sampling, json=json, save=save, quiet=quiet)

"""`molmo-edge point`"""

from __future__ import annotations

from molmo_edge.cli import options
from molmo_edge.cli.answering import answer_command


@options.expand_options
def point(
    images: options.Images,
    label: options.Label,
    *,
    model: options.CachedModelOptions,
    sampling: options.SamplingOptions,
    output: options.OutputOptions,
    video: options.VideoOptions,
    together: options.TogetherOption,
) -> None:
    """Point at every object of a kind."""
    from molmo_edge.frontend.prompts import point_question

    answer_command(images, point_question(label), model, sampling, output, video, together=together.together)

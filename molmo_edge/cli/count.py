"""`molmo-edge count`"""

from __future__ import annotations

from molmo_edge.cli import options
from molmo_edge.cli.answering import answer_command


@options.expand_options
def count(
    images: options.Images,
    label: options.Label,
    *,
    model: options.CachedModelOptions,
    sampling: options.SamplingOptions,
    output: options.OutputOptions,
    video: options.VideoOptions,
    together: options.TogetherOption,
) -> None:
    """Count the objects of a kind, with a point for each."""
    from molmo_edge.frontend.prompts import count_question

    answer_command(images, count_question(label), model, sampling, output, video, together=together.together)

"""`molmo-edge caption`"""

from __future__ import annotations

from molmo_edge.cli import options
from molmo_edge.cli.answering import answer_command


@options.expand_options
def caption(
    images: options.Images,
    *,
    model: options.CachedModelOptions,
    sampling: options.SamplingOptions,
    output: options.OutputOptions,
    video: options.VideoOptions,
    together: options.TogetherOption,
) -> None:
    """Describe photos."""
    from molmo_edge.frontend.prompts import caption_question

    answer_command(images, caption_question(), model, sampling, output, video, together=together.together)

"""`molmo-edge ask`"""

from __future__ import annotations

from molmo_edge.cli import options
from molmo_edge.cli.answering import answer_command


@options.expand_options
def ask(
    images: options.Images,
    question: options.Question,
    *,
    model: options.CachedModelOptions,
    sampling: options.FormOptions,
    output: options.OutputOptions,
    video: options.VideoOptions,
    together: options.TogetherOption,
) -> None:
    """Ask a question about photos."""
    answer_command(images, question, model, sampling, output, video, together=together.together)

"""`molmo-edge ask`"""

from __future__ import annotations

from molmo_edge.cli import options
from molmo_edge.cli.answering import answer_command


def ask(
    image: options.Image,
    question: options.Question,
    *,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    max_crops: options.MaxCrops = None,
    threads: options.Threads = None,
    llama: options.Llama = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    json: options.Json = False,
    save: options.Save = None,
    quiet: options.Quiet = False,
) -> None:
    """Ask a photo anything."""
    answer_command(
        image,
        question,
        model=model,
        revision=revision,
        device=device,
        precision=precision,
        max_crops=max_crops,
        threads=threads,
        llama=llama,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        json=json,
        save=save,
        quiet=quiet,
    )

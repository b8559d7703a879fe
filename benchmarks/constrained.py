"""What a constraint on the answer costs: `python benchmarks/constrained.py [--model DIR] [--photo FILE] [--runs 5]`.

For free text and for each form, prints the time per token, of which the constraint takes the time to compute the mask
of allowed ids, and the time to compile the form. The best of the runs, which take turns, because other programs only
add time. "times free text" compares within one run of this program. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge import Molmo
from molmo_edge.sdk.answer_form import answer_form

QUESTION = "What is on the table?"
SCHEMA = {
    "type": "object",
    "properties": {
        "things": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 3, "maxLength": 12},
                    "color": {"enum": ["red", "white", "brown", "black"]},
                    "count": {"type": "integer", "minimum": 0, "maximum": 20},
                },
                "required": ["name", "color", "count"],
            },
            "minItems": 3,
            "maxItems": 3,
        }
    },
    "required": ["things"],
}
FORMS: dict[str, dict[str, Any]] = {
    "free text": {},
    "schema": {"schema": SCHEMA},
    "regex": {"regex": "(?:[a-z]{2,9} ){11}[a-z]{2,9}\\."},
    "choices": {"choices": [f"There are {n} cups on the table, and nothing else that I can see." for n in range(100)]},
}
TOKENS = 48


def mask_seconds(molmo: Molmo, form: dict[str, Any], ids: tuple[int, ...]) -> float:
    """Seconds to compute the mask of one token and to advance, on average over the answer `ids`."""
    compiled = answer_form(molmo.engine, form.get("schema"), form.get("regex"), form.get("choices"))
    if compiled is None:
        return 0.0
    constraint = compiled.begin()
    logits = np.zeros(molmo.config.decoder.vocab_size, np.float32)
    began = time.perf_counter()
    for token in ids:
        constraint.masked(logits)
        constraint.accept(token)
    return (time.perf_counter() - began) / len(ids)


def compile_seconds(molmo: Molmo, form: dict[str, Any]) -> float:
    began = time.perf_counter()
    answer_form(molmo.engine, form.get("schema"), form.get("regex"), form.get("choices"))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=None, help="default: nano")
    parser.add_argument("--photo", default=str(Path(__file__).parent.parent / "examples" / "coffee.jpg"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="0: the default of the engine")
    args = parser.parse_args()
    molmo = Molmo(args.model, threads=args.threads or None)
    vocabulary = compile_seconds(molmo, FORMS["regex"]) - compile_seconds(molmo, FORMS["regex"])
    scene = molmo.encode(args.photo)
    token: dict[str, list[float]] = {name: [] for name in FORMS}
    mask: dict[str, list[float]] = {name: [] for name in FORMS}
    compiling: dict[str, list[float]] = {name: [] for name in FORMS}
    lengths: dict[str, int] = {}
    for _ in range(args.runs):
        for name, form in FORMS.items():
            compiling[name].append(compile_seconds(molmo, form))
            # A high temperature, so that free text does not end early.
            answer = molmo.ask(scene, QUESTION, max_new_tokens=TOKENS, temperature=2.0, seed=1, **form)
            lengths[name] = len(answer.token_ids)
            token[name].append(answer.usage.seconds.decode / max(1, len(answer.token_ids) - 1))
            mask[name].append(mask_seconds(molmo, form, answer.token_ids))
    free = min(token["free text"])
    heads = ("", "tokens", "ms a token", "times free text", "mask, ms", "of a token", "compile, ms")
    print("{:12}{:>8}{:>12}{:>17}{:>10}{:>12}{:>13}".format(*heads))
    for name in FORMS:
        spent, masking = min(token[name]), min(mask[name])
        print(
            f"{name:12}{lengths[name]:8}{1000 * spent:12.2f}{spent / free:17.2f}{1000 * masking:10.3f}"
            f"{masking / spent:12.1%}{1000 * min(compiling[name]):13.2f}"
        )
    print(f"once for each model, to read its {molmo.config.decoder.vocab_size} tokens: {1000 * vocabulary:.0f} ms")
    print(json.dumps({"token": token, "mask": mask, "compile": compiling, "vocabulary": vocabulary}))


if __name__ == "__main__":
    main()

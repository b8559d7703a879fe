"""Replace the grounding head of a bundle by that of a checkpoint, which is the only part that the stage "head" changes.

    python -m recipes.nano.replace_head BUNDLE CHECKPOINT OUT

The other files are copied byte for byte.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.manifest import POINT_HEAD, Check, read_manifest, write_manifest
from molmo_edge.export.bundle import export_bundle
from molmo_edge.export.bundle_weights import load_bundle_weights
from molmo_edge.modeling import save_checkpoint
from molmo_edge.selfcheck import record_check
from recipes.nano.student import PRECISION


def restore(bundle: Path, out: Path) -> None:
    """Write the rounded weights of a bundle as a checkpoint, for the stage "head"."""
    out.mkdir(parents=True)
    save_checkpoint(load_bundle_weights(bundle), bundle / "tokenizer.json", out)


def replace_head(bundle: Path, checkpoint: Path, out: Path) -> None:
    """Write `bundle` with the grounding head of `checkpoint` to `out`, and record the answer of its check."""
    before = read_manifest(bundle)
    assert before.check is not None
    with tempfile.TemporaryDirectory() as scratch:
        export_bundle(checkpoint, Path(scratch) / "new", PRECISION, name=before.name)
        new = open_bundle(Path(scratch) / "new")
        part = new.components[POINT_HEAD]
        shutil.copytree(bundle, out)
        (out / before.components[POINT_HEAD].file).unlink()
        shutil.copyfile(new.directory / part.file, out / part.file)
        manifest = replace(before, config=new.config, components={**before.components, POINT_HEAD: part}, check=None)
    write_manifest(out, manifest.to_dict())
    image, question = before.check.image, before.check.question
    answer = record_check(out, image.file, question, 64)
    manifest = replace(manifest, check=Check(image, tolerance=before.check.tolerance, **answer))
    write_manifest(out, manifest.to_dict())


def main() -> None:
    """Run the command line."""
    made = argparse.ArgumentParser(prog="python -m recipes.nano.replace_head", description=__doc__)
    for name in ("bundle", "checkpoint", "out"):
        made.add_argument(name, type=Path)
    args = made.parse_args()
    replace_head(args.bundle, args.checkpoint, args.out)


if __name__ == "__main__":
    main()

"""Replace the grounding head of a bundle by that of a checkpoint, which is the only part that the stage "head" changes.

    python -m recipes.nano.replace_head BUNDLE CHECKPOINT OUT

The other files are copied byte for byte. The rounded weights of a bundle become a checkpoint for "head" with

    molmo-edge export BUNDLE --engine torch --precision fp32 --out RUN/answers/model
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
from molmo_edge.export.errors import ExportError
from molmo_edge.selfcheck import record_check
from recipes.nano.student import PRECISION


def replace_head(bundle: Path, checkpoint: Path, out: Path) -> None:
    """Write `bundle` with the grounding head of `checkpoint` to `out`, and record the answer of its check."""
    before = read_manifest(bundle)
    if before.check is None:
        raise ExportError(f"{bundle} has no check whose answer could be recorded: export it with --check-image")
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

"""Fine-tune a checkpoint on points of your own, and compare its answers before and after.

    pip install ".[train]"
    python examples/finetune.py
    python examples/finetune.py --from allenai/MolmoE-1B-0924 --folder FOLDER --ask bolt --image photo.jpg -- --base nf4

FOLDER has photos and points.csv (`image,label,x,y` in pixels); docs/training.md lists the other formats. Options after
`--` go to `molmo-edge train points`, which trains LoRA adapters and merges them into OUT/model, an ordinary checkpoint.

Without arguments, the script trains nano on the two photos of this folder, for a few minutes on a CPU. That shows how
it works; to learn to point at something in new photos, a model needs at least dozens of photos and hundreds of steps.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path

from molmo_edge import Molmo

HERE = Path(__file__).parent
ROWS = [  # image, label, x and y in pixels
    ("coffee.jpg", "cup", 285, 150),
    ("coffee.jpg", "spoon", 366, 285),
    ("cat.jpg", "eye", 172, 114),
    ("cat.jpg", "eye", 318, 136),
    ("cat.jpg", "nose", 265, 245),
]
SHORT = ["--steps=30", "--batch=2", "--max-crops=1", "--validation=0", "--rates=decoder=1e-3,connector=1e-4"]


def command(*words: object) -> None:
    """Run `molmo-edge WORDS`."""
    subprocess.run([sys.executable, "-m", "molmo_edge", *map(str, words)], check=True)


def write_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in {row[0] for row in ROWS}:
        shutil.copy(HERE / name, folder)
    with (folder / "points.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "label", "x", "y"), *ROWS])


def show(title: str, model: str, label: str, image: Path) -> None:
    with Molmo(model) as molmo:
        answer = molmo.point(image, label, max_new_tokens=48)
    print(f"{title}: {label}: {[(round(x), round(y)) for x, y in answer.pixels()] or answer.text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--from", dest="start", help="checkpoint or hub id to start from (default: nano)")
    parser.add_argument("--folder", type=Path, help="photos with points.csv (default: OUT-points, with two photos)")
    parser.add_argument("--out", type=Path, default=Path("run"), help="directory of the run")
    parser.add_argument("--ask", default="spoon", metavar="LABEL", help="what to point at before and after")
    parser.add_argument("--image", type=Path, default=HERE / "coffee.jpg", help="photo to point in")
    parser.add_argument("options", nargs="*", help="options of `molmo-edge train points`, after --")
    args = parser.parse_args()
    if args.folder is None:
        args.folder = args.out.with_name(f"{args.out.name}-points")
        write_folder(args.folder)
        args.options = [*SHORT, *args.options]
    if args.start is None:  # nano is a bundle; training needs a checkpoint
        args.start = args.out.with_name(f"{args.out.name}-start")
        if not args.start.exists():
            command("export", "nano", "--engine", "torch", "--precision", "fp32", "--out", args.start)
    show("before", str(args.start), args.ask, args.image)
    command("train", "points", args.folder, "--from", args.start, "--out", args.out, *args.options)
    show("after", str(args.out / "model"), args.ask, args.image)


if __name__ == "__main__":
    main()

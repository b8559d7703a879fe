"""Fine-tune a checkpoint on points of your own, and compare its answers before and after.

    pip install ".[train]"
    python examples/finetune.py --from allenai/MolmoE-1B-0924 [--folder FOLDER] [--out run] [-- --steps 1000 --base nf4]

FOLDER has photos and points.csv (`image,label,x,y` in pixels); docs/training.md lists the other formats. Without
`--folder`, the script writes one with the two photos of this folder. Options after `--` go to
`molmo-edge train points`, which trains LoRA adapters and merges them into OUT/model, an ordinary checkpoint.
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
    parser.add_argument("--from", dest="start", required=True, help="checkpoint or hub id to start from")
    parser.add_argument("--folder", type=Path, help="photos with points.csv (default: two photos, written to OUT)")
    parser.add_argument("--out", type=Path, default=Path("run"), help="directory of the run")
    parser.add_argument("--ask", default="spoon", metavar="LABEL", help="what to point at before and after")
    parser.add_argument("--image", type=Path, default=HERE / "coffee.jpg", help="photo to point in")
    parser.add_argument("options", nargs="*", help="options of `molmo-edge train points`, after --")
    args = parser.parse_args()
    if args.folder is None:
        args.folder = args.out.with_name(f"{args.out.name}-points")
        write_folder(args.folder)
    show("before", args.start, args.ask, args.image)
    command = [sys.executable, "-m", "molmo_edge", "train", "points", args.folder]
    command += ["--from", args.start, "--out", args.out, *args.options]
    subprocess.run(list(map(str, command)), check=True)
    show("after", str(args.out / "model"), args.ask, args.image)


if __name__ == "__main__":
    main()

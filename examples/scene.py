"""Encode a photo once and ask several questions: `python examples/scene.py [examples/coffee.jpg [cup spoon table]]`."""

import sys
from pathlib import Path

from molmo_edge import Molmo, Point

image = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("coffee.jpg")
labels = sys.argv[2:] or ["cup", "spoon", "table"]
molmo = Molmo()
scene = molmo.encode(image)  # encodes and prefills the image, once
for label in labels:
    answer = molmo.count(scene, label)
    print(f"{label}: {answer.count}, first token after {1000 * answer.usage.seconds.prefill:.0f} ms")

for piece in molmo.stream(scene, "Describe this image."):
    if isinstance(piece, Point):  # available before its tag closes
        print(f"[{piece.x:.0f}, {piece.y:.0f}]", end="", flush=True)
    else:
        print(piece, end="", flush=True)
print()

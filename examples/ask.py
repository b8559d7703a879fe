"""Ask one question about a photo: `python examples/ask.py [examples/coffee.jpg ["Point to the cup."]]`."""

import sys
from pathlib import Path

from molmo_edge import Molmo

image = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("coffee.jpg")
question = sys.argv[2] if len(sys.argv) > 2 else "Point to the cup."
answer = Molmo().ask(image, question)
print(answer)
for point in answer.points:
    print(f"{point.label}: {point.x:.1f} % from the left, {point.y:.1f} % from the top")
answer.draw().save("answer.png")

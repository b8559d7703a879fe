"""One question about one photo: `python examples/ask.py examples/coffee.jpg "Point to the cup."`"""

import sys

from molmo_edge import Molmo

image, question = sys.argv[1:3]
answer = Molmo().ask(image, question)
print(answer)
for point in answer.points:
    print(f"{point.label}: {point.x:.1f} % from the left, {point.y:.1f} % from the top")
answer.draw().save("answer.png")

"""Chat about a photo: `python examples/chat.py [examples/coffee.jpg ["What is this?" "Where is the spoon?"]]`."""

import sys
from pathlib import Path

from molmo_edge import Molmo

image = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("coffee.jpg")
questions = sys.argv[2:] or ["What is this?", "Where is the spoon?"]
chat = Molmo().chat(image)  # the image is encoded and prefilled here
for question in questions:
    answer = chat.ask(question)  # runs only the tokens of this turn
    tokens, speed = answer.usage.tokens, answer.tokens_per_second or 0
    print(f"{question} {answer.readable}")
    print(
        f"  {tokens.prefilled} of {tokens.image + tokens.prompt} tokens prefilled, then {speed:.0f} tokens per second"
    )

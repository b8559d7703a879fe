"""Draw what nano answers about the photos of examples/, right and wrong.

    python docs/draw_answers.py

writes docs/images/answers.jpg, a sheet of the photos with the points of their first question, and prints the table of
examples/README.md. The last column of the table says whether an answer is right: a person looks at the photos.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from molmo_edge import Molmo

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "images" / "answers.jpg"
WIDTH, COLUMNS, GAP = 400, 2, 8  # pixels of a photo, photos in a row, pixels between them
DESCRIBE = "Describe this image."
ASKED = {  # photo: questions; the answer to the first one is drawn
    "dog.jpg": ("Point to the dog.", "How many chairs are there?", DESCRIBE),
    "taxis.jpg": ("How many cars are there?", "Point to the person.", "Point to the dog."),
    "horse.jpg": ("Point to the horse.", "How many people are there?", DESCRIBE),
    "airplane.jpg": ("Point to the airplane.", "How many airplanes are there?", "Point to the bird."),
    "teddy.jpg": ("Point to the teddy bear.", "Point to the cup.", DESCRIBE),
    "pizza.jpg": ("Point to the pizza.", "How many cups are there?", DESCRIBE),
}


def main() -> None:
    drawn: list[Image.Image] = []
    print("| photo | question | nano's answer | right? |\n|---|---|---|---|")
    with Molmo() as molmo:
        for name, questions in ASKED.items():
            scene = molmo.encode(ROOT / "examples" / name)
            answers = [molmo.ask(scene, question) for question in questions]
            drawn.append(answers[0].draw())
            for question, answer in zip(questions, answers, strict=True):
                print(f"| `{name}` | {question} | `{answer.text}` |  |")
    sheet(drawn).save(OUT, quality=85)
    print(f"\nwrote {OUT}")


def sheet(photos: list[Image.Image]) -> Image.Image:
    """The photos in rows, each as wide as the others and as high as the lowest of all."""
    small = [
        photo.resize((WIDTH, round(WIDTH * photo.height / photo.width)), Image.Resampling.LANCZOS) for photo in photos
    ]
    height, rows = min(photo.height for photo in small), -(-len(small) // COLUMNS)
    size = COLUMNS * WIDTH + (COLUMNS - 1) * GAP, rows * height + (rows - 1) * GAP
    out = Image.new("RGB", size, "white")
    for number, photo in enumerate(small):
        top = (photo.height - height) // 2
        cut = photo.crop((0, top, WIDTH, top + height))
        out.paste(cut, (number % COLUMNS * (WIDTH + GAP), number // COLUMNS * (height + GAP)))
    return out


if __name__ == "__main__":
    main()

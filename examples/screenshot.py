"""Find what you name on the screen, and print where a program would click.

    python examples/screenshot.py "the search field" [--image SCREENSHOT] [--save found.png] [--model BUNDLE]

Nothing is clicked. With `--click`, the program asks, and after "y" clicks on the first point (`pip install pyautogui`).
Screenshots need Windows, macOS, or Linux with X11. nano was not trained on screenshots: use one of Ai2's checkpoints.
"""

import argparse

from PIL import Image, ImageGrab

from molmo_edge import Molmo, Point


def click(point: Point) -> None:
    import pyautogui  # optional

    # Points are in percent: on a high-density display, a screenshot has more pixels than the mouse has positions.
    x, y = point.pixel(*pyautogui.size())
    if input(f"Click at ({x:.0f}, {y:.0f})? [y/N] ").strip().lower() == "y":
        pyautogui.click(x, y)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", help='what to click: "the search field"')
    parser.add_argument("--image", help="a file instead of a screenshot; cannot be clicked")
    parser.add_argument("--model", help="bundle, checkpoint or hub id (default: nano)")
    parser.add_argument("--save", help="file for a copy of the picture with the points")
    parser.add_argument("--click", action="store_true", help="ask, then click on the first point")
    args = parser.parse_args()
    if args.click and args.image:
        parser.error("--click needs the screen itself: leave out --image")
    try:
        image = Image.open(args.image) if args.image else ImageGrab.grab()
    except OSError as error:  # no such file, no image, no display
        raise SystemExit(f"there is no picture: {error}") from error
    with Molmo(args.model) as molmo:
        answer = molmo.point(image, args.target)
    if args.save:
        answer.draw().save(args.save)
    if not answer.points:
        raise SystemExit(f"{args.target} was not found: {answer.text}")
    for point, (x, y) in zip(answer.points, answer.pixels(), strict=True):
        print(f"would click at ({x:.0f}, {y:.0f}) of {image.width}x{image.height}: {point.label or args.target}")
    if args.click:
        click(answer.points[0])


if __name__ == "__main__":
    main()

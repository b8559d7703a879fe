"""Point at an object in the frames of a camera, and show the points in a window. Press q or Ctrl-C to stop.

    pip install opencv-python
    python examples/webcam.py [--source 0] [--label cup] [--model BUNDLE]

`--source` is the number of a camera, or a video file. Without a camera, the frame is examples/coffee.jpg.
`--frames 3 --save FOLDER` writes the frames to files and opens no window, for example on a board without a display.
"""

import argparse
import contextlib
import itertools
import threading
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from molmo_edge import Molmo

PHOTO = Path(__file__).with_name("coffee.jpg")


class Camera:
    """Always the newest frame. A model is slower than a camera, and OpenCV's queue would return frames of the past."""

    def __init__(self, number: int) -> None:
        self.capture = cv2.VideoCapture(number)
        self.opened = self.capture.isOpened()
        self.frame: np.ndarray | None = None
        self.new = threading.Condition()
        if self.opened:
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while self.opened:
            good, frame = self.capture.read()
            with self.new:
                self.opened = self.opened and good  # False: the camera was unplugged
                self.frame = frame if good else None
                self.new.notify()
        self.capture.release()

    def read(self) -> tuple[bool, np.ndarray | None]:
        with self.new:
            self.new.wait_for(lambda: self.frame is not None or not self.opened)
            frame, self.frame = self.frame, None
        return frame is not None, frame

    def release(self) -> None:
        self.opened = False


def open_source(name: str) -> tuple[Camera | cv2.VideoCapture, bool]:
    """A camera or a video file, and whether there is only one frame in it."""
    source = Camera(int(name)) if name.isdigit() else cv2.VideoCapture(name)
    if source.opened if isinstance(source, Camera) else source.isOpened():
        return source, False
    if not name.isdigit():
        raise SystemExit(f"{name} cannot be read as a video")
    print(f"camera {name} cannot be opened; using {PHOTO.name}")
    return cv2.VideoCapture(str(PHOTO)), True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default="0", help="number of a camera, or a video file")
    parser.add_argument("--label", default="cup", help="what to point at")
    parser.add_argument("--model", help="bundle, checkpoint or hub id (default: nano)")
    parser.add_argument("--max-crops", type=int, default=1, help="1: only the global view, which is fastest")
    parser.add_argument("--frames", type=int, help="stop after this many frames")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write frames to files; show no window")
    args = parser.parse_args()
    source, single = open_source(args.source)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
    with Molmo(args.model, max_crops=args.max_crops) as molmo:
        for number in itertools.count(1) if args.frames is None else range(1, args.frames + 1):
            good, frame = source.read()  # an array [h, w, 3] in OpenCV's order, BGR
            if not good:
                break
            start = time.perf_counter()
            # The limit on tokens keeps one bad answer from holding up the frames after it.
            answer = molmo.point(Image.fromarray(frame[:, :, ::-1]), args.label, max_new_tokens=128)
            points = [f"({x:.0f}, {y:.0f})" for x, y in answer.pixels()]
            print(f"frame {number}: {' '.join(points) or 'none'}, {time.perf_counter() - start:.2f} s", flush=True)
            drawn = np.asarray(answer.draw())[:, :, ::-1]
            if args.save:
                cv2.imwrite(str(args.save / f"{number:05d}.jpg"), drawn)
            else:
                try:
                    cv2.imshow("molmo-edge", drawn)
                    if cv2.waitKey(0 if single else 1) == ord("q"):
                        break
                except cv2.error as error:  # no display, or opencv-python-headless
                    raise SystemExit(f"OpenCV cannot open a window; use --save FOLDER ({error.err})") from error
    source.release()
    if not args.save:
        cv2.destroyAllWindows()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C
        main()

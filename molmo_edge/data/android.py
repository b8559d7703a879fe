"""AndroidControl: screenshots of a phone, and the next action of its user.

Each step gives four conversations that state the goal, the step, or both. Reference:
olmo/data/academic_datasets.py::AndroidControl (mode "all"), and olmo/hf_datasets/android_control.py for the wording of
actions. The authors' files are gzipped TFRecords, which allow no random access; the hub's copy has the same episodes in
parquet files.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.data.academic_rows import Asked
from molmo_edge.data.rows import Row, Rows, RowsError
from molmo_edge.frontend.image_files import ImageError, load_image

SPLITS = "splits.json"
_COLUMNS = ("image", "ll_instruction", "hl_instruction", "target_action")
_WORDS = {  # action_type -> wording; {x} and {y} in percent
    "open_app": "Open App {app_name}",
    "click": "Click({x}, {y})",
    "long_press": "Long Press({x}, {y})",
    "scroll": "Scroll {direction}",
    "input_text": "Type {text}",
    "navigate_home": "Navigate Home",
    "navigate_back": "Navigate Back",
    "wait": "Wait",
}


def android_control(row: Row) -> list[Asked]:
    """A row is a step: ll_instruction describes it, hl_instruction is the goal, target_action the answer."""
    step, goal, action = map(row.text, _COLUMNS[1:])
    return [
        Asked(f"low_level: {step}", (action,)),
        Asked(f"high_level: {goal} low_level: {step}", (action,)),
        Asked(f"high_level: {goal}", (action,)),
        Asked(f"high_level_cot: {goal}", (f"Plan: {step} Action: {action}",)),
    ]


def step_rows(rows: Rows, folder: Path | None, split: str) -> Rows:
    """Split smolagents/android-control's rows, which are episodes, into steps. Rows of steps are returned as they are.

    Columns: episode_id, goal, screenshots_b64 (one more than steps), actions, step_instructions. Its 12232 training and
    3051 test episodes are not the authors' splits: "train" may contain test episodes. If `folder` has the authors'
    splits.json (storage.googleapis.com/gresearch/android_control/splits.json), only episodes of their `split` are used.
    """
    if "screenshots_b64" not in rows.columns:
        return rows
    kept = _episodes(folder / SPLITS, split) if folder is not None and (folder / SPLITS).is_file() else None
    steps = [len(each or ()) for each in rows.column("step_instructions")]
    episodes = rows.column("episode_id")
    places = [
        (index, step)
        for index, (episode, length) in enumerate(zip(episodes, steps, strict=True))
        if kept is None or episode in kept
        for step in range(length)
    ]
    return Rows(rows.where, rows.folder, _COLUMNS, len(places), _Steps(rows, places).cell)


def _episodes(path: Path, split: str) -> frozenset[int]:
    try:
        return frozenset(json.loads(path.read_text(encoding="utf-8"))[split])
    except (ValueError, KeyError, TypeError):
        raise RowsError(f'{path} does not list the episodes of the split "{split}": download it again') from None


@dataclass(frozen=True, eq=False)
class _Steps:
    rows: Rows
    places: Sequence[tuple[int, int]]  # (episode, step)

    def cell(self, index: int, column: str) -> Any:
        episode, step = self.places[index]
        if column == "hl_instruction":
            return self.rows.cell(episode, "goal")
        if column == "ll_instruction":
            return self.rows.cell(episode, "step_instructions")[step]
        screenshot = self._screenshot(episode, step)
        if column == "image":
            return screenshot
        action = self.rows.cell(episode, "actions")[step]
        return action_words(json.loads(action) if isinstance(action, str) else action, screenshot)

    def _screenshot(self, episode: int, step: int) -> bytes:
        screenshots = self.rows.cell(episode, "screenshots_b64")
        try:
            return base64.b64decode(screenshots[step], validate=True)
        except (IndexError, TypeError, binascii.Error):
            raise RowsError(f"row {episode} of {self.rows.where} has no readable screenshot of step {step}") from None


def action_words(action: Mapping[str, Any], screenshot: bytes) -> str:
    """An action in words: "Click(50.0, 12.5)", in percent of the screenshot with one decimal.

    Raises RowsError for an unknown or incomplete action.
    """
    words = _WORDS.get(action["action_type"])
    if words is None:
        raise RowsError(f"{action['action_type']!r} is not an AndroidControl action (known: {', '.join(_WORDS)})")
    missing = [name for name in re.findall(r"{(\w+)}", words) if action.get(name) is None]
    if missing:
        raise RowsError(f"an AndroidControl action {action['action_type']!r} has no {' and no '.join(missing)}")
    if "{x}" not in words:
        return words.format_map(action)
    if not all(math.isfinite(action[axis]) for axis in "xy"):
        raise RowsError(f"an AndroidControl action {action['action_type']!r} is at {action['x']}, {action['y']}")
    width, height = _size(screenshot)
    return words.format(x=round(action["x"] / width * 100, 1), y=round(action["y"] / height * 100, 1))


def _size(screenshot: bytes) -> tuple[int, int]:
    """Width and height after EXIF rotation."""
    try:
        height, width = load_image(screenshot).shape[:2]
    except ImageError:
        raise RowsError("a screenshot of AndroidControl is not an image: download its file again") from None
    return width, height

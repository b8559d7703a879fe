"""Rows of a data set, from the hub or a local copy.

Cells are read one at a time, on access: the pictures of a split may be many gigabytes. huggingface_hub downloads a
single split into its cache (`datasets` would download all splits), and `datasets` reads the parquet files. No code of
a hub repository is run.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.data.fetching import FetchError, NoAnswerError, OtherFileError, fetch_image
from molmo_edge.data.json_files import json_lines
from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.system.extras import pip_command
from molmo_edge.system.files import find_file

__all__ = [
    "ROWS",
    "FetchError",
    "NoAnswerError",
    "OtherFileError",
    "Row",
    "Rows",
    "RowsError",
    "fetch_image",
    "load_rows",
    "number_in",
    "rows_of",
    "text_in",
    "text_list",
    "written_out",
]

ROWS = "rows.jsonl"
_BATCH = 10_000  # rows read at once from a whole column


class RowsError(MolmoEdgeError):
    """A data set cannot be read, or a row has unexpected contents."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one split, in order."""

    where: str  # for messages
    folder: Path  # paths in cells are relative to it
    columns: tuple[str, ...]
    length: int
    cell: Callable[[int, str], Any]  # (row, column) -> value; pictures are not decoded
    whole: Callable[[str], Iterable[Any]] | None = None  # column -> all values; None: use `cell`

    def column(self, column: str) -> Iterator[Any]:
        """All values of one column; other columns are not read. Raises RowsError if the column does not exist."""
        self.check(column)
        if self.whole is not None:
            return iter(self.whole(column))
        return (self.cell(index, column) for index in range(self.length))

    def check(self, column: str) -> None:
        """Raise RowsError if the column does not exist."""
        if column not in self.columns:
            raise RowsError(
                f'{self.where} has no column "{column}" (columns: {", ".join(self.columns)}): is it a copy of another '
                "data set?"
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return Row(self, index)

    def __iter__(self) -> Iterator[Row]:
        return (Row(self, index) for index in range(self.length))


@dataclass(frozen=True, eq=False)
class Row:
    """One row. Every access reads a cell."""

    rows: Rows
    index: int

    @property
    def where(self) -> str:
        """For messages: "row 3 of /data/set"."""
        return f"row {self.index} of {self.rows.where}"

    def __contains__(self, column: str) -> bool:
        return column in self.rows.columns

    def __getitem__(self, column: str) -> Any:
        """Raises RowsError if the column does not exist."""
        self.rows.check(column)
        return self.rows.cell(self.index, column)

    def get(self, column: str) -> Any:
        """The cell, or None if the column does not exist."""
        return self.rows.cell(self.index, column) if column in self.rows.columns else None

    def image(self, column: str) -> Any:
        """The picture in a form that `load_image` accepts, mostly a file's bytes or path; None if there is none."""
        value = self[column]
        if isinstance(value, dict):  # the struct of datasets.Image
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return (find_file(self.rows.folder, value) or self.rows.folder / value) if value else None
        return value

    def text(self, column: str, *, blank: bool = False) -> str:
        """The cell as a text. Raises RowsError as `text_in` does."""
        return text_in(self, self[column], column, blank=blank)


def text_in(row: Row, value: Any, what: str, *, blank: bool = False) -> str:
    """Check that `value`, the `what` of `row`, is a text; unless `blank`, with more than white space.

    Raises RowsError otherwise: None and NaN would become words of a question or an answer.
    """
    if not isinstance(value, str) or not (blank or value.strip()):
        has = "no" if value is None or value == "" else f"{value!r} as its"
        raise RowsError(f"{row.where} has {has} {what}: a text is required")
    return value


def number_in(row: Row, value: Any, what: str) -> float:
    """`value`, the `what` of `row`, as a finite number. Raises RowsError for anything else, NaN included."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowsError(f"{row.where} has {value!r} as {what}: a number is required")
    return number


def text_list(row: Row, column: str) -> list[str]:
    """A cell that is a list of texts, or the Python literal of such a list, as some data sets on the hub write it."""
    value = row[column]
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise RowsError(f"{row.where}: {column} is not a list: {value!r}") from None
    return [written_out(row, text, f"one of {column}") for text in value or ()]


def written_out(row: Row, value: Any, what: str) -> str:
    """A text as it is, a number in digits. Raises RowsError for None and NaN."""
    if isinstance(value, str):
        return value
    number_in(row, value, what)
    return f"{value}"


def rows_of(where: Path, listed: Sequence[dict[str, Any]]) -> Rows:
    """Rows from memory. Paths in them are relative to the folder `where`."""
    columns = tuple(dict.fromkeys(column for row in listed for column in row))
    cells = _Listed(listed)
    return Rows(str(where), where, columns, len(listed), cells.cell, cells.column)


# Classes instead of closures, because rows are pickled for the worker processes of a trainer.


@dataclass(frozen=True, eq=False)
class _Listed:
    listed: Sequence[dict[str, Any]]

    def cell(self, index: int, column: str) -> Any:
        return self.listed[index].get(column)

    def column(self, column: str) -> Iterator[Any]:
        return (row.get(column) for row in self.listed)


@dataclass(frozen=True, eq=False)
class _Arrow:
    """A `datasets.Dataset` in "arrow" format: a row is a slice of memory, nothing is decoded or copied."""

    dataset: Any

    def cell(self, index: int, column: str) -> Any:
        return self.dataset[index].column(column)[0].as_py()

    def column(self, column: str) -> Iterator[Any]:
        for batch in self.dataset.select_columns([column]).iter(_BATCH):
            yield from batch.column(0).to_pylist()


def load_rows(hub_id: str, configs: Sequence[str], split: str, local: Path | None) -> Rows:
    """Rows of `split`, from the folder `local` or, if that is None, from the hub.

    `configs`: configurations whose rows are concatenated; empty if the data set has only one. `local` is one of:
    - a clone or download of the hub repository, with parquet files named after the split;
    - a directory written by Dataset.save_to_disk or DatasetDict.save_to_disk, or one for each config;
    - a folder with rows.jsonl, a JSON object per line with pictures as relative paths. `split` is ignored.

    Raises RowsError, also if the package `datasets` is needed but missing.
    """
    folder = _download(hub_id, configs, split) if local is None else local
    if not folder.is_dir():
        raise RowsError(f"there is no folder {folder} with a copy of {hub_id}: check the path")
    if (folder / ROWS).is_file():
        return rows_of(folder, [row for _, row in json_lines(folder / ROWS, RowsError)])
    saved = _saved_in(folder, configs)
    if saved:
        return _from_datasets(folder, [_load_saved(path, split) for path in saved])
    return _from_datasets(folder, [_load_parquet(_parquet_in(folder, hub_id, configs, split), split)])


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise RowsError(f"reading this data set requires the package `datasets`: {pip_command('eval')}") from None
    return datasets


def _from_datasets(folder: Path, parts: Sequence[Any]) -> Rows:
    whole = parts[0] if len(parts) == 1 else _datasets().concatenate_datasets(list(parts))
    cells = _Arrow(whole.with_format("arrow"))
    return Rows(str(folder), folder, tuple(whole.column_names), len(whole), cells.cell, cells.column)


def _saved_in(folder: Path, configs: Sequence[str]) -> list[Path]:
    """Directories written by save_to_disk: the folder itself, or one for each config. Empty if there are none."""
    parts = [folder / config for config in configs]
    for found in ([folder], parts):
        if found and all((path / mark).is_file() for path in found for mark in _marks(path)):
            return found
    return []


def _marks(path: Path) -> tuple[str, ...]:
    return ("dataset_dict.json",) if (path / "dataset_dict.json").is_file() else ("dataset_info.json", "state.json")


def _load_saved(path: Path, split: str) -> Any:
    datasets = _datasets()
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise RowsError(f'{path} has no split "{split}" (splits: {", ".join(saved)})')
    return saved[split]


def _parquet_in(folder: Path, hub_id: str, configs: Sequence[str], split: str) -> list[Path]:
    """The split's files, config by config, or those of a copy without config folders."""
    split_by_config = {config: sorted((folder / config).glob(f"{split}-*.parquet")) for config in configs}
    missing = [config for config, files in split_by_config.items() if not files]
    if missing and len(missing) < len(configs):
        raise RowsError(f'{folder} lacks the split "{split}" of {", ".join(missing)}: copy all of {hub_id}')
    whole = [file for files in split_by_config.values() for file in files]
    for place in (folder / "data", folder):
        whole = whole or sorted(place.glob(f"{split}-*.parquet"))
    if not whole:
        there = sorted({re.sub(r"-\d+-of-.*", "", path.stem) for path in folder.rglob("*.parquet")})
        has = f"it has {', '.join(there)}" if there else "it has no parquet files"
        raise RowsError(f'{folder} has no files of the split "{split}" of {hub_id}; {has}')
    return whole


def _load_parquet(files: Sequence[Path], split: str) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split)
    except Exception as error:  # datasets' or pyarrow's, or OSError if the disk is full
        because = first_line(error.__cause__ or error)
        raise RowsError(f"{files[0].parent} cannot be read: {because}. Is a file damaged, or the disk full?") from error


def _download(hub_id: str, configs: Sequence[str], split: str) -> Path:
    from huggingface_hub import snapshot_download

    _datasets()  # check before gigabytes are downloaded
    patterns = [f"{folder}/{split}-*.parquet" for folder in configs or ("data",)]
    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the client's, httpx's or requests' errors, or OSError
        raise RowsError(
            f"{hub_id} cannot be downloaded from the hub: {first_line(error)}. Try again, or download it elsewhere "
            f"(hf download {hub_id} --repo-type dataset --include '{patterns[0]}' --local-dir DATA/NAME, with the "
            "name of the data set as NAME) and pass --data DATA"
        ) from error

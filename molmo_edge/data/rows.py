"""Rows of a data set, from the hub or from a local copy, and pictures that a row names by URL.

A row's cells are read one by one, when they are asked for: a split's pictures may be many gigabytes. huggingface_hub
does the download, into its own cache, of one split alone (`datasets` would fetch the training split too); the
package `datasets` then reads the parquet files. No code of a hub repository is run.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.data.fetching import FetchError, NoAnswerError, OtherFileError, fetch_image
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
_BATCH = 10_000  # rows of a column that is read whole


class RowsError(MolmoEdgeError):
    """A data set that cannot be read, or rows that are not as expected."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one split, in their order."""

    where: str  # for people
    folder: Path  # what paths in cells are relative to
    columns: tuple[str, ...]
    length: int
    cell: Callable[[int, str], Any]  # (row, column) -> its value, pictures not decoded
    whole: Callable[[str], Iterable[Any]] | None = None  # column -> all its values; None: cell by cell

    def column(self, column: str) -> Iterator[Any]:
        """All values of one column, the others left unread: quick where there are millions of rows.

        Raises RowsError for a column that does not exist.
        """
        self.check(column)
        if self.whole is not None:
            return iter(self.whole(column))
        return (self.cell(index, column) for index in range(self.length))

    def check(self, column: str) -> None:
        """Raises RowsError for a column that does not exist."""
        if column not in self.columns:
            raise RowsError(
                f'{self.where} has no column "{column}", only {", ".join(self.columns)}: is it a copy of another data '
                "set?"
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
    """One row. It holds nothing: every access reads a cell."""

    rows: Rows
    index: int

    def __contains__(self, column: str) -> bool:
        return column in self.rows.columns

    def __getitem__(self, column: str) -> Any:
        """Raises RowsError for a column that does not exist."""
        self.rows.check(column)
        return self.rows.cell(self.index, column)

    def get(self, column: str) -> Any:
        """None for a column that does not exist."""
        return self.rows.cell(self.index, column) if column in self.rows.columns else None

    def image(self, column: str) -> Any:
        """What `molmo_edge.frontend.image_files.load_image` takes, bytes of a file or a path for the most part;
        None: no picture."""
        value = self[column]
        if isinstance(value, dict):  # the struct of datasets.Image
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return (find_file(self.rows.folder, value) or self.rows.folder / value) if value else None
        return value


def text_in(row: Row, value: Any, what: str, *, blank: bool = False) -> str:
    """`value`, which `row` has as `what`, if it is a text.

    Raises RowsError for anything else: None and NaN would become words of a question or an answer. Also for a text
    without a letter, unless `blank`.
    """
    if not isinstance(value, str) or not (blank or value.strip()):
        has = "no" if value is None or value == "" else f"{value!r} as its"
        raise RowsError(f"row {row.index} of {row.rows.where} has {has} {what}, where a text is needed")
    return value


def number_in(row: Row, value: Any, what: str) -> float:
    """`value`, which `row` has as `what`, as a finite number. Raises RowsError for anything else, NaN among it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowsError(f"row {row.index} of {row.rows.where} has {value!r} as {what}, where a number is needed")
    return number


def text_list(row: Row, column: str) -> list[str]:
    """A cell that is a list of texts, or the Python literal of such a list, as some data sets on the hub write it."""
    value = row[column]
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise RowsError(f"row {row.index} of {row.rows.where}: {column} is not a list: {value!r}") from None
    return [written_out(row, text, f"one of {column}") for text in value or ()]


def written_out(row: Row, value: Any, what: str) -> str:
    """A text as it is, a number in digits. Raises RowsError for None and NaN."""
    if isinstance(value, str):
        return value
    number_in(row, value, what)
    return f"{value}"


def rows_of(where: Path, listed: Sequence[dict[str, Any]]) -> Rows:
    """Rows that are in memory already. Paths in them are relative to the folder `where`."""
    columns = tuple(dict.fromkeys(column for row in listed for column in row))
    cells = _Listed(listed)
    return Rows(str(where), where, columns, len(listed), cells.cell, cells.column)


# Classes and not closures, because rows are copied to the processes that read ahead for a trainer.


@dataclass(frozen=True, eq=False)
class _Listed:
    listed: Sequence[dict[str, Any]]

    def cell(self, index: int, column: str) -> Any:
        return self.listed[index].get(column)

    def column(self, column: str) -> Iterator[Any]:
        return (row.get(column) for row in self.listed)


@dataclass(frozen=True, eq=False)
class _Arrow:
    """Of a `datasets.Dataset` in the format "arrow": a row is a slice of memory, nothing is decoded or copied."""

    dataset: Any

    def cell(self, index: int, column: str) -> Any:
        return self.dataset[index].column(column)[0].as_py()

    def column(self, column: str) -> Iterator[Any]:
        for batch in self.dataset.select_columns([column]).iter(_BATCH):
            yield from batch.column(0).to_pylist()


def load_rows(hub_id: str, configs: Sequence[str], split: str, local: Path | None) -> Rows:
    """The rows of `split`: from the folder `local`, or from the hub where that is None.

    `configs`: names of configurations, whose rows come one after the other; empty where the data set has but one.
    `local` is one of:
    - a clone or a download of the hub repository, with parquet files named after the split;
    - a directory that Dataset.save_to_disk or DatasetDict.save_to_disk has written (or one of them for each config);
    - a folder with rows.jsonl, one JSON object a row, pictures as paths relative to the folder. `split` plays no part.

    Raises RowsError, also where the package `datasets` is missing and needed.
    """
    folder = _download(hub_id, configs, split) if local is None else local
    if not folder.is_dir():
        raise RowsError(f"there is no folder {folder} with a copy of {hub_id}: check the path")
    if (folder / ROWS).is_file():
        return _from_jsonl(folder)
    saved = _saved_in(folder, configs)
    if saved:
        return _from_datasets(folder, [_load_saved(path, split) for path in saved])
    return _from_datasets(folder, [_load_parquet(_parquet_in(folder, hub_id, configs, split), split)])


def _from_jsonl(folder: Path) -> Rows:
    listed = []
    with (folder / ROWS).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                raise RowsError(f"line {number} of {folder / ROWS} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise RowsError(f"line {number} of {folder / ROWS} is not a JSON object")
            listed.append(row)
    return rows_of(folder, listed)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise RowsError(f"reading this data set needs the package `datasets`: {pip_command('eval')}") from None
    return datasets


def _from_datasets(folder: Path, parts: Sequence[Any]) -> Rows:
    whole = parts[0] if len(parts) == 1 else _datasets().concatenate_datasets(list(parts))
    cells = _Arrow(whole.with_format("arrow"))
    return Rows(str(folder), folder, tuple(whole.column_names), len(whole), cells.cell, cells.column)


def _saved_in(folder: Path, configs: Sequence[str]) -> list[Path]:
    """Directories of save_to_disk: the folder itself, or one for each config; none if that is not what it holds."""
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
        raise RowsError(f'{path} has no split "{split}", only {", ".join(saved)}')
    return saved[split]


def _parquet_in(folder: Path, hub_id: str, configs: Sequence[str], split: str) -> list[Path]:
    """The split's files, config by config. A copy that has all configs in one is taken as well."""
    split_by_config = {config: sorted((folder / config).glob(f"{split}-*.parquet")) for config in configs}
    missing = [config for config, files in split_by_config.items() if not files]
    if missing and len(missing) < len(configs):
        raise RowsError(f'{folder} lacks the split "{split}" of {", ".join(missing)}: copy {hub_id} whole')
    whole = [file for files in split_by_config.values() for file in files]
    for place in (folder / "data", folder):
        whole = whole or sorted(place.glob(f"{split}-*.parquet"))
    if not whole:
        there = sorted({re.sub(r"-\d+-of-.*", "", path.stem) for path in folder.rglob("*.parquet")})
        has = f"it has {', '.join(there)}" if there else "it has no parquet files at all"
        raise RowsError(f'{folder} has no files of the split "{split}" of {hub_id}; {has}')
    return whole


def _load_parquet(files: Sequence[Path], split: str) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split)
    except Exception as error:  # of datasets, of pyarrow, and OSError from a disk that is full
        because = first_line(error.__cause__ or error)
        raise RowsError(f"{files[0].parent} cannot be read: {because}. Is a file damaged, or the disk full?") from error


def _download(hub_id: str, configs: Sequence[str], split: str) -> Path:
    from huggingface_hub import snapshot_download

    _datasets()  # or its absence would be found out after some gigabytes
    patterns = [f"{folder}/{split}-*.parquet" for folder in configs or ("data",)]
    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the client's own errors, httpx's or requests', and OSError from the disk
        raise RowsError(
            f"{hub_id} cannot be had from the hub: {first_line(error)}. Ask again, or fetch it elsewhere "
            f"(hf download {hub_id} --repo-type dataset --include '{patterns[0]}' --local-dir DATA/NAME, NAME "
            "as the data set is called here) and pass --data DATA"
        ) from error

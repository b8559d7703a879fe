"""Data loaders whose workers return this package's errors as values and exit together with the main process."""

from __future__ import annotations

import atexit
import multiprocessing.util  # imported here: it registers its own end of workers with atexit
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from molmo_edge.errors import MolmoEdgeError

T = TypeVar("T", covariant=True)


class Loader(DataLoader[T]):
    """A DataLoader that raises a MolmoEdgeError of its data set or of `collate` unchanged, for any `num_workers`.

    PyTorch's own replaces the message of an error in a worker by the worker's traceback. Here the worker returns the
    error in place of the batch, and the iterator raises it. Other exceptions are faults of the program and keep the
    traceback.

    Args:
        data: Maps an index, or what `batch_sampler` draws, to an item.
        collate: Makes a batch from a list of items.
        options: Those of `torch.utils.data.DataLoader`.
    """

    def __init__(self, data: Dataset[Any], *, collate: Callable[[list[Any]], T], **options: Any):
        super().__init__(_Items(data), collate_fn=_Batches(collate), **options)

    def __iter__(self) -> Any:
        """The batches. Workers start here, and are killed when this process exits for any reason.

        Workers may ignore SIGTERM (see `ignore_interrupts`), which multiprocessing sends at exit before it
        waits for them: without this, a run that fails while a traceback holds the iterator would never exit.
        """
        before = set(multiprocessing.active_children())
        batches = super().__iter__()
        for worker in set(multiprocessing.active_children()) - before:
            atexit.register(_kill, worker)  # runs before what multiprocessing registered when it was imported
        return _raised(batches)


def _raised(batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        if isinstance(batch, MolmoEdgeError):
            del batches  # ends the workers
            raise batch
        yield batch


def _kill(worker: BaseProcess) -> None:
    """Called at exit. PyTorch's handler of SIGCHLD would raise an error because its worker was killed."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    worker.kill()


class _Items(Dataset[Any]):
    def __init__(self, data: Dataset[Any]):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # asked only where no batch_sampler is given

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.data[index]
        except MolmoEdgeError as error:
            return error


@dataclass(frozen=True)
class _Batches(Generic[T]):
    collate: Callable[[list[Any]], T]

    def __call__(self, items: list[Any]) -> T | MolmoEdgeError:
        try:
            for item in items:
                if isinstance(item, MolmoEdgeError):
                    return item
            return self.collate(items)
        except MolmoEdgeError as error:
            return error

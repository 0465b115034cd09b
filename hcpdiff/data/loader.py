"""Batches in the plan's order, made ahead: by loader processes, or by one thread where there is nothing to decode.

The order and content of batches do not depend on the number of workers. A DataError of a worker comes up in the main process as itself.
"""

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .plan import MicroBatch, Position, Step
from .sample import Batch, BatchMaker

T = TypeVar("T")
_AHEAD = 4  # batches made ahead per worker, or by the thread

StepBatches = tuple[Step, list[Position], list[Batch]]


class _Failed:
    """What a worker sends instead of a batch: DataLoader would turn the error into text with a traceback in it."""

    def __init__(self, faults: list[str]):
        self.faults = faults


class _Batches(Dataset):
    """A map from micro-batches (the sampler's items) to batches, whose tensors travel as arrays.

    Tensors would go through shared memory and file descriptors, of which containers (64 MiB of /dev/shm) and shells (1024 files) have little.
    """

    def __init__(self, maker: BatchMaker):
        self.maker = maker

    def __getitem__(self, micro: MicroBatch) -> dict[str, Any] | _Failed:
        try:
            parts = vars(self.maker.make(micro))
            return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in parts.items()}
        except DataError as error:
            return _Failed(error.faults)


def _as_is(item: T) -> T:
    return item


def _start_worker(number: int) -> None:
    """Signals that reach the whole group or job are for the main process, which ends its workers when it has finished its step."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))  # a second one ends it: the main process's last means
    torch.set_num_threads(1)


def step_batches(steps: Iterator[tuple[Step, list[Position]]], maker: BatchMaker, attach: Callable[[Batch, MicroBatch], Batch], rank: int, world: int,
                 workers: int) -> Iterator[StepBatches]:
    """(step, positions after it, this rank's batches) for each step; `attach` completes a batch in the main process."""
    if workers > 0:
        return _by_workers(steps, maker, attach, rank, world, workers)
    made = ((step, after, [attach(maker.make(micro), micro) for micro in step.of_rank(rank, world)]) for step, after in steps)
    return ahead(made, _AHEAD)


def _by_workers(steps: Iterator[tuple[Step, list[Position]]], maker: BatchMaker, attach: Callable[[Batch, MicroBatch], Batch], rank: int, world: int,
                workers: int) -> Iterator[StepBatches]:
    asked: deque[tuple[Step, list[Position], Sequence[MicroBatch]]] = deque()

    def sampler() -> Iterator[MicroBatch]:  # runs in the main process, some steps ahead of the batches
        for step, after in steps:
            mine = step.of_rank(rank, world)
            asked.append((step, after, mine))
            yield from mine

    loader = DataLoader(_Batches(maker), sampler=_Endless(sampler), batch_size=None, num_workers=workers, collate_fn=_as_is, worker_init_fn=_start_worker,
                        multiprocessing_context="spawn", prefetch_factor=_AHEAD)
    batches = iter(loader)
    while asked:  # the loader always has batches under way, hence steps in `asked`, until the steps are at their end
        step, after, mine = asked.popleft()
        yield step, after, [attach(_whole(next(batches)), micro) for micro in mine]


def _whole(item: dict[str, Any] | _Failed) -> Batch:
    if isinstance(item, _Failed):
        raise DataError(item.faults)
    return Batch(**{name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in item.items()})


class _Endless:
    """A sampler without a length."""

    def __init__(self, make: Callable[[], Iterator[MicroBatch]]):
        self.make = make

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.make()


def ahead(items: Iterator[T], most: int) -> Iterator[T]:
    """The same items, made up to `most` ahead in a thread that ends when this iterator does; an error in making one is raised in its turn."""
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="hcpdiff-batches")
    try:
        pending = deque(pool.submit(next, items, end) for _ in range(most))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

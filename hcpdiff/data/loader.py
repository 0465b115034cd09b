"""Batches in the plan's order, made ahead: by loader processes, or by one thread where there is nothing to decode.

The order and content of batches do not depend on the number of workers. A DataError of a worker comes up in the main process as itself.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import HCPError
from .plan import MicroBatch, Position, Step
from .sample import Batch, BatchMaker

T = TypeVar("T")
_AHEAD = 4  # batches made ahead per worker, or by the thread

StepBatches = tuple[Step, list[Position], list[Batch]]
_maker: BatchMaker  # a worker's own


def _start_worker(maker: BatchMaker) -> None:
    """Signals that reach the whole group or job are for the main process, which ends its workers when it has finished its step."""
    global _maker
    _maker = maker
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))  # a second one ends it: the main process's last means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A main process that was killed tells nobody: its workers would wait for it for ever."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _make(micro: MicroBatch) -> dict[str, Any]:
    """In a worker: a batch whose tensors travel as arrays. Tensors would go through shared memory and file descriptors, of which containers
    (64 MiB of /dev/shm) and shells (1024 files) have little."""
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in vars(_maker.make(micro)).items()}


def step_batches(steps: Iterator[tuple[Step, list[Position]]], maker: BatchMaker, attach: Callable[[Batch, MicroBatch], Batch], rank: int, world: int,
                 workers: int) -> Generator[StepBatches, None, None]:
    """(step, positions after it, this rank's batches) for each step; `attach` completes a batch in the main process."""
    if workers > 0:
        return _by_workers(steps, maker, attach, rank, world, workers)
    made = ((step, after, [attach(maker.make(micro), micro) for micro in step.of_rank(rank, world)]) for step, after in steps)
    return ahead(made, _AHEAD)


def _by_workers(steps: Iterator[tuple[Step, list[Position]]], maker: BatchMaker, attach: Callable[[Batch, MicroBatch], Batch], rank: int, world: int,
                workers: int) -> Generator[StepBatches, None, None]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (maker,))
    try:
        waiting: deque[tuple[Step, list[Position], list[tuple[Future, MicroBatch]]]] = deque()
        asked = 0
        for step, after in steps:
            waiting.append((step, after, [(pool.submit(_make, micro), micro) for micro in step.of_rank(rank, world)]))
            asked += len(waiting[-1][2])
            while waiting and asked > workers * _AHEAD:
                asked -= len(waiting[0][2])
                yield _arrived(*waiting.popleft(), attach)
        while waiting:
            yield _arrived(*waiting.popleft(), attach)
    except BrokenProcessPool as error:
        raise HCPError("a process that loads images has ended. Was it killed because the main memory was full? Lower train.workers, or set cache_latents, which needs none.") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _arrived(step: Step, after: list[Position], batches: list[tuple[Future, MicroBatch]], attach: Callable[[Batch, MicroBatch], Batch]) -> StepBatches:
    return step, after, [attach(_whole(future.result()), micro) for future, micro in batches]


def _whole(parts: dict[str, Any]) -> Batch:
    return Batch(**{name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in parts.items()})


def ahead(items: Iterator[T], most: int) -> Generator[T, None, None]:
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

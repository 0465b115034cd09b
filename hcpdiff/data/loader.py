"""Batches in the plan's order, made ahead: by loader processes, or by one thread where there is nothing to decode.

The order and content of batches do not depend on the number of workers. An error of a worker comes up in the main process as itself.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import DataError, HCPError
from .plan import MicroBatch, Position, Step
from .sample import Batch, BatchMaker

T = TypeVar("T")
_AHEAD = 4  # batches made ahead per worker, or by the thread
_LAST_WORDS = 10.0  # seconds from a worker's falling silent to its end
_UNHEARD = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGBREAK") if hasattr(signal, name))

StepBatches = tuple[Step, list[Position], list[Batch]]


def step_batches(steps: Iterator[tuple[Step, list[Position]]], maker: BatchMaker, attach: Callable[[Batch, MicroBatch], Batch], rank: int, world: int,
                 workers: int) -> Generator[StepBatches, None, None]:
    """(step, positions after it, this rank's batches) for each step; `attach` completes a batch in the main process."""
    if workers > 0:
        return _by_workers(steps, maker, attach, rank, world, workers)
    made = (_made(step, after, maker, attach, rank, world) for step, after in steps)
    return ahead(made, _AHEAD)


def _made(step: Step, after: list[Position], maker: BatchMaker, attach: Callable[[Batch, MicroBatch], Batch], rank: int, world: int) -> StepBatches:
    with _enough_memory():
        return step, after, [attach(maker.make(micro), micro) for micro in step.of_rank(rank, world)]


@contextmanager
def _enough_memory() -> Iterator[None]:
    """DataError where there is not: torch has an error of its own for its tensors."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise DataError("no main memory was left to make a batch. A smaller batch_size, fewer train.workers, and latents in a disk cache (cache_latents: disk) each need less.") from error


def _make(maker: BatchMaker, micro: MicroBatch) -> Batch:
    with _enough_memory():
        return maker.make(micro)


def _by_workers(steps: Iterator[tuple[Step, list[Position]]], maker: BatchMaker, attach: Callable[[Batch, MicroBatch], Batch], rank: int, world: int,
                workers: int) -> Generator[StepBatches, None, None]:
    pool = _Workers(workers, maker)
    try:
        waiting: deque[tuple[Step, list[Position], list[tuple[Future, MicroBatch]]]] = deque()
        asked = 0
        for step, after in steps:
            waiting.append((step, after, [(pool.submit(micro), micro) for micro in step.of_rank(rank, world)]))
            asked += max(1, len(waiting[-1][2]))  # a rank may have nothing for long: it does not look through the whole plan for that
            while waiting and asked > workers * _AHEAD:
                asked -= max(1, len(waiting[0][2]))
                yield _arrived(*waiting.popleft(), attach)
        while waiting:
            yield _arrived(*waiting.popleft(), attach)
    finally:
        pool.close()


def _arrived(step: Step, after: list[Position], batches: list[tuple[Future, MicroBatch]], attach: Callable[[Batch, MicroBatch], Batch]) -> StepBatches:
    with _enough_memory():
        return step, after, [attach(_whole(future.result()), micro) for future, micro in batches]


def _whole(parts: dict[str, Any]) -> Batch:
    return Batch(**{name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in parts.items()})


class _Workers:
    """Processes that make batches. Each has a pipe and, in the main process, a thread that waits for it alone: one that is killed, in whatever it does, leaves
    nobody waiting, as it would with queues and locks that all share."""

    def __init__(self, count: int, maker: BatchMaker):
        self._maker, self._closed, self._processes, self._without = pickle.dumps(maker, pickle.HIGHEST_PROTOCOL), False, [], count
        self._threads, self._own, self._starting = ThreadPoolExecutor(count, thread_name_prefix="hcpdiff-batches"), threading.local(), threading.Lock()

    def submit(self, micro: MicroBatch) -> Future:
        """The parts of its batch, to come."""
        return self._threads.submit(self._ask, micro)

    def close(self) -> None:
        """Ends the processes wherever they are: they write nothing that could be lost."""
        with self._starting:
            self._closed = True
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.join()

    def _ask(self, micro: MicroBatch) -> dict[str, Any]:
        if not hasattr(self._own, "process"):
            self._start()
        pipe, process = self._own.pipe, self._own.process
        try:
            pipe.send_bytes(pickle.dumps(micro))
            connection.wait([pipe, process.sentinel])
            if not pipe.poll():
                raise EOFError
            answer = pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise _ended(process) from error
        parts, error, where = pickle.loads(answer)
        if error is not None:
            error.add_note(where)
            raise error
        return parts

    def _start(self) -> None:
        """In a thread, where no signal's handler runs, which could break off what it does in the middle."""
        with self._starting:
            if self._closed:
                raise CancelledError
            try:
                self._own.pipe, theirs = multiprocessing.Pipe()
                with theirs:
                    process = multiprocessing.get_context("spawn").Process(target=_work, args=(theirs,), name="hcpdiff-loader")
                    _hold_signals_back()
                    process.start()
            except OSError as error:
                raise HCPError(f"a process that loads images could not be started: {error.strerror or error}. Lower train.workers.") from error
            self._processes.append(process)
            self._own.process = process
        # It reads this when it has imported torch. Among what it is started with, more than a pipe holds would be waited for with the lock, and for ever where it dies.
        try:
            self._own.pipe.send_bytes(self._maker)
        except OSError as error:
            raise _ended(process) from error
        with self._starting:
            self._without -= 1
            if not self._without:
                self._maker = b""  # of a million images it is some 250 MB


def _hold_signals_back() -> None:
    """Of this thread, and so of the processes that it starts, until they have said what they do with them: seconds later, since they import torch first."""
    if hasattr(signal, "pthread_sigmask"):
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # starting it lets some through again
        signal.pthread_sigmask(signal.SIG_BLOCK, _UNHEARD)


def _ended(process: multiprocessing.Process) -> HCPError:
    process.join(_LAST_WORDS)
    code = process.exitcode
    if code == -getattr(signal, "SIGKILL", 9):
        return HCPError("a process that loads images was killed (SIGKILL): was the main memory full? Lower train.workers, or set cache_latents: memory or disk, "
                        "which needs none.")
    if code is not None and code < 0:
        return HCPError(f"a process that loads images was ended by {signal.Signals(-code).name}; what it said, if anything, stands above.")
    return HCPError(f"a process that loads images has ended with exit code {code}; what it said stands above.")


# -- in a worker ------------------------------------------------------------------------------------------------------------------------------


def _work(pipe: connection.Connection) -> None:
    """Signals that reach the whole group or job are for the main process, which ends its workers when it has finished its step."""
    for number in _UNHEARD:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _UNHEARD)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):  # the main process has no more use for it
        maker = pipe.recv()
        while True:
            pipe.send_bytes(_answer(maker, pipe.recv()))


def _end_with_parent() -> None:
    """A main process that was killed tells nobody: its workers would first make what they are at."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _answer(maker: BatchMaker, micro: MicroBatch) -> bytes:
    """(a batch's parts, None, ''), or (None, an error, where it came from). Tensors travel as arrays: they would go through shared memory and file descriptors,
    of which containers (64 MiB of /dev/shm) and shells (1024 files) have little."""
    try:
        parts = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in vars(_make(maker, micro)).items()}
        return pickle.dumps((parts, None, ""), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        where = f"In a loader process:\n{traceback.format_exc()}"
        try:
            answer = pickle.dumps((None, error, where))
            pickle.loads(answer)  # some cannot be made again from what they are pickled as
            return answer
        except Exception:
            return pickle.dumps((None, RuntimeError(f"{type(error).__name__} in a loader process"), where))


# -- without one ------------------------------------------------------------------------------------------------------------------------------


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

"""Work beside the main thread, in order: shared out among threads, made ahead by ones that can give way to it, or finished behind it. Imports no torch."""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")
_PIECE = 32  # items that a thread is given at a time: what the pool keeps of each call is 1.5 KB
_GIVE_WAY = 5  # steps of niceness: a quarter of a core where torch wants it too, all of it where not; more would starve beside other programs

_here = threading.local()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mapped(work: Callable[[T], R], items: Sequence[T], most: int) -> Iterator[R]:
    """work(item) of each, in order, by `most` threads: for many small pieces of work that wait on the disk or release the interpreter lock. All of them at once:
    what they give is kept until it is asked for. When this ends early, each thread ends with the item that it is at."""
    piece, over = max(1, min(_PIECE, len(items) // (4 * most))), threading.Event()

    def work_on(first: int) -> list[R]:
        return [work(item) for item in items[first:first + piece] if not over.is_set()]

    with ThreadPoolExecutor(most) as pool:
        try:
            for results in pool.map(work_on, range(0, len(items), piece)):
                yield from results
        finally:
            over.set()


def prepared(work: Callable[[T], R], items: Sequence[T], most: int, ahead: int | None = None) -> Iterator[tuple[T, R]]:
    """(item, work(item)) in order, some made ahead by at most `most` threads, which may `give_way`. Close it to stop them.

    ahead: how many are begun or made beside the one that is out, at least one; never more than two for a thread, which is None's meaning.
    """
    threads = max(1, min(most, usable_cores(), len(items)))
    ahead = 2 * threads if ahead is None else max(1, min(ahead, 2 * threads))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="hcpdiff-ahead")
    try:
        waiting: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > ahead:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def give_way() -> None:
    """Lower this thread's priority, once and for good; never the main one's. torch's threads wait for the slowest of them, so one that has to share its core
    slows all. Linux only: there niceness is a thread's and not the process's."""
    if sys.platform == "linux" and not getattr(_here, "gave_way", False):
        _here.gave_way = True
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + _GIVE_WAY))


def behind(started: Iterable[T], finish: Callable[[T], R], most: int) -> Iterator[R]:
    """finish(item) of each, in order, in one thread while later items are made, at most `most` of them (0: each is finished before the next is begun).

    What was started is finished whatever happens, before an error goes on; is `started` a generator, it is closed first. Close it where an error can come
    between two results.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="hcpdiff-behind")
    try:
        waiting: deque[Future[R]] = deque()
        for item in started:
            waiting.append(pool.submit(finish, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        try:
            if isinstance(started, Generator):
                started.close()  # what it makes ahead is stopped now, and not when an error that holds it is forgotten
        finally:
            pool.shutdown(wait=True)

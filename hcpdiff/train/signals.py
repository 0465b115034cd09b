"""Signals of a training run. The first one is a wish: a step is finished and saved. A second one, seconds later, is an order, also while something long runs.

Python tells of a signal only between two of its own instructions, so a call of seconds (reading a file, a step on the device) would hold it back, and would make one
wish of two. A thread therefore reads the numbers of signals from a pipe as they arrive. It also asks, once a second, the questions in `looks`:
does the launcher still live, do the other processes.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import Interrupted

PATIENCE = 3.0  # seconds within which a repeated signal counts as the same wish: launchers forward what the terminal has sent already
UNWIND = 10.0  # seconds that a process which has to end at once gets for putting away what it has open
TICK = 1.0  # seconds between two looks
SLOW = f"ended: what was under way did not end within {UNWIND:.0f} s"
WISHES = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))


class StopRequest:
    """Used as a context manager around a run; `signal` is the number of the signal that came, or 0, and `came` the time.monotonic() at which the last one did.

    Outside of `patiently` the first signal raises Interrupted, and inside it is noted. A later one raises Interrupted anywhere; a process that is still there
    after `UNWIND` seconds is ended. `looks` are functions that the thread calls once a second; `told`, if there is one, is called with the number of a signal that is
    noted, as soon as it has come, in a thread of its own: who answers may have to wait for a terminal.
    """

    def __init__(self):
        self.signal, self.came, self.looks = 0, 0.0, []
        self.told: Callable[[int], object] | None = None
        self._first = self._forced = self._patient = self._leaving = self._done = False
        self._before, self._deadline, self._thread = {}, None, None
        self._sending, self._number, self._own, self._sent = threading.Lock(), 0, 0, 0.0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():  # elsewhere Python lets nobody listen
            return self
        self._read, self._write = socket.socketpair()
        self._read.settimeout(TICK)
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        kept = [number for number in WISHES if not (number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN)]  # nohup's wish
        self._before = {number: signal.signal(number, self._came) for number in kept}
        self._thread = threading.Thread(target=self._watch, name="hcpdiff-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._thread is None:
            return
        with self._sending:  # what is sent later would meet Python's own handlers
            self._done = True
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._write.close()  # wakes the thread
        self._thread.join(2 * TICK)
        self._read.close()

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Inside, a first signal is only noted: who runs the steps looks at `signal`."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count it."""
        return 128 + (self.signal or signal.SIGTERM)

    def ask(self, number: int) -> None:
        """As if the signal had come, unless one has. For the thread's looks."""
        if not self._first and self._thread is not None:
            self._send(number)

    def leave(self, code: int, why: str = "") -> None:
        """This process is ending: a first wish means nothing any more, and after `UNWIND` seconds the process is ended with `code`, saying `why`. For any thread."""
        self._leaving = True
        self._end_by_force(code, why)

    def _end_by_force(self, code: int, why: str) -> None:
        """After `UNWIND` seconds, unless that is to come already."""
        if self._deadline is None:
            self._deadline = (time.monotonic() + UNWIND, code, why)

    def _came(self, number: int, frame) -> None:
        """Python's handler, in the main thread, some time after the signal."""
        first, self.signal, self.came = not self.signal, self.signal or number, self._first or time.monotonic()
        if self._forced or (first and not self._patient and not self._leaving):
            self._forced = False
            raise Interrupted(self.signal, at_once=not first)

    def _watch(self) -> None:
        while not self._done:
            try:
                arrived = self._read.recv(64)
            except TimeoutError:
                arrived, self._own = b"", 0
            except OSError:
                return
            for number in arrived:
                self._arrived(number)
            if not self._done:
                for look in self.looks:
                    look()
                self._remind()
                self._end_in_time()

    def _arrived(self, number: int) -> None:
        if number not in self._before:
            return
        if self._own:
            self._own -= 1
            return
        now = time.monotonic()
        if not self._first:
            self._first, self._number = now, number
            if self._patient and self.told is not None:
                threading.Thread(target=self.told, args=(number,), name="hcpdiff-told", daemon=True).start()
            if not self._patient and not self._leaving:
                self._end_by_force(128 + number, SLOW)  # no more than that: the handler, if it has not run yet, is to raise
        elif now - self._first > PATIENCE and not self._forced:
            self._first = now
            self.leave(128 + self._number, SLOW)
            self._forced = True

    def _remind(self) -> None:
        """Python's handler is late, or what came just before a waiting call began did not end it: once more, each second."""
        if (self._forced or self._first and not self.signal) and time.monotonic() - self._sent > TICK:
            self._sent = time.monotonic()
            self._own += 1
            self._send(self._number)

    def _send(self, number: int) -> None:
        """To the main thread, whose waiting (sleep, read) it ends."""
        with self._sending:
            if self._done:
                return
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident, number)
            else:
                signal.raise_signal(number)

    def _end_in_time(self) -> None:
        if self._deadline and not self._done and time.monotonic() > self._deadline[0]:
            if self._deadline[2]:
                print(self._deadline[2], file=sys.stderr, flush=True)
            os._exit(self._deadline[1])


def orphaned(stop: StopRequest, parent: int) -> Callable[[], None]:
    """A look that asks for a stop once the process `parent` is not our parent any more: it has died without a word to us.

    Windows keeps the number of a parent that is gone, so nothing is seen there.
    """
    def look() -> None:
        if os.getppid() != parent:
            stop.ask(signal.SIGTERM)

    return look

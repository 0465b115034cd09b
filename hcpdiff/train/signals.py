"""SIGINT and SIGTERM while training: the step is finished and saved first; a second one, seconds later, stops at once."""

import signal
import threading
import time

PATIENCE = 3.0  # seconds within which a repeated signal counts as the same wish: launchers forward what the terminal has sent already


class StopRequest:
    """Used as a context manager around the loop; `signal` is the number of the signal that came, or 0."""

    def __init__(self):
        self.signal, self.since, self.before = 0, 0.0, {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody listen
            self.before = {number: signal.signal(number, self._came) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _came(self, number: int, frame) -> None:
        if self.signal and time.monotonic() - self.since > PATIENCE:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.since = number, time.monotonic()

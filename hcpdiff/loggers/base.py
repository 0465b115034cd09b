"""The contract of a logger; every method is a no-op here, so that a logger implements what it shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Logger:
    """One place to which a run reports; only rank 0 has loggers."""

    def open(self, folder: Path, first_step: int, total_steps: int) -> None:
        """The run folder exists; the next step is `first_step` (0-based) of `total_steps`."""

    def say(self, renderable: Any) -> None:
        """A line of text or a rich renderable (a table)."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one optimizer step (1-based)."""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """What a reader of the console wants at the log interval: loss, lr, steps per second, seconds left."""

    def advance(self, step: int) -> None:
        """`step` steps are done."""

    def images(self, step: int, tag: str, images: Sequence) -> None:
        """Pictures (PIL) drawn at a step."""

    def flush(self) -> None:
        """A save has happened: what was logged should be on disk."""

    def close(self) -> None:
        """The run is over."""


def _each(name: str):
    def call(self, *args, **kwargs) -> None:
        for logger in self.loggers:
            getattr(logger, name)(*args, **kwargs)

    return call


class LoggerGroup(Logger):
    """Several loggers as one."""

    def __init__(self, loggers: Sequence[Logger]):
        self.loggers = list(loggers)

    open, say, scalars, progress = _each("open"), _each("say"), _each("scalars"), _each("progress")
    advance, images, flush, close = _each("advance"), _each("images"), _each("flush"), _each("close")

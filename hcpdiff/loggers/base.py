"""The contract of a logger; every method is a no-op here, so that a logger implements what it shows."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, HCPError


def below(folder: Path, name: str) -> Path:
    """`folder / name`; ConfigError where that lies outside the folder, by '..' or by a link: a config or a run folder may be a stranger's."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"logger: {name!r} lies outside the run folder {folder}; loggers write inside it only.")
    return path


def checked_name(name: Any, key: str) -> str:
    """A name below the run folder, as a logger's constructor takes it; ConfigError for one that is none or leads out."""
    parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ()
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name or ":" in name:
        raise ConfigError(f"logger: {key} = {name!r} must be a name inside the run folder, such as 'train.log'.")
    return name


class Logger:
    """One place to which a run reports; only rank 0 has loggers."""

    def open(self, folder: Path, first_step: int, total_steps: int) -> None:
        """The run folder exists; the next step is `first_step` (0-based) of `total_steps`."""

    def say(self, renderable: Any) -> None:
        """A line of text or a rich renderable (a table)."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one optimizer step (1-based)."""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """What a reader of the console wants at the log interval: loss, lr; and steps per second and seconds left, where they are known."""

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
        with self.turn:
            for logger in self.loggers:
                try:
                    getattr(logger, name)(*args, **kwargs)
                except BrokenPipeError:  # nobody reads our output any more: the command line ends for it
                    raise
                except OSError as error:
                    self._failed(logger, error)

    return call


class LoggerGroup(Logger):
    """Several loggers as one. One that cannot write any more (a full disk) is told of once, by the others: it is no reason to lose a run.
    Threads take turns."""

    def __init__(self, loggers: Sequence[Logger]):
        if not all(isinstance(logger, Logger) for logger in loggers):
            raise ConfigError("logger: LoggerGroup is not for configs: list the loggers themselves.")
        self.loggers, self.told, self.turn = list(loggers), set(), threading.RLock()

    def open(self, folder: Path, first_step: int, total_steps: int) -> None:
        """As `Logger.open`; what cannot be written at the start is an HCPError."""
        for logger in self.loggers:
            try:
                logger.open(folder, first_step, total_steps)
            except OSError as error:
                raise HCPError(f"{type(logger).__name__} cannot write in {folder}: {error.strerror or error}.") from error

    def _failed(self, logger: Logger, error: OSError) -> None:
        if id(logger) in self.told:
            return
        self.told.add(id(logger))
        for other in self.loggers:
            if id(other) not in self.told:
                other.say(f"warning: {type(logger).__name__} cannot write: {error.strerror or error}. The run goes on; what it logs there may be incomplete from here on.")

    say, scalars, progress = _each("say"), _each("scalars"), _each("progress")
    advance, images, flush, close = _each("advance"), _each("images"), _each("flush"), _each("close")

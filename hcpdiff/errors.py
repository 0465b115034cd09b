"""Errors that are a user's to mend: one message that names every fault, no traceback, exit code 2."""

from collections.abc import Callable, Sequence


class HCPError(Exception):
    """A mistake in what the user gave. `faults` holds one line (or short paragraph) per fault.

    Each fault says which key or file, what it was, what is allowed and what to do.
    """

    exit_code = 2

    def __init__(self, faults: str | Sequence[str]):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self):  # faults survive the trip from a loader worker to the main process
        return type(self), (self.faults,)


class ConfigError(HCPError):
    """A fault in a config file, in the command line, or in an object that they describe."""


class DataError(HCPError):
    """A fault in images, captions, masks or caches."""


class ImageMemoryError(DataError):
    """An image that there was no main memory to read: nothing is known against its file."""


class FeedError(DataError):
    """A batch that could not be made in the midst of training. Steps are whole, and what they came to is saved where that could be done."""


class LayerMatchError(ConfigError):
    """A layer pattern that matches nothing, or a layer that two groups claim."""


class CheckpointError(HCPError):
    """A weight file or a training state that cannot be read, written or understood."""


class NonFiniteError(HCPError):
    """Training produced NaN or infinity too many times in a row; the last good checkpoint is kept."""

    exit_code = 3


class PeerError(HCPError):
    """Another process of the run has ended without saying why (killed, crashed, out of reach)."""

    exit_code = 4


class Interrupted(KeyboardInterrupt):
    """A signal ends the run where it is. `signal` is its number, `at_once` whether it is the second one; the text says what is there to go on from."""

    def __init__(self, number: int, at_once: bool = False):
        super().__init__(f"{'stopped at once' if at_once else 'stopped'} by {signal_name(number)}")
        self.signal, self.at_once, self.exit_code = number, at_once, 128 + number


def signal_name(number: int) -> str:
    """What a user calls it."""
    return _NAMES.get(number, f"signal {number}")


_NAMES = {1: "SIGHUP (the terminal was closed)", 2: "Ctrl+C (SIGINT)", 15: "SIGTERM"}


def collect(faults: list[str], *checks: Callable[[], object]) -> None:
    """Runs checks, one after the other, and keeps the faults of each, so that all are told in one message."""
    for check in checks:
        try:
            check()
        except HCPError as error:
            faults += error.faults

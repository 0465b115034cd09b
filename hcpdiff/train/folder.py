"""The run folder: where it is, and what it refuses."""

import os
from pathlib import Path

from ..checkpoint.resume import states
from ..errors import ConfigError


def check(exp_dir: str, automatic: bool) -> None:
    """ConfigError if `claim` would refuse, found before anything that takes time."""
    folder = Path(exp_dir)
    if not automatic and folder.is_dir() and any(folder.iterdir()):
        way = f", or go on there with train.resume={exp_dir}" if states(folder) else " (it holds no training state to go on from)"
        raise ConfigError(f"exp_dir = {exp_dir!r} is not empty. Choose another{way}.")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"exp_dir = {exp_dir!r} cannot be made: {there} is a file, not a folder.")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"exp_dir = {exp_dir!r} cannot be made: {there} is not writable.")


def claim(exp_dir: str, automatic: bool) -> Path:
    """Makes the run folder with ckpts/ in it. An automatic name (from the clock) that is taken gets a suffix; a chosen one must be new or empty."""
    check(exp_dir, automatic)
    folder = Path(exp_dir)
    if automatic:
        folder = next(path for path in _suffixed(folder) if not path.exists())
    try:
        (folder / "ckpts").mkdir(parents=True, exist_ok=not automatic)
    except OSError as error:
        raise ConfigError(f"exp_dir = {exp_dir!r} cannot be made: {error.strerror}.") from error
    return folder


def _suffixed(folder: Path):
    yield folder
    for number in range(2, 10_000):
        yield folder.with_name(f"{folder.name}-{number}")

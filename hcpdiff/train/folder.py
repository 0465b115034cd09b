"""The run folder: where it is, what it refuses, and the lock that keeps a second run out."""

import os
from pathlib import Path

from ..checkpoint.runs import states
from ..errors import ConfigError
from . import lock
from .lock import RunLock


def check(exp_dir: str, automatic: bool) -> None:
    """ConfigError if `claim` would refuse, found before anything that takes time."""
    try:
        _check(Path(exp_dir), exp_dir, automatic)
    except OSError as error:
        raise ConfigError(f"exp_dir = {exp_dir!r} cannot be looked at: {error.strerror or error}.") from error


def _check(folder: Path, exp_dir: str, automatic: bool) -> None:
    if not automatic and folder.is_dir():
        if lock.is_held(folder):
            raise ConfigError(f"exp_dir = {exp_dir!r}: {lock.busy(folder)}")
        _check_empty(folder, exp_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"exp_dir = {exp_dir!r} cannot be made: {there} is a file, not a folder.")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"exp_dir = {exp_dir!r} cannot be made: {there} is not writable.")


def _check_empty(folder: Path, exp_dir: str) -> None:
    if any(path.name != lock.NAME for path in folder.iterdir()):
        way = f", or go on there with train.resume={exp_dir}" if states(folder) else " (it holds no training state to go on from)"
        raise ConfigError(f"exp_dir = {exp_dir!r} is not empty. Choose another{way}.")


def claim(exp_dir: str, automatic: bool) -> tuple[Path, RunLock]:
    """Makes the run folder with ckpts/ in it and locks it. An automatic name (from the clock) that is taken gets a suffix; a chosen one must be new or empty.

    Two runs that come at the same moment never get one folder: making a folder succeeds for one of them, and so does locking it.
    """
    check(exp_dir, automatic)
    folder = Path(exp_dir)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder = _new(folder) if automatic else folder
        folder.mkdir(exist_ok=True)
        held = RunLock(folder)
        try:
            if not automatic:
                _check_empty(folder, exp_dir)
            (folder / "ckpts").mkdir()
        except BaseException:
            held.release()
            raise
    except OSError as error:
        raise ConfigError(f"exp_dir = {exp_dir!r} cannot be made: {error.strerror}.") from error
    return folder, held


def _new(folder: Path) -> Path:
    """The first of folder, folder-2, folder-3 ... that nobody has, made."""
    for number in range(1, 10_000):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise ConfigError(f"exp_dir = {str(folder)!r}: this name and 9,999 like it are taken.")

"""One run in a folder at a time: a file lock that the operating system releases when its holder ends, however it ends."""

import contextlib
import errno
import json
import os
import socket
from pathlib import Path

from ..errors import ConfigError

NAME = ".lock"
_PLACE = 1 << 30  # Windows keeps others from reading the bytes that are locked: one far behind the text


class RunLock:
    """The lock of a run folder, held from the start to `release`. `note` says when the file system has no locks (then nothing is promised)."""

    def __init__(self, folder: Path):
        """ConfigError that names the holder, if there is one. The folder must be there."""
        self.note = ""
        try:
            self.handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise ConfigError(f"{folder / NAME} cannot be written: {error.strerror}. A run needs to write in its folder.") from error
        try:
            _take(self.handle)
        except OSError as error:
            if _held(error):
                os.close(self.handle)
                raise ConfigError(busy(folder)) from None
            self.note = f"the file system of {folder} has no locks ({error.strerror}): nothing keeps a second run out of the folder."
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode("utf-8"))

    def _write(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # who holds it is a courtesy
            os.ftruncate(self.handle, 0)
            os.lseek(self.handle, 0, os.SEEK_SET)
            os.write(self.handle, text)

    def release(self) -> None:
        """Lets go. The file stays: taking it away could take it from another run that has just come."""
        if self.handle is not None:
            self._write(b"")
            os.close(self.handle)
            self.handle = None


def busy(folder: Path) -> str:
    """The fault: who is at work in the folder."""
    try:
        holder = json.loads((folder / NAME).read_text(encoding="utf-8"))
        who = f"process {int(holder['pid'])} on {str(holder['host'])[:100]}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return f"a run is at work in {str(folder)!r} ({who}). Wait until it is done or stop it, or choose another exp_dir."


def is_held(folder: Path) -> bool:
    """Whether another run holds the folder's lock at this moment."""
    try:
        handle = os.open(folder / NAME, os.O_RDWR)
    except OSError:
        return False
    try:
        _take(handle)
    except OSError as error:
        return _held(error)
    finally:
        os.close(handle)
    return False


def refuse_busy(folder: Path) -> None:
    """ConfigError where a run is at work in the folder; a run that wants to work there looks again, with the lock."""
    if is_held(folder):
        raise ConfigError(busy(folder))


def _held(error: OSError) -> bool:
    return error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)


if os.name == "nt":
    import msvcrt

    def _take(handle: int) -> None:
        os.lseek(handle, _PLACE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _take(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

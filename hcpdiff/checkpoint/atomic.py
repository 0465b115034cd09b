"""Files that are there whole or not at all. Needs no torch."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError


class _Hashed:
    """A binary stream to write to, and the digest of what was written: of the bytes that were meant, not of those that a disk made of them."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self.file.write(data)


def write_atomic(path: Path | str, write: Callable[[BinaryIO], None], check: Callable[[Path], None] | None = None) -> str:
    """Makes the file at `path` (and its folder) from what `write` puts into a binary stream; it appears complete or not at all.

    The SHA-256 (hex) of what was written comes back.

    The bytes go to a temporary name in the same folder, are flushed to the disk, shown to `check` (which may raise) and renamed.
    CheckpointError names the file when it cannot be written; whatever `write` or `check` raise passes through. No temporary file is left.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir this answers where nobody may look, too
        raise CheckpointError(f"{path} cannot be written: it is a folder.")
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            hashed = _Hashed(file)
            write(hashed)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
        return hashed.digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {_why(path, error)}.") from error
    finally:
        _discard(temporary)


def _why(path: Path, error: OSError) -> str:
    blocking = next((parent for parent in path.parents if os.path.exists(parent) and not os.path.isdir(parent)), None)
    return f"{blocking} is a file, not a folder" if blocking else (error.strerror or str(error))


def _discard(temporary: Path) -> None:
    """Takes a temporary file away. Where that cannot be done either (a disk that has become read-only), the next start does it, and the error
    that led here is the one to tell."""
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut; Windows cannot open folders and does this by itself."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

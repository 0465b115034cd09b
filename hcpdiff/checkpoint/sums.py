"""SHA256SUMS of a training state: what its files, and the weight files of its step, were when they were saved. Needs no torch.

The form is that of `sha256sum`, so `sha256sum -c SHA256SUMS` inside the state's folder checks it without hcpdiff.
"""

import errno
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import CheckpointError
from .atomic import write_atomic
from .runs import SUMS

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_WEIGHTS = re.compile(r"\.\./\.\./(ckpts|webui)/[^/\\]+")  # the only files outside that a list may lead to: a run folder may be a stranger's
_BROKEN = (errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR)  # the file is gone, or the disk cannot give it; others (no permission) are no damage


class Damaged(CheckpointError):
    """A file that is not what was saved."""


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Writes the list of `folder`: relative path (POSIX) -> SHA-256 in hex."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    write_atomic(folder / SUMS, lambda file: file.write(text.encode("utf-8")))


def read_sums(folder: Path) -> dict[str, str]:
    """The list of `folder`. Damaged where a line is none."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise Damaged(f"{folder / SUMS} is damaged.") from error
    except OSError as error:
        raise _unreadable(folder / SUMS, error) from error
    found = [_LINE.fullmatch(line) for line in lines]
    if not all(found):
        raise Damaged(f"{folder / SUMS} is damaged: line {found.index(None) + 1} is no checksum.")
    return {match[2]: match[1] for match in found}


def check(folder: Path, names: Sequence[str]) -> None:
    """Damaged unless every one of `names` is in the list and has its checksum."""
    sums = read_sums(folder)
    for name in names:
        if name not in sums:
            raise Damaged(f"{folder / SUMS} is damaged: it lacks {name}.")
        if sha256_of(folder / name) != sums[name]:
            raise Damaged(f"{folder / name} is damaged: its checksum is not the one in {SUMS}.")


def changed(folder: Path) -> list[Path]:
    """Files of the list outside `folder` (weight files) that are there and are not what was saved."""
    outside = {Path(os.path.normpath(folder / name)): digest for name, digest in read_sums(folder).items() if _WEIGHTS.fullmatch(name)}
    return [path for path, digest in outside.items() if path.is_file() and sha256_of(path) != digest]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    kind = Damaged if error.errno in _BROKEN else CheckpointError
    return kind(f"{path} cannot be read: {error.strerror or error}.")

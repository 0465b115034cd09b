"""Content hashes of files, remembered by what the file system says of them, as git does. No torch here.

A file counts as unchanged while path, device, inode, size, mtime and ctime are the same. ctime cannot be set back, so an edit that keeps size and
mtime is seen too; a file touched less than two seconds before it was hashed is not remembered, since a second edit could fall into the same
tick of the clock. Windows has no such ctime: there every file is hashed at each start.
"""

import contextlib
import hashlib
import itertools
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

from .pack import write_whole

_MAGIC = b"HCPHASH1"
_HEAD = struct.Struct("<8sQ32s")
_NAME, _STATE, _DIGEST = 16, struct.Struct("<5Q"), 32  # of a record: digest of the path; size, mtime, ctime, inode, device; digest of the content
_RECORD = _NAME + _STATE.size + _DIGEST
_RACY_NS = 2_000_000_000
_TRUSTED = os.name == "posix"


class Content(NamedTuple):
    """A file as read: its bytes and their digest; `state` is what the file system said before and after, None if it changed meanwhile."""

    raw: bytes
    digest: bytes
    state: tuple[int, ...] | None


def content_digest(raw: bytes) -> bytes:
    """32 bytes that stand for the content."""
    return hashlib.blake2b(raw, digest_size=32).digest()


def read_content(path: str | Path) -> Content:
    """Read and hash a file."""
    before = Look(path)
    raw = Path(path).read_bytes()
    return Content(raw, content_digest(raw), before.settled())


class Look:
    """What the file system says of a file before it is read."""

    def __init__(self, path: str | Path):
        self.path, self.at, self.state = path, time.time_ns(), _state(os.stat(path))

    def settled(self) -> tuple[int, ...] | None:
        """By what the file is known again, now that it was read; None where it has changed meanwhile, or just before."""
        unchanged = self.state == _state(os.stat(self.path)) and self.at - max(self.state[1:3]) > _RACY_NS
        return self.state if unchanged and _TRUSTED else None


def _state(stat: os.stat_result) -> tuple[int, int, int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino % 2**64, stat.st_dev % 2**64


class HashMemo:
    """Remembered digests, kept in one file that is replaced whole. Losing it costs time, never correctness. Some 200 bytes of memory a file: records stay packed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._known = self._load()
        self._new: dict[bytes, bytes] = {}

    def _load(self) -> dict[bytes, bytes]:
        """Name -> state and digest."""
        try:
            raw = self.path.read_bytes()
        except OSError:
            return {}
        if len(raw) < _HEAD.size:
            return {}
        magic, count, digest = _HEAD.unpack_from(raw)
        body = memoryview(raw)[_HEAD.size:]
        if magic != _MAGIC or len(body) != count * _RECORD or hashlib.blake2b(body, digest_size=32).digest() != digest:
            return {}
        return {bytes(body[at:at + _NAME]): bytes(body[at + _NAME:at + _RECORD]) for at in range(0, len(body), _RECORD)}

    def digest(self, path: str | Path, about: bytes = b"") -> bytes | None:
        """The file's digest if it is remembered and the file looks unchanged. about: what else the digest depends on."""
        name = _name(path, about)
        known = self._new.get(name) or self._known.get(name)
        if known is None or not _TRUSTED:
            return None
        try:
            return known[_STATE.size:] if _packed(_state(os.stat(path))) == known[:_STATE.size] else None
        except OSError:
            return None

    def remember(self, path: str | Path, content: Content, about: bytes = b"") -> None:
        """Keep a digest for the next time."""
        if content.state is not None:
            self._new[_name(path, about)] = _packed(content.state) + content.digest

    def save(self) -> None:
        """Write what is new, beside what other processes have written meanwhile; then forget all, for memory's sake."""
        known, new = self._load() if self._new else {}, self._new
        self._known, self._new = {}, {}
        if not new:
            return
        body = b"".join(itertools.chain.from_iterable((known | new).items()))
        with contextlib.suppress(OSError):  # full or read-only disk; Windows, while another process reads the file: they will be hashed again
            write_whole(self.path, _HEAD.pack(_MAGIC, len(body) // _RECORD, hashlib.blake2b(body, digest_size=32).digest()) + body)


def _packed(state: tuple[int, ...]) -> bytes:
    return _STATE.pack(*(number % 2**64 for number in state))  # times before 1970, or in 300 years, as they come


def _name(path: str | Path, about: bytes) -> bytes:
    return hashlib.blake2b(os.path.abspath(path).encode("utf-8", "surrogateescape") + about, digest_size=16).digest()

"""Many small entries in few files, shared by processes: packs that are written once, and an index beside each that is renamed into place last.

`<name>.pack` is payloads end to end. `<name>.idx` is a 64-byte head (magic, format, count, digest of the records) and 64-byte records (key, offset,
length, digest of the payload). A pack without a whole index does not exist for readers, so a killed writer leaves nothing half. Nothing is ever
changed in place: an entry that is found damaged is written again into a newer pack, and newer packs win. No torch here.
"""

import contextlib
import hashlib
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

T = TypeVar("T")

FORMAT = 1
_MAGIC = b"HCPPACK\n"
_HEAD = struct.Struct("<8sIIQ32s8x")
_RECORD = np.dtype([("key", "V32"), ("offset", "<u8"), ("length", "<u8"), ("digest", "V16")])
_PACK_BYTES, _PACK_SECONDS = 128 << 20, 30.0  # a kill loses at most this much work
_TEMP = ".tmp"
TOUCH_SECONDS = 3600.0  # how often a run that goes on for days says which packs it reads
STALE_SECONDS = 86400.0  # a temporary file this old belongs to no living writer


def payload_digest(payload: bytes) -> bytes:
    """16 bytes that tell a damaged payload from a whole one."""
    return hashlib.blake2b(payload, digest_size=16).digest()


class PackFolder:
    """The entries of a folder's packs. Reading is safe in threads, and beside any number of writing processes. Some 75 bytes of memory an entry."""

    def __init__(self, folder: str | Path, only: str = "*.idx"):
        self.folder, self._pattern = Path(folder), only
        self.foreign: list[str] = []  # indexes that are damaged or of another format
        self._table = _Table()
        self._read: set[str] = set()
        self._used: set[str] = set()
        self._touched = time.monotonic()
        self._lock = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: bytes) -> bool:
        return self._table.find(key) is not None

    def keys(self) -> list[bytes]:
        """Keys of all entries, each once."""
        return list(dict.fromkeys(bytes(key) for key in self._table.records["key"][self._table.alive].tolist()))

    def refresh(self) -> None:
        """Take in packs that have appeared since."""
        with self._lock:
            fresh = []
            for path in sorted(self.folder.glob(self._pattern)):  # names begin with their time: newer ones come later and win
                if path.name not in self._read:
                    self._read.add(path.name)
                    records = read_index(path)
                    if records is None:
                        self.foreign.append(path.name)
                    else:
                        fresh.append((path.stem + ".pack", records))
            if fresh:
                self._table = self._table.with_packs(fresh)

    def get(self, key: bytes, read: Callable[[bytes], T | None] = lambda payload: payload) -> T | None:
        """What `read` makes of an entry's payload, from the newest pack that holds it whole and of which `read` makes anything; None if there is none."""
        while (place := self._table.find(key)) is not None:
            pack, record = place
            try:  # plain reads: a mapped file that is cut short under us would kill the process
                with open(self.folder / pack, "rb") as file:
                    file.seek(int(record["offset"]))
                    payload = file.read(int(record["length"]))
            except OSError:
                payload = b""
            whole = len(payload) == record["length"] and payload_digest(payload) == bytes(record["digest"])
            if whole and (entry := read(payload)) is not None:
                self._used.add(pack)
                if time.monotonic() - self._touched > TOUCH_SECONDS:
                    self.touch_used()
                return entry
            with self._lock:  # damaged or foreign: from now on it counts as not there
                self._table.forget(pack, record)
        return None

    def touch_used(self) -> None:
        """Note on the files that they are in use, for prune."""
        self._touched = time.monotonic()
        used, self._used = self._used, set()
        for pack in list(used):  # threads may still add to it
            touch(self.folder / pack)


class _Table:
    """Records of all packs, sorted by the first 8 bytes of their keys; among equal keys the newest is last. Never changed but for `alive`."""

    def __init__(self, records: np.ndarray | None = None, pack: np.ndarray | None = None, packs: Sequence[str] = (), alive: np.ndarray | None = None):
        self.records = np.zeros(0, _RECORD) if records is None else records
        self.pack = np.zeros(0, np.uint32) if pack is None else pack  # number of each record's pack
        self.packs = list(packs)
        self.alive = np.ones(len(self.records), bool) if alive is None else alive
        self.starts = np.frombuffer(self.records["key"].tobytes(), dtype="<u8")[::4].copy()

    def with_packs(self, fresh: Sequence[tuple[str, np.ndarray]]) -> "_Table":
        """This table and newer packs."""
        numbers = [np.full(len(records), len(self.packs) + n, np.uint32) for n, (_, records) in enumerate(fresh)]
        records = np.concatenate([self.records, *(records for _, records in fresh)])
        alive = np.concatenate([self.alive, np.ones(len(records) - len(self.alive), bool)])
        order = np.argsort(np.frombuffer(records["key"].tobytes(), dtype="<u8")[::4], kind="stable")
        return _Table(records[order], np.concatenate([self.pack, *numbers])[order], [*self.packs, *(name for name, _ in fresh)], alive[order])

    def _rows(self, key: bytes) -> Iterator[int]:
        """Rows of a key, the newest first, without those forgotten."""
        start = np.frombuffer(key, dtype="<u8", count=1)[0]
        low, high = np.searchsorted(self.starts, start, "left"), np.searchsorted(self.starts, start, "right")
        return (row for row in range(int(high) - 1, int(low) - 1, -1) if self.alive[row] and bytes(self.records["key"][row]) == key)

    def find(self, key: bytes) -> tuple[str, np.void] | None:
        """(pack, record) of the newest entry of that key."""
        return next(((self.packs[self.pack[row]], self.records[row]) for row in self._rows(key)), None)

    def forget(self, pack: str, record: np.void) -> None:
        """Never find that entry again."""
        for row in self._rows(bytes(record["key"])):
            if self.packs[self.pack[row]] == pack and self.records["offset"][row] == record["offset"]:
                self.alive[row] = False


def touch(path: Path) -> None:
    """Set a file's time to now, if it is there and ours."""
    try:
        os.utime(path)
    except OSError:  # another user's cache: it is only not kept alive by us
        return


def read_index(path: Path) -> np.ndarray | None:
    """Records of an index; None if it is damaged, unreadable or of another format."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    if len(raw) < _HEAD.size:
        return None
    magic, form, size, count, digest = _HEAD.unpack_from(raw)
    body = raw[_HEAD.size:]
    if magic != _MAGIC or form != FORMAT or size != _RECORD.itemsize or len(body) != count * size or hashlib.blake2b(body, digest_size=32).digest() != digest:
        return None
    return np.frombuffer(body, dtype=_RECORD)


class PackWriter:
    """Adds entries to a folder; what was added is there for readers once a pack is full, some seconds old, or the writer is closed."""

    def __init__(self, folder: PackFolder, pack_bytes: int = _PACK_BYTES, pack_seconds: float = _PACK_SECONDS):
        self.folder, self.pack_bytes, self.pack_seconds = folder, pack_bytes, pack_seconds
        self.pending: dict[bytes, tuple[int, int, bytes]] = {}
        self._file = None
        self._name = ""
        self._size, self._since = 0, 0.0

    def __enter__(self) -> "PackWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError):
            self.discard()
        else:
            self.publish()

    def add(self, key: bytes, payload: bytes) -> None:
        """Append one entry (32-byte key)."""
        if self._file is None:
            self.folder.folder.mkdir(parents=True, exist_ok=True)
            self._name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
            self._file = open(self.folder.folder / f"{self._name}.pack{_TEMP}", "wb")
            self._size, self._since = 0, time.monotonic()
        self._file.write(payload)
        self.pending[key] = (self._size, len(payload), payload_digest(payload))
        self._size += len(payload)
        if self._size >= self.pack_bytes or time.monotonic() - self._since >= self.pack_seconds:
            self.publish()

    def publish(self) -> None:
        """Make the entries added so far visible, to this folder object and to all others."""
        if self._file is None:
            return
        base = self.folder.folder / self._name
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError:
            self.discard()
            raise
        self._file = None
        records = np.array([(key, *place) for key, place in self.pending.items()], dtype=_RECORD)
        body = records.tobytes()
        head = _HEAD.pack(_MAGIC, FORMAT, _RECORD.itemsize, len(records), hashlib.blake2b(body, digest_size=32).digest())
        self.pending.clear()
        try:
            os.replace(f"{base}.pack{_TEMP}", f"{base}.pack")
            write_whole(Path(f"{base}.idx"), head + body)
        except OSError:
            for name in (f"{base}.pack{_TEMP}", f"{base}.pack"):  # nobody would ever read it, and the disk is full
                Path(name).unlink(missing_ok=True)
            raise
        self.folder.refresh()

    def discard(self) -> None:
        """Give up what was not published, for instance because the disk is full."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # closing writes out the buffer: the failure that brought us here, once more
            self._file.close()
        self.pending.clear()
        self._file = None
        (self.folder.folder / f"{self._name}.pack{_TEMP}").unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temp = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_TEMP}")
    try:
        with open(temp, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def leftovers(folder: Path, now: float) -> Iterator[Path]:
    """Files that no reader will ever use: old temporary files, old packs without an index, indexes without a pack."""
    for path in folder.glob("*"):
        try:
            old = now - path.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:  # another process has renamed or removed it
            continue
        if path.name.endswith(_TEMP) and old:
            yield path
        elif path.suffix == ".pack" and old and not path.with_suffix(".idx").exists():
            yield path
        elif path.suffix == ".idx" and not path.with_suffix(".pack").exists():
            yield path

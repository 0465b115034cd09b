"""The header of a safetensors file, read with nothing but the standard library and checked before anything trusts it.

Layout (safetensors format): 8 bytes, little-endian length N; N bytes of JSON, name -> {dtype, shape, data_offsets}, and `__metadata__`,
text -> text; then the tensors' bytes, offsets counted from there, without gap or overlap.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError
from .paths import missing

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
METADATA = "__metadata__"
Stamp = tuple[int, ...]  # what tells that a file is still the same, its bytes first: see `stamp_of`


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [begin, end) counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Tensors by name, in file order; the file's metadata; the offset at which the tensors' bytes begin; which file it was."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    payload: int
    stamp: Stamp


def read_header(path: Path | str) -> Header:
    """The checked header of the file at `path`; CheckpointError names the file and what is wrong with it."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return parse_header(file, path)
    except OSError as error:
        raise unreadable(path, error) from error


def stamp_of(status: os.stat_result) -> Stamp:
    """Of a file's status: bytes, time of its last change (ns), and where there is one the time that cannot be set back: cp -p and rsync -t keep the first.
    Without the inode, which some network and FUSE mounts give anew at each look; such mounts take ctime from their server or from mtime."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns if os.name == "posix" else 0  # on Windows it is the time of making


def check_same(path: Path, before: Stamp, now: Stamp) -> None:
    """CheckpointError where the file at `path` is not the one, or not as it was, when `before` was taken."""
    if now != before:
        raise CheckpointError(f"{path} was replaced or changed while this was starting: its weights are not those of the header that was read from it. "
                              "Let nothing write to it (new permissions and links count too), and start again.")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that cannot be opened or read; a missing one is told with its neighbours."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return CheckpointError(missing(path))
    if os.path.isdir(path):
        return CheckpointError(f"{path} is a folder; a .safetensors file is wanted.")
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}.")


def parse_header(file: BinaryIO, path: Path) -> Header:
    """The checked header of an open file, which is left at the first byte of the tensors."""
    stamp = stamp_of(os.fstat(file.fileno()))
    size = stamp[0]
    start, first = file.read(8), file.read(1)
    if first != b"{" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):  # with '{' after them, these bytes are a length
        raise CheckpointError(f"{path} is a pickle (a file of torch.save), which may run code when it is read. Only safetensors files are read here.")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER or length < 2:
        raise CheckpointError(f"{path} is not a safetensors file: {_what(start, size)}.")
    if 8 + length > size:
        raise CheckpointError(f"{path} is cut short: its header alone needs {8 + length} bytes, the file has {size}. Copy or download it again.")
    names = _parse_json(first + file.read(length - 1), path)
    metadata = _checked_metadata(names.pop(METADATA, {}), path)
    entries = {name: _checked_entry(name, entry, path) for name, entry in names.items()}
    _check_layout(entries, size - 8 - length, path)
    return Header(entries, metadata, 8 + length, stamp)


def _what(start: bytes, size: int) -> str:
    if size == 0:
        return "it is empty"
    if size < 8:
        return f"it has only {size} bytes"
    if start.lstrip()[:1] in (b"<", b"{") or start[:7] == b"version":
        return f"it begins with {start!r}, so it is text (a web page or a git-lfs pointer instead of the file?)"
    return f"its first 8 bytes, {start!r}, are not the length of a header"


def _parse_json(raw: bytes, path: Path) -> dict:
    def unique(pairs):
        names = dict(pairs)
        if len(names) < len(pairs):
            seen = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise CheckpointError(f"{path}: its header names {twice!r} twice, so it is damaged or made to deceive.")
        return names

    try:
        names = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON ({_short(error)}).") from error
    if not isinstance(names, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is a {type(names).__name__}, not a map of tensors.")
    return names


def _short(error: Exception) -> str:
    return str(error)[:120]


def _checked_metadata(metadata: object, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the metadata in its header is not a map of text to text.")
    for text in (*metadata, *metadata.values()):
        _check_text(text, path)
    return metadata


def _check_text(text: str, path: Path) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: its header holds {text[:60]!r}, which is not valid text.") from error


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _checked_entry(name: str, entry: object, path: Path) -> Entry:
    _check_text(name, path)
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or not isinstance(dtype, str) or not all(map(_is_count, [*shape, *offsets])):
        raise CheckpointError(f"{path}: the header's entry of {name!r} is not a dtype, a shape and two offsets.")
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: {name!r} is stored as {dtype[:40]!r}, which is not read here. Known: {', '.join(ITEM_BYTES)}.")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"{path}: {name!r} is said to be {dtype} {tuple(shape)}, but {end - begin} bytes are set aside for it.")
    return Entry(dtype, tuple(shape), begin, end)


def _check_layout(entries: dict[str, Entry], available: int, path: Path) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise CheckpointError(f"{path}: {name!r} begins at byte {entry.begin} where {position} was due (a gap or an overlap); the file is damaged.")
        position = entry.end
    if position > available:
        raise CheckpointError(f"{path} is cut short: its tensors need {position} bytes, {available} are there. Copy or download it again.")
    if position < available:
        raise CheckpointError(f"{path} has {available - position} bytes after its last tensor; it is damaged.")

"""Safetensors in both directions, by files that appear whole or not at all (`atomic.py`).

Written by hand rather than through the safetensors package for three reasons: the same tensors and metadata always give the same bytes
(the package orders metadata by a random hash), tensors that are kept are never views of a mapped file (which Windows could not replace), and every
fault of a damaged or hostile file is named. Its files are read by the package and the other way round.
"""

import ctypes
import hashlib
import json
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from .atomic import write_atomic
from .safetensors_header import ITEM_BYTES, MAX_HEADER, METADATA, Entry, Header, check_same, parse_header, stamp_of, unreadable

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_POPULATE_READ = 22  # MADV_POPULATE_READ of madvise(2), Linux 5.14: an error, where looking at the pages would be a signal


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], check: Callable[[Path], None] | None = None) -> str:
    """Writes a safetensors file by `write_atomic`; its SHA-256 comes back. Equal input gives equal bytes; views and shared storage are written out in full."""
    names = _order(tensors)
    header = _header(tensors, names, metadata, path)

    def write(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in names:
            file.write(_bytes(tensors[name]))

    return write_atomic(path, write, check)


def payload_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of the bytes that `save_tensors` writes after the header: webui's `sshs_model_hash`."""
    digest = hashlib.sha256()
    for name in _order(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Widest items first, so that every tensor is aligned; then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor], names: list[str], metadata: Mapping[str, str], path: Path | str) -> bytes:
    wrong = [key for key, value in metadata.items() if not isinstance(key, str) or not isinstance(value, str)]
    if wrong:
        raise TypeError(f"metadata of {path} must be text: {wrong}")
    entries: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in names:
        dtype = _NAMES[tensors[name].dtype]
        end = position + tensors[name].numel() * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    if len(raw) > MAX_HEADER:
        raise CheckpointError(f"{path} cannot be written: its metadata and names take {len(raw)} bytes, {MAX_HEADER} are allowed.")
    return raw + b" " * (-len(raw) % 8)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else b"")


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU, owned by the caller) and the metadata of a safetensors file. CheckpointError names what is wrong with it."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            header = parse_header(file, path)
            tensors = {}
            for name, entry in sorted(header.entries.items(), key=lambda item: item[1].begin):
                tensors[name] = _tensor(file, entry, header.payload + entry.begin)
    except OSError as error:
        raise unreadable(path, error) from error
    return tensors, header.metadata


class Scratch:
    """Where tensors lie that are only looked at or copied, one after the other: in the mapped file, else in memory that all of them share (new memory for each
    would be handed out, and filled with zeros, page by page)."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def look(self, file: BinaryIO, entry: Entry, start: int) -> Tensor:
        """(n,) uint8: the tensor of `entry`, which begins at `start` in the file; valid until the next call. CheckpointError where the file is too short."""
        size = entry.end - entry.begin
        mapped = _mapped(file, start, size) if size and start % ITEM_BYTES[entry.dtype] == 0 else None
        if mapped is not None:
            return mapped
        if size > len(self._bytes):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # let go before
            self._bytes = torch.empty(size, dtype=torch.uint8)
        _read_into(file, start, self._bytes[:size])
        return self._bytes[:size]


def _mapped(file: BinaryIO, start: int, size: int) -> Tensor | None:
    """A part of a file as memory, copied nowhere; None where the system does not make sure before that all of it can be read: a page that cannot would kill
    the process when it is looked at."""
    if sys.platform != "linux":
        return None
    before = start % mmap.ALLOCATIONGRANULARITY
    try:
        pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=start - before)
    except (OSError, ValueError):  # a file system without maps, or a file that is too short, which reading tells
        return None
    mapped = torch.frombuffer(pages, dtype=torch.uint8)
    # by ctypes, which lets other threads run meanwhile, as mmap.madvise does not: a disk or a server may take its time, and signals are answered
    failed = ctypes.CDLL(None).madvise(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(len(mapped)), _POPULATE_READ)
    return None if failed else mapped[before:]  # an older kernel, or a fault


def read_tensor(path: Path, header: Header, name: str, scratch: Scratch | None = None) -> Tensor:
    """One tensor of a file whose header was read before (on the CPU, owned by the caller, or to be looked at as of `scratch`). CheckpointError where it is not that file any more."""
    try:
        with open(path, "rb", buffering=0) as file:
            check_same(path, header.stamp, stamp_of(os.fstat(file.fileno())))
            entry = header.entries[name]
            if scratch is None:
                return _tensor(file, entry, header.payload + entry.begin)
            return scratch.look(file, entry, header.payload + entry.begin).view(DTYPES[entry.dtype]).reshape(entry.shape)
    except OSError as error:
        raise unreadable(path, error) from error


def _tensor(file: BinaryIO, entry: Entry, start: int) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])  # read into at once: other memory would be filled with zeros first
    _read_into(file, start, tensor.reshape(-1).view(torch.uint8))
    return tensor


def _read_into(file: BinaryIO, start: int, tensor: Tensor) -> None:
    """The bytes of the file from `start` on; one call gives 2 GiB at most where it is not buffered."""
    if not tensor.numel():
        return
    place = tensor.numpy().data
    file.seek(start)
    while place:
        got = file.readinto(place)
        if not got:
            raise CheckpointError(f"{file.name} became shorter while it was read.")
        place = place[got:]

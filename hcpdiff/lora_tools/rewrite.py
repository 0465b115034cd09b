"""A safetensors file with some tensors changed and every other byte as it was, written without ever holding more than one tensor."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..checkpoint.atomic import write_atomic
from ..checkpoint.safetensors_header import METADATA, Entry, read_header
from ..errors import CheckpointError
from ..families.weight_file import WeightFile

_BLOCK = 1 << 23  # bytes copied at a time
Change = Callable[[Tensor], Tensor]  # to a tensor of the same shape and type


def rewrite(source: WeightFile, path: Path, changes: Mapping[str, Change], metadata: Mapping[str, str] | None = None) -> None:
    """Writes `source` to `path` with the tensors of `changes` replaced: same keys, order, types and offsets. `metadata` replaces the header's (None:
    the header stays bit for bit). The file appears only after it was read back: unchanged tensors byte for byte, changed ones by their hash."""
    digests: dict[str, str] = {}

    def write(out: BinaryIO) -> None:
        with open(source.path, "rb") as file:
            out.write(_header(file, source, metadata))
            for name, entry in _in_order(source):
                if name not in changes:
                    _copy(file, source.header.payload + entry.begin, entry.end - entry.begin, out)
                    continue
                raw = _bytes(changes[name](source.tensor(name)), name, entry)
                digests[name] = hashlib.sha256(raw).hexdigest()
                out.write(raw)

    write_atomic(path, write, lambda written: _verify(source, written, path, digests))


def _header(file: BinaryIO, source: WeightFile, metadata: Mapping[str, str] | None) -> bytes:
    """The bytes before the tensors."""
    old = file.read(source.header.payload)
    if metadata is None:
        return old
    entries = json.loads(old[8:])
    entries.pop(METADATA, None)
    raw = json.dumps({METADATA: dict(sorted(metadata.items())), **entries}, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _in_order(source: WeightFile) -> list[tuple[str, Entry]]:
    return sorted(source.header.entries.items(), key=lambda item: (item[1].begin, item[1].end))


def _copy(file: BinaryIO, begin: int, size: int, out: BinaryIO) -> None:
    file.seek(begin)
    while size:
        block = file.read(min(size, _BLOCK))
        if not block:
            raise CheckpointError(f"{file.name} became shorter while it was read.")
        out.write(block)
        size -= len(block)


def _bytes(tensor: Tensor, name: str, entry: Entry) -> memoryview:
    raw = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    if tuple(tensor.shape) != entry.shape or len(raw) != entry.end - entry.begin:
        raise AssertionError(f"{name} would change its shape or type")
    return raw


def _verify(source: WeightFile, written: Path, path: Path, digests: Mapping[str, str]) -> None:
    header = read_header(written)
    faults = [] if header.entries == source.header.entries else ["names, types or offsets"]
    with open(source.path, "rb") as before, open(written, "rb") as after:
        for name, entry in _in_order(source) if not faults else ():
            if name in digests:
                same = _digest(after, header.payload + entry.begin, entry.end - entry.begin) == digests[name]
            else:
                same = _equal(before, source.header.payload + entry.begin, after, header.payload + entry.begin, entry.end - entry.begin)
            faults += [] if same else [name]
    if faults:
        raise CheckpointError(f"{path} is not written, since reading it back shows a difference: {', '.join(faults[:3])}. Is the disk sound?")


def _digest(file: BinaryIO, begin: int, size: int) -> str:
    file.seek(begin)
    return hashlib.sha256(file.read(size)).hexdigest()


def _equal(a: BinaryIO, begin_a: int, b: BinaryIO, begin_b: int, size: int) -> bool:
    a.seek(begin_a)
    b.seek(begin_b)
    while size:
        step = min(size, _BLOCK)
        if a.read(step) != b.read(step):
            return False
        size -= step
    return True

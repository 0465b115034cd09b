"""What the training data is, in a few bytes per image, so that a resumed run can tell what has changed since.

An image's mark is its file's length and 4 samples of 4 KiB (all of a file that is no longer): reading all of a large data set at each start would cost minutes, and image formats are
compressed, so an edit changes the length or what follows. Marks say whether files are the same; they are no protection against forgery.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..threads import mapped
from .files import shown
from .sample import TrainDataset
from .source import Source

_BYTES = 8  # of a mark
_THREADS = 8
_SAMPLES, _SAMPLE = 4, 4096
_MOST = 2**28  # bytes of all names of a source
_NAMES = 3  # names shown of what has changed

Fingerprint = Mapping[str, Mapping[str, Mapping[str, Any]]]  # dataset -> source -> names, images, captions, templates


def fingerprint(datasets: Sequence[TrainDataset]) -> Fingerprint:
    """Names, image marks, caption marks of every source, as small uint8 tensors; a mark of its templates. An image and its mask have one mark."""
    return {data.name: {source.name: _of_source(source) for source in data.sources} for data in datasets}


def _of_source(source: Source) -> dict[str, Any]:
    def mark(number: int) -> bytes:
        paths = [source.path(number)] + ([source.masks[number]] if source.masks else [])
        return _mark(*map(_sample, paths))

    captions = (_mark(b"none" if text is None else b"text" + _utf8(text)) for text in source.captions.texts)
    return {"names": torch.frombuffer(bytearray(zlib.compress(_utf8("\0".join(source.keys)))), dtype=torch.uint8),
            "images": _table(mapped(mark, range(len(source.keys)), _THREADS)), "captions": _table(captions),
            "templates": _mark(*(_utf8(repr(template)) for template in source.prompter.templates)).hex()}


def _sample(path: str) -> bytes:
    """Length and samples of a file; a file that cannot be read has the mark of an empty one, since whoever trains on it will say so."""
    try:
        with open(path, "rb", buffering=_SAMPLE) as file:  # the default buffer is as large as the file system says: a network's is up to 1 MiB
            size = os.fstat(file.fileno()).st_size
            if size <= _SAMPLES * _SAMPLE:
                return file.read()
            parts = [size.to_bytes(8, "little")]
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
                parts.append(file.read(_SAMPLE))
            return b"".join(parts)
    except OSError:
        return b""


def _mark(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _table(marks: Iterable[bytes]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(marks), dtype=np.uint8).copy()).reshape(-1, _BYTES)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What is not as it was, one line per source and kind of change. Empty: nothing."""
    lines = []
    for dataset in dict.fromkeys([*before, *now]):
        was, current = before.get(dataset), now.get(dataset)
        if was is None or current is None:
            lines.append(f"data.{dataset} is {'new' if was is None else 'gone'}")
            continue
        for source in dict.fromkeys([*was, *current]):
            where = f"data.{dataset}.source.{source}"
            if source not in was or source not in current:
                lines.append(f"{where} is {'new' if source not in was else 'gone'}")
            else:
                lines += [f"{where}: {line}" for line in _source_changes(was[source], current[source])]
    return lines


def _source_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    try:
        old, new = _rows(before), _rows(now)
    except (zlib.error, ValueError):  # a state may be a stranger's
        return ["what the state holds of its images cannot be understood"]
    both = [name for name in new if name in old]
    found = [("are new", [name for name in new if name not in old]), ("are gone", [name for name in old if name not in new]),
             ("have other content", [name for name in both if old[name][0] != new[name][0]]), ("have another caption", [name for name in both if old[name][1] != new[name][1]])]
    lines = [f"{len(names)} images {what}: {_some(names)}" for what, names in found if names]
    return lines + (["the prompt templates are others"] if before["templates"] != now["templates"] else [])


def _rows(source: Mapping[str, Any]) -> dict[str, tuple[bytes, bytes]]:
    names = zlib.decompressobj().decompress(source["names"].numpy().tobytes(), _MOST).decode("utf-8", "surrogateescape").split("\0")
    return {name: (image.tobytes(), caption.tobytes()) for name, image, caption in zip(names, source["images"].numpy(), source["captions"].numpy(), strict=True)}


def _some(names: list[str]) -> str:
    return shown(", ".join(names[:_NAMES])) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")

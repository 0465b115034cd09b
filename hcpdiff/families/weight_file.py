"""A file of many tensors, read one at a time: a .safetensors file, or a .ckpt whose pickle holds nothing but tensors."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.safetensors_header import Header, Stamp, check_same, read_header, stamp_of, unreadable
from ..errors import CheckpointError
from .source import shards_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint.io import Scratch

SAMPLE = 4096  # bytes of each tensor that a mark looks at


@dataclass(frozen=True)
class WeightFile:
    """`shapes`: name -> shape of every tensor; `metadata`: the header's text. Nothing is kept open and no tensor is held."""

    path: Path

    @property
    def files(self) -> list[Path]:
        """Where they lie."""
        return [self.path]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """name -> shape."""
        return {name: entry.shape for name, entry in self.header.entries.items()}

    @cached_property
    def header(self) -> Header:
        """The file's checked header; CheckpointError where it is damaged or no safetensors file."""
        return read_header(self.path)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file says of itself."""
        return self.header.metadata

    def tensor(self, name: str, scratch: "Scratch | None" = None) -> "Tensor":
        """One tensor as it is stored, owned by the caller, or to be looked at as of `scratch`. CheckpointError where the file is another than when its header was read."""
        from ..checkpoint.io import read_tensor

        return read_tensor(self.path, self.header, name, scratch)

    def mark(self, names: list[str]) -> str:
        """sha256 over names, kinds, shapes and a sample in the middle of each of these tensors; the file's own name and its other tensors do not count."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            check_same(self.path, self.header.stamp, stamp_of(os.fstat(file.fileno())))
            for name in sorted(names):
                entry = self.header.entries[name]
                digest.update(f"{name}{entry.dtype}{entry.shape}".encode())
                file.seek(self.header.payload + max(entry.begin, (entry.begin + entry.end - SAMPLE) // 2))
                digest.update(file.read(min(SAMPLE, entry.end - entry.begin)))
        return digest.hexdigest()

    def release(self) -> None:
        """Lets go what is held of the tensors; what is asked for later is read again."""


class Shards(WeightFile):
    """The safetensors files that an index (`path`) names, as one."""

    @property
    def files(self) -> list[Path]:
        """Beside the index."""
        return [self.path.parent / name for name in shards_of(self.path)]

    @cached_property
    def _files(self) -> dict[str, WeightFile]:
        return {name: file for file in map(WeightFile, self.files) for name in file.shapes}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """name -> shape."""
        return {name: file.shapes[name] for name, file in self._files.items()}

    def tensor(self, name: str, scratch: "Scratch | None" = None) -> "Tensor":
        """As of one file."""
        return self._files[name].tensor(name, scratch)


class PickleFile(WeightFile):
    """A .ckpt file. The tensors are mapped, not copied, where the file is of torch's zip form; else all are held, until `release`."""

    @cached_property
    def _stamp(self) -> Stamp:
        return self._now()

    def _now(self) -> Stamp:
        try:
            return stamp_of(os.stat(self.path))
        except OSError as error:
            raise unreadable(self.path, error) from error

    @cached_property
    def _state(self) -> dict[str, Any]:
        import torch

        check_same(self.path, self._stamp, self._now())
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=_is_zip(self.path))
        except Exception as error:  # torch raises anything for a damaged pickle, and UnpicklingError for what may not be read
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self.path} cannot be read: a .ckpt file is a pickle, and only tensors are taken from one, since anything else may run code ({reason[:160]}). "
                                  "Get the model as .safetensors.") from error
        state = state.get("state_dict", state) if isinstance(state, dict) else None
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.path} holds no map of tensors.")
        return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """name -> shape."""
        return {name: tuple(value.shape) for name, value in self._state.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """Such files say nothing of themselves."""
        return {}

    def tensor(self, name: str, scratch: "Scratch | None" = None) -> "Tensor":
        """One tensor, mapped from the file; it needs no scratch. CheckpointError where the file is another than when it was looked at first."""
        check_same(self.path, self._stamp, self._now())
        return self._state[name]

    def release(self) -> None:
        """Lets the tensors go; shapes stay."""
        self.__dict__.pop("_state", None)

    def mark(self, names: list[str]) -> str:
        """As of a safetensors file, of the same tensors' samples."""
        import torch

        digest = hashlib.sha256()
        for name in sorted(names):
            value = self._state[name]
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            flat, count = value.reshape(-1), SAMPLE // value.element_size()
            start = max(0, (len(flat) - count) // 2)
            digest.update(flat[start : start + count].clone().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def folder_weights(folder: Path, variant: str | None, clip: bool) -> WeightFile | None:
    """The safetensors weights that a library would read of a part's folder (`clip`: transformers, else diffusers); None where there are none.

    Where both are there, transformers takes the one file, diffusers the shards.
    """
    dotted, stem = f".{variant}" if variant else "", "model" if clip else "diffusion_pytorch_model"
    found: list[WeightFile] = [WeightFile(folder / f"{stem}{dotted}.safetensors"), Shards(folder / f"{stem}.safetensors.index{dotted}.json")]
    return next((weights for weights in (found if clip else reversed(found)) if weights.path.is_file()), None)


def open_weights(path: Path) -> WeightFile:
    """The file of tensors at `path`, not read yet."""
    return PickleFile(path) if path.suffix.lower() == ".ckpt" else WeightFile(path)

"""Where a base model lies, whatever its form: configs, weights, tokenizers and marks of its parts behind one contract.

A family reads its parts through a `Place` and never asks whether it is a folder or a single file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..errors import CheckpointError, ConfigError, HCPError
from . import vae_file
from .ldm_names import DIFFUSERS, HUGGINGFACE
from .single_file import SingleFile, keys_for
from .source import MODEL_KEY, check_complete, find_part, is_of_transformers, load_or_fault, load_whole, on_this_machine, parts_of, read_index, read_json
from .weight_file import folder_weights

if TYPE_CHECKING:
    from torch import dtype as Dtype
    from torch import nn

    from .read_parts import Reader


BUFFER = "embeddings.position_ids"  # that older transformers saved with a text encoder
LIBRARY_S = {"quantization_config", "transformers_weights"}  # keys of a config by which the weights are other ones, or are to be made of what is stored


@runtime_checkable
class Place(Protocol):
    """A base model on the disk. `path` is the folder or file; `notices` are for the log."""

    path: Path
    notices: Sequence[str]

    def pipeline(self, key: str = MODEL_KEY) -> str | None:
        """The name of diffusers' pipeline class, which tells the family."""

    def index(self, key: str = MODEL_KEY) -> dict[str, Any]:
        """What is said of the model as a whole, as model_index.json has it."""

    def parts(self) -> list[str]:
        """The parts that are needed: unet, text_encoder, tokenizer, vae, scheduler ..."""

    def check(self, parts: Sequence[str], key: str = MODEL_KEY) -> None:
        """ConfigError that names everything that the parts lack. Needs no torch."""

    def has_config(self, part: str) -> bool:
        """Whether there is a config of this part to read."""

    def config(self, part: str) -> dict[str, Any]:
        """The part's config in diffusers' (or transformers') form; of `scheduler` the noise schedule."""

    def where(self, part: str) -> Path | str:
        """The place of a part's config, as messages name it."""

    def outline(self, kind: type, part: str, dtype: Dtype, variant: str | None = None, key: str = MODEL_KEY) -> tuple[nn.Module, Reader]:
        """The part as a module of this class in `dtype`, its parameters on meta (unless it had to be read whole), and what reads them (to the CPU, if not told otherwise).
        ConfigError where a weight is missing, left over, or of another shape."""

    def tokenizer(self, kind: type, part: str = "tokenizer", key: str = MODEL_KEY) -> Any:
        """The tokenizer of this name."""

    def mark(self, part: str) -> str:
        """A digest by which the part's weights are known again, whatever the place is called."""

    def release(self) -> None:
        """Lets go what it holds of the weights between two readings."""


@dataclass(frozen=True)
class Folder:
    """A base model as a diffusers folder."""

    path: Path
    notices: Sequence[str] = ()

    def pipeline(self, key: str = MODEL_KEY) -> str | None:
        """`_class_name` of model_index.json."""
        return self.index(key).get("_class_name")

    def index(self, key: str = MODEL_KEY) -> dict[str, Any]:
        """Its model_index.json."""
        return read_index(self.path, key)

    def parts(self) -> list[str]:
        """What model_index.json names of the parts that are needed."""
        return parts_of(self.path)

    def check(self, parts: Sequence[str], key: str = MODEL_KEY) -> None:
        """ConfigError that names every file that is missing."""
        check_complete(self.path, list(parts), key)

    def has_config(self, part: str) -> bool:
        """Whether its JSON file is there."""
        return self.where(part).is_file()

    def config(self, part: str) -> dict[str, Any]:
        """Its JSON file."""
        return read_json(self.where(part))

    def where(self, part: str) -> Path:
        """The path of its JSON file."""
        return self.path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")

    def outline(self, kind: type, part: str, dtype: Dtype, variant: str | None = None, key: str = MODEL_KEY) -> tuple[nn.Module, Reader]:
        """From the header of its safetensors file, or as the library reads it."""
        return _outline(kind, self.path / part, dtype, key, {"variant": variant} if variant is not None else {})

    def tokenizer(self, kind: type, part: str = "tokenizer", key: str = MODEL_KEY) -> Any:
        """From its folder."""
        return load_or_fault(kind, self.path / part, key, {})

    def mark(self, part: str) -> str:
        """sha256 over names, sizes and samples of its weight files."""
        return file_mark(self.path / part)

    def release(self) -> None:
        """It holds nothing."""


def file_mark(folder: Path) -> str:
    """sha256 over names, sizes and samples of the weight files in a folder: the same whatever dtype they are loaded in."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name}{size}".encode())
        with open(path, "rb") as file:
            for index in range(65):
                file.seek(max(0, size - 4096) * index // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()


def options_for(kind: type, dtype: Dtype) -> dict[str, Any]:
    """Arguments of from_pretrained of both libraries: transformers' config.json could name a kernel on the hub, which is code."""
    if is_of_transformers(kind):
        return {"dtype": dtype, "attn_implementation": "sdpa"}
    return {"torch_dtype": dtype}


def open_place(source: Path | str | Place, configs: str | None = None, prediction: str | None = None, key: str = MODEL_KEY) -> Place:
    """The place behind a path that `source.resolve` has found; a place is given back as it is.

    configs: a folder of configs for a single file; prediction: what it predicts, where the user says it.
    """
    if not isinstance(source, (str, Path)):
        return source
    if not Path(source).is_file():
        if configs:
            raise ConfigError(f"{keys_for(key).config} = {configs!r} is for a single file; {key} = {str(source)!r} has its own configs.")
        return Folder(Path(source))
    place = SingleFile(Path(source), checked_configs(configs, keys_for(key).config), prediction, key)
    try:
        _ = place.shapes  # read now and kept
    except CheckpointError as error:
        raise CheckpointError([f"{key}: {fault}" for fault in error.faults]) from error
    return place


def checked_configs(configs: str | None, key: str) -> Path | None:
    """The folder of configs, there and of a diffusers model."""
    if configs is None:
        return None
    folder = Path(configs)
    if not (folder / "unet" / "config.json").is_file() or not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise ConfigError(f"{key} = {configs!r} must be a folder of a diffusers model's configs: unet/config.json, scheduler/scheduler_config.json and the like. Weights in it are not read.")
    return folder


def check_vae(source: str, base: Place, key: str) -> None:
    """ConfigError where there is no VAE to put in the place of the base model's."""
    if Path(source).is_file():
        vae_file.open_vae(source, base, key)
    else:
        find_part(source, "vae", key)


def vae_outline(kind: type, source: str, base: Place, dtype: Dtype, key: str) -> tuple[nn.Module, Reader]:
    """Another VAE than the base model's, as `Place.outline` gives it, from a folder, a hub id or a single file (which may be a whole model's)."""
    if Path(source).is_file():
        return vae_file.vae_outline(kind, source, base, dtype, key)
    place, options = find_part(source, "vae", key)
    if isinstance(place, str):  # whose newest commit find_part has asked for: its weights may be here already
        there = on_this_machine(place, None) / options.get("subfolder", "")
        weights = folder_weights(there, None, clip=False)
        if weights and all(file.is_file() for file in weights.files):
            place, options = there, {}
    return _outline(kind, place, dtype, key, options)


def _outline(kind: type, place: Path | str, dtype: Dtype, key: str, options: dict[str, Any]) -> tuple[nn.Module, Reader]:
    """From the header of the safetensors file that the library would read, where a folder has one and it holds every weight under its own name; anything else is
    left to the library."""
    from .read_parts import Reader, move, outline

    clip = is_of_transformers(kind)
    try:
        weights = folder_weights(place, options.get("variant"), clip) if isinstance(place, Path) else None
        config = read_json(place / "config.json") if weights else {}
        stored = [name for name in weights.shapes if not (clip and name.endswith(BUFFER))] if weights else []
        names = {name.removeprefix("text_model.") if clip else name: name for name in stored}
        if stored and len(names) == len(stored) and not LIBRARY_S.intersection(config):
            return outline(kind, config, HUGGINGFACE if clip else DIFFUSERS, weights, names, dtype, f"{key}: {place}")
    except HCPError:  # older names, or a fault, which the library tells
        pass
    return load_whole(kind, place, key, options_for(kind, dtype) | options), Reader(move)

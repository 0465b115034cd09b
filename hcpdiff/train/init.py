"""The LoRA that a run starts from: `model.init_lora` and `model.init_lora_TE`."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoint.convert import other_family
from ..checkpoint.format import LoraFile, load_lora
from ..checkpoint.paths import StepFiles, locate
from ..checkpoint.spellings import WEBUI_LDM
from ..config.schema import ModelConfig
from ..errors import CheckpointError, ConfigError, collect
from ..families.base import DENOISER, TEXT
from ..trainables.lora import LoraTrainable


def start_from_files(model: ModelConfig, trainables: Sequence[LoraTrainable], version: str | None = None) -> list[str]:
    """Loads the files that the config names; lines for the log. One file may hold both parts (webui); what the run has no place for is an error or is said.

    `version` is the base model's, as webui names it: a file that does not fit and is for another family is told as that alone.
    """
    lines: list[str] = []
    taken: dict[str, Path] = {}  # component -> the file that it starts from
    for key, role, path in _wanted(model):
        own = {trainable.component.name: trainable for trainable in trainables if trainable.component.role == role}
        if not own:
            raise ConfigError(f"model.{key} = {path!r}, but {'lora_unet' if role == DENOISER else 'lora_text_encoder'} is null: nothing would be done with it.")
        files = {place: _read(key, place) for place in _places(key, path)}
        held = [name for file in files.values() for name in file.layers]
        if not set(own) & set(held):
            raise ConfigError(f"model.{key} = {path!r} holds no LoRA of the {' or '.join(own)}; it holds one of {' and '.join(held) or 'nothing'}.")
        if role == DENOISER and not model.init_lora_TE:
            own = {trainable.component.name: trainable for trainable in trainables}
        for place, file in files.items():
            lines += _start(key, place, file, own, taken, version)
    return lines


def _start(key: str, path: Path, file: LoraFile, own: Mapping[str, LoraTrainable], taken: dict[str, Path], version: str | None) -> list[str]:
    """Loads what one file holds of `own`; `taken` is what earlier files have started."""
    lines: list[str] = []
    for name, layers in file.layers.items():
        if name not in own:
            lines.append(f"note: {path}: its {len(layers)} layers of the {name} are not used.")
            continue
        if name in taken:
            raise ConfigError(f"model.{key}: {taken[name]} and {path} both hold a LoRA of the {name}; name one of them.")
        taken[name] = path
        try:
            lines += own[name].load(layers, str(path))
        except CheckpointError as error:
            other = other_family(file.layers, file.metadata, version, WEBUI_LDM in file.spelling)
            raise CheckpointError([f"model.{key} = {str(path)!r}: {other}"] if other else error.faults) from error
    return [*lines, *file.notices]


def check_places(model: ModelConfig) -> None:
    """CheckpointError for a path or folder in which there is no LoRA file; nothing is read."""
    faults: list[str] = []
    collect(faults, *(functools.partial(_places, key, path) for key, _, path in _wanted(model)))
    if faults:
        raise CheckpointError(faults)


def _wanted(model: ModelConfig) -> list[tuple[str, str, str]]:
    return [("init_lora", DENOISER, path) for path in _paths(model.init_lora)] + [("init_lora_TE", TEXT, path) for path in _paths(model.init_lora_TE)]


def _places(key: str, path: str) -> list[Path]:
    """The file itself, or those of a run folder's newest step."""
    try:
        found = locate(path)
    except CheckpointError as error:
        raise CheckpointError([f"model.{key}: {fault}" for fault in error.faults]) from error
    return list(found.parts.values()) if isinstance(found, StepFiles) else [found]


def _read(key: str, path: Path) -> LoraFile:
    try:
        return load_lora(path)
    except CheckpointError as error:
        raise CheckpointError([f"model.{key}: {fault}" for fault in error.faults]) from error


def _paths(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())

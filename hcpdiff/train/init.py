"""The LoRA that a run starts from: `model.init_lora` and `model.init_lora_TE`."""

from collections.abc import Sequence

from ..checkpoint.convert import other_family
from ..checkpoint.format import LoraFile, load_lora
from ..checkpoint.spellings import WEBUI_LDM
from ..config.schema import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..families.base import DENOISER, TEXT
from ..trainables.lora import LoraTrainable


def start_from_files(model: ModelConfig, trainables: Sequence[LoraTrainable], version: str | None = None) -> list[str]:
    """Loads the files that the config names; lines for the log. One file may hold both parts (webui); what the run has no place for is an error or is said.

    `version` is the base model's, as webui names it: a file that does not fit and is for another family is told as that alone.
    """
    wanted = [("init_lora", DENOISER, path) for path in _paths(model.init_lora)] + [("init_lora_TE", TEXT, path) for path in _paths(model.init_lora_TE)]
    lines: list[str] = []
    taken: dict[str, str] = {}  # component -> the file that it starts from
    for key, role, path in wanted:
        own = {trainable.component.name: trainable for trainable in trainables if trainable.component.role == role}
        if not own:
            raise ConfigError(f"model.{key} = {path!r}, but {'lora_unet' if role == DENOISER else 'lora_text_encoder'} is null: nothing would be done with it.")
        file = _read(key, path)
        if not set(own) & set(file.layers):
            raise ConfigError(f"model.{key} = {path!r} holds no LoRA of the {' or '.join(own)}; it holds one of {' and '.join(file.layers) or 'nothing'}.")
        if role == DENOISER and not model.init_lora_TE:
            own = {trainable.component.name: trainable for trainable in trainables}
        for name, layers in file.layers.items():
            if name not in own:
                lines.append(f"note: {path}: its {len(layers)} layers of the {name} are not used.")
                continue
            if name in taken:
                raise ConfigError(f"model.{key}: {taken[name]} and {path} both hold a LoRA of the {name}; name one of them.")
            taken[name] = path
            try:
                lines += own[name].load(layers, path)
            except CheckpointError as error:
                other = other_family(file.layers, file.metadata, version, WEBUI_LDM in file.spelling)
                raise CheckpointError([f"model.{key} = {path!r}: {other}"] if other else error.faults) from error
        lines += file.notices
    return lines


def _read(key: str, path: str) -> LoraFile:
    try:
        return load_lora(path)
    except CheckpointError as error:
        raise CheckpointError([f"model.{key}: {fault}" for fault in error.faults]) from error


def _paths(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())

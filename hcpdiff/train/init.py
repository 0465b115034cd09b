"""The LoRA that a run starts from: `model.init_lora` and `model.init_lora_TE`."""

from collections.abc import Sequence

from ..checkpoint.format import load_lora
from ..config.schema import ModelConfig
from ..errors import ConfigError
from ..trainables.lora import LoraTrainable


def start_from_files(model: ModelConfig, trainables: Sequence[LoraTrainable]) -> list[str]:
    """Loads the files that the config names; lines for the log. One file may hold both parts (webui); what the run has no place for is an error or is said."""
    by_name, lines = {trainable.component.name: trainable for trainable in trainables}, []
    for key, name in (("init_lora", "unet"), ("init_lora_TE", "text_encoder")):
        path = getattr(model, key)
        if not path:
            continue
        if name not in by_name:
            raise ConfigError(f"model.{key} = {path!r}, but lora_{name} is null: nothing would be done with it.")
        file = load_lora(path)
        if not file.layers.get(name):
            raise ConfigError(f"model.{key} = {path!r} holds no LoRA of the {name}.")
        for other, layers in file.layers.items():
            if other == name or (key == "init_lora" and other in by_name and not model.init_lora_TE):
                lines += by_name[other].load(layers, path)
            else:
                lines.append(f"note: {path}: its {len(layers)} layers of the {other} are not used.")
            lines += file.notices if other == name else ()
    return lines

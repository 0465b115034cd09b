"""LoRA files: ours written and read, everybody else's read.

Ours holds one component: `<module path>.lora_down.weight`, `.lora_up.weight`, `.alpha` (alpha itself; the effective scale is alpha / rank),
with diffusers' module paths, text encoders with `text_model.`, and the header metadata below.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..families.file_kind import not_lora
from ..families.unet_names import text_path
from ..lora_tensors import LoraTensors
from .io import read_tensors, save_tensors
from .lora_parse import StoredLora, parse
from .paths import PEFT_WEIGHTS
from .safetensors_header import read_header
from .spellings import known

FORMAT = "1"  # number of the format that save_lora writes; raised when a reader of the old one would be wrong
META_PREFIX = "hcpdiff."  # of every metadata key of ours; save_lora adds it to plain names
META_FORMAT = META_PREFIX + "format"
META_COMPONENT = META_PREFIX + "component"  # unet, text_encoder, text_encoder_2
META_BASE_VERSION = META_PREFIX + "base_version"  # Family.base_version: sd_v1, sd_v2, sd_v2_v ..., as webui names base models
META_BASE_MODEL = META_PREFIX + "base_model"  # its name: a hub id, or the last part of a folder's path
META_STEP = META_PREFIX + "step"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as read: component -> module path -> tensors; the header's metadata; the spelling it was in; what a user should be told."""

    layers: dict[str, dict[str, LoraTensors]]
    metadata: dict[str, str]
    spelling: str
    notices: tuple[str, ...] = field(default=())

    @property
    def count(self) -> int:
        """Number of layers of all components."""
        return sum(map(len, self.layers.values()))


def save_lora(path: Path | str, layers: Mapping[str, LoraTensors], metadata: Mapping[str, str], *, dtype: torch.dtype | None = None,
              check: Callable[[Path], None] | None = None) -> str:
    """Writes one component's LoRA as a file of ours, whole or not at all; its SHA-256 comes back.

    `metadata` says the component and whatever else is true of the file; plain names (`step`) become `hcpdiff.step`, so that they meet no
    other program's. The format number is added. `dtype` is what the factors are stored in (None: as they are); alpha stays float32.
    """
    named = {key if "." in key or key.startswith("ss_") else META_PREFIX + key: value for key, value in metadata.items()}
    component = named.get(META_COMPONENT) or _component_of(layers)
    tensors = {key: value if dtype is None or key.endswith(".alpha") else value.to(dtype) for key, value in tensors_of(layers, component).items()}
    return save_tensors(path, tensors, {**named, META_FORMAT: FORMAT, META_COMPONENT: component}, check)


def tensors_of(layers: Mapping[str, LoraTensors], component: str) -> dict[str, Tensor]:
    """The tensors of a file of ours, by key."""
    tensors = {}
    for path, lora in layers.items():
        base = path if component == "unet" else text_path(path)
        tensors.update({f"{base}.lora_down.weight": lora.down, f"{base}.lora_up.weight": lora.up, f"{base}.alpha": alpha_tensor(lora)})
    return tensors


def alpha_tensor(lora: LoraTensors) -> Tensor:
    """Alpha as a file holds it: the very tensor that was read where there was one, else a float32 scalar."""
    stored = lora.alpha_tensor if isinstance(lora, StoredLora) else None
    return stored if stored is not None and float(stored) == lora.alpha else torch.tensor(lora.alpha, dtype=torch.float32)


def _component_of(layers: Mapping[str, LoraTensors]) -> str:
    return "text_encoder" if all(text_path(path).startswith("text_model.") for path in layers) and layers else "unet"


def _folder_component(path: Path) -> str | None:
    """PEFT's file does not say which part it is for; where the folder that it lies in is called like one, as training scripts do, that says it."""
    return path.absolute().parent.name if path.name == PEFT_WEIGHTS and path.absolute().parent.name in COMPONENTS else None


def _refuse_others(path: Path) -> None:
    """CheckpointError where the header alone shows that the file is something else: a base model of gigabytes is not read to be refused."""
    shapes = {name: entry.shape for name, entry in read_header(path).entries.items()}
    what = not_lora(shapes) if shapes and not any(map(known, shapes)) else None
    if what:
        raise CheckpointError(f"{path} is {what}.")


def load_lora(path: Path | str) -> LoraFile:
    """Reads a LoRA file in any spelling: ours, webui/kohya (diffusers and LDM names), PEFT, old diffusers, `lycoris_`, the ancestor's.

    Module paths come back in diffusers' spelling, text encoders with `text_model.`; alpha is what makes alpha / rank the effective scale.
    Tucker factors (`lora_mid`) are folded into `down`, exactly. CheckpointError names all that is not understood: foreign keys, DoRA, LoHa,
    LoKr, full differences, half pairs, shapes that do not fit each other, values that are not finite, empty tensors; or what the file is instead (a base model, a UNet, a training state).
    """
    path = Path(path)
    _refuse_others(path)
    tensors, metadata = read_tensors(path)
    number = metadata.get(META_FORMAT, FORMAT)
    if number != FORMAT:
        raise CheckpointError(f"{path} is in format {number[:40]!r} of hcpdiff; this version reads format {FORMAT}. Update hcpdiff.")
    component = metadata.get(META_COMPONENT) or _folder_component(path)
    if component is not None and component not in COMPONENTS:
        raise CheckpointError(f"{path} is for the component {component[:40]!r}, which this version of hcpdiff does not know.")
    layers, spelling, notices = parse(tensors, metadata, component, path)
    return LoraFile({name: layers[name] for name in COMPONENTS if name in layers}, metadata, spelling, tuple(notices))

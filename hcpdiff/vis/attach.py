"""LoRA files -> factors on the model's layers, and the rows of the start report."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..adapters.attach import attach_lora
from ..adapters.base import adapted_layers, detach
from ..adapters.lora import HALF, Lora
from ..adapters.shadow import Shadow
from ..checkpoint.convert import other_family
from ..checkpoint.format import META_BASE_VERSION, load_lora
from ..errors import ConfigError, HCPError, LayerMatchError
from ..families.base import Models
from ..lora_tensors import LoraTensors
from .lora_files import LoraSource

Layers = dict[str, LoraTensors]


@dataclass(frozen=True)
class Loaded:
    """A source with its layers by component ('unet', 'text_encoder' ...), the file of each, what its reader wants said, and the (first) file's metadata."""

    source: LoraSource
    layers: Mapping[str, Layers]
    notices: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def base_version(self) -> str | None:
        """What it was trained on, where it is a file of ours."""
        return self.metadata.get(META_BASE_VERSION)

    def strength(self, component: str) -> float:
        """Strength on a component."""
        return self.source.strength if component == "unet" else self.source.strength_TE

    def say(self, version: str) -> list[str]:
        """What a user should know before drawing on a base model of this version."""
        other = self.base_version is not None and self.base_version != version
        return [*self.notices, *([f"{self.source.name} was trained on {self.base_version}, the base model is {version}; it may do little or harm."] if other else [])]

    def describe(self) -> list[str]:
        """One line per component: layers, rank, strength."""
        return [f"{self.files[component].stem if component in self.files else self.source.name}: {component}, {len(layers)} layers, "
                f"rank {ranks(layers)}, strength {self.strength(component):g}" for component, layers in self.layers.items() if layers]


def ranks(layers: Layers) -> str:
    """'8', or '4 to 16'."""
    found = sorted({tensors.rank for tensors in layers.values()})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def read_all(sources: Sequence[LoraSource]) -> list[Loaded]:
    """Reads the files of all sources; every fault of every file comes in one error."""
    loaded, faults = [], []
    for source in sources:
        try:
            loaded.append(read(source))
        except HCPError as error:
            faults += [fault if source.key in fault else f"{source.key}: {fault}" for fault in error.faults]
    if faults:
        raise ConfigError(faults)
    return loaded


def read(source: LoraSource) -> Loaded:
    """The layers of one source: the UNet's file, the text encoder's file, or one file that holds both."""
    files = {path: load_lora(path) for path in (source.path, *source.text_files) if path}
    layers = dict(files[source.path].layers) if source.path else {}
    origin = dict.fromkeys(layers, source.path)
    if source.text_files:
        text, places = text_layers(source, {path: files[path].layers for path in source.text_files})
        layers, origin = ({"unet": layers["unet"]} if "unet" in layers else {}) | text, origin | places
    elif not source.text:
        layers = {component: found for component, found in layers.items() if component == "unet"}
        if not layers:
            raise LayerMatchError(f"{source.key}: {source.path} holds layers of the text encoder only, and path_TE is null.")
    if source.layers is not None:
        layers = chosen(layers, source.layers, f"{source.key}.layers")
    notices = [notice for file in files.values() for notice in file.notices]
    if source.path and not layers.get("unet"):
        notices.append(f"{source.key}: {source.path} holds the text encoder's part only; the UNet is drawn without a LoRA.")
    return Loaded(source, layers, tuple(notices), next(iter(files.values())).metadata, origin)


def text_layers(source: LoraSource, files: Mapping[Path, Mapping[str, Layers]]) -> tuple[dict[str, Layers], dict[str, Path]]:
    """Layers of text encoders and the file of each; LayerMatchError for a file that has none, and for two files of one encoder."""
    key = "lora_path_TE" if source.key.startswith("lora_path") else source.key + ".path_TE"
    layers: dict[str, Layers] = {}
    origin: dict[str, Path] = {}
    for path, found in files.items():
        own = {component: part for component, part in found.items() if component != "unet" and part}
        if not own:
            raise LayerMatchError(f"{key}: {path} holds no layers of a text encoder.")
        twice = [component for component in own if component in layers]
        if twice:
            raise LayerMatchError(f"{key}: {origin[twice[0]]} and {path} both hold layers of {twice[0]}.")
        layers |= own
        origin |= dict.fromkeys(own, path)
    return layers, origin


def chosen(layers: Mapping[str, Layers], patterns: Sequence[str], key: str) -> dict[str, Layers]:
    """The layers at or inside what the patterns match; a pattern that matches nothing raises LayerMatchError."""
    names = [path for found in layers.values() for path in found]
    keep, faults = set(), []
    for n, pattern in enumerate(patterns):
        try:
            matched = {path for path in names if matches(pattern, path)}
        except re.error as error:
            faults.append(f"{key}[{n}] = {pattern!r} is not a regular expression: {error}.")
            continue
        if not matched:
            near = difflib.get_close_matches(pattern.removeprefix("re:"), names, n=2, cutoff=0.3)
            faults.append(f"{key}[{n}] = {pattern!r} matches none of the file's {len(names)} layers. Nearest: {', '.join(near) or ', '.join(names[:2])}.")
        keep |= matched
    if faults:
        raise LayerMatchError(faults)
    return {component: {path: tensors for path, tensors in found.items() if path in keep} for component, found in layers.items()}


def matches(pattern: str, path: str) -> bool:
    """Whether the pattern matches the layer's path or a module above it, as in training's `layers`; text encoders with and without `text_model.`."""
    parts = path.split(".")
    above = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    names = above + [name.removeprefix("text_model.") for name in above if name.startswith("text_model.")]
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in names)
    return pattern in names


def attach_all(models: Models, loaded: Sequence[Loaded]) -> None:
    """Lays every LoRA on its layers, in fp32 into the weights and else beside them; several on one layer add up. Strength 0 leaves a layer as it is, bit for bit.

    Raises LayerMatchError that names the file whose layers the model does not have; all files' faults come together.
    """
    check_fit(models, loaded)
    for component, module in models.modules.items():
        together: dict[str, list[tuple[LoraTensors, float]]] = {}
        for lora in loaded:
            for path, tensors in lora.layers.get(component, {}).items():
                if lora.strength(component) != 0:
                    together.setdefault(path, []).append((tensors, lora.strength(component)))
        if together:
            attach_lora(module, together, component, fold=True)


def shadow_half(unet: torch.nn.Module) -> None:
    """Gives the LoRA beside half-precision weights half-precision copies of their factors, for `copied`; once the model is where it stays."""
    loras = [layer.adapter for layer in adapted_layers(unet).values() if isinstance(layer.adapter, Lora)]
    if loras and unet.dtype in HALF:
        Shadow(loras, unet.dtype)


@contextmanager
def copied(unet: torch.nn.Module) -> Iterator[None]:
    """Inside, LoRA that have half-precision copies of their factors multiply with them, so that nothing is cast at every call. Nothing may change them."""
    shadows = dict.fromkeys(shadow for layer in adapted_layers(unet).values() if (shadow := getattr(layer.adapter, "shadow", None)) is not None)
    with ExitStack() as stack:
        for shadow in shadows:
            stack.enter_context(shadow.fresh())
        yield


def check_fit(models: Models, loaded: Sequence[Loaded]) -> None:
    """Tries each file on its own, so that a misfit names the file; one that is for another family is told as that alone."""
    faults = []
    for lora in loaded:
        found = _misfits(models, lora)
        other = other_family(lora.layers, lora.metadata, models.family.base_version(models)) if found else ""
        faults += [f"{lora.source.key} ({lora.source.path or lora.source.path_TE}): {other}"] if other else found
    if faults:
        raise LayerMatchError(faults)


def _misfits(models: Models, lora: Loaded) -> list[str]:
    faults = []
    for component, layers in lora.layers.items():
        where = f"{lora.source.key} ({lora.files.get(component, lora.source.path)})"
        if component not in models.modules:
            faults.append(f"{where}: it holds layers of {component}, which this model does not have.")
            continue
        try:
            attach_lora(models.modules[component], {path: [(tensors, 1.0)] for path, tensors in layers.items()}, where)
        except LayerMatchError as error:
            faults += error.faults
        finally:
            detach(models.modules[component])
    return faults

"""LoRA files on a model, for drawing: beside the base weight, so that no half-precision weight rounds them away, or folded into an fp32 one."""

import difflib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import LayerMatchError
from ..lora_tensors import LoraTensors
from .base import put
from .lora import Lora
from .select import ADAPTABLE


def attach_lora(model: nn.Module, layers: Mapping[str, Sequence[tuple[LoraTensors, float]]], where: str, fold: bool = False) -> int:
    """Lays (tensors, strength) pairs beside the layers of `model`; several on one layer add up exactly. Returns the number of layers.

    fold: where the weight is fp32 the sum goes into it instead, for good: a picture then costs what it costs without a LoRA.

    Paths of text encoders match with and without `text_model.`. A path or shape that the model does not have raises LayerMatchError,
    all of them at once, and leaves the model as it was.
    """
    modules = {path: module for path, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    resolved, faults = {}, []
    for path, parts in layers.items():
        name = resolve_path(path, modules)
        if name is None:
            faults.append((path, f"{where}: the model has no layer {path!r}. Nearest: {_near(path, modules)}."))
            continue
        wrong = [f"{where}: {path} has shape {tuple(t.up.shape)} x {tuple(t.down.shape)}, the model's layer is {tuple(modules[name].weight.shape)}."
                 for t, _ in parts if not fits(modules[name], t)]
        faults += [(path, line) for line in wrong]
        resolved[name] = parts
    if faults:
        raise LayerMatchError(_few([line for _, line in faults], len(layers)))
    for name, parts in resolved.items():
        lora = Lora.of(modules[name], concatenate(parts)).requires_grad_(False).eval()
        if fold and _plain_fp32(modules[name].weight):
            _fold(modules[name], lora)
        else:
            put(modules[name], lora)
    return len(resolved)


def _plain_fp32(weight: torch.Tensor) -> bool:
    """Whether a weight can take a small change in: not half precision, and no quantised tensor that calls itself fp32."""
    return weight.dtype == torch.float32 and type(weight.data) is torch.Tensor


@torch.no_grad()
def _fold(layer: nn.Module, lora: Lora) -> None:
    """A new weight rather than the old one changed: that may be a file's pages, or shared."""
    layer.weight = nn.Parameter(lora.merged(layer.weight, None)[0], requires_grad=False)


def resolve_path(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The model's own spelling of a layer path: transformers 5 dropped `text_model.` from one of its classes."""
    for name in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        if name in modules:
            return name
    return None


def fits(layer: nn.Module, tensors: LoraTensors) -> bool:
    """Whether up @ down has the layer's shape; 1x1 convolutions and Linear layers pass for each other."""
    flat = tuple(layer.weight.shape)
    shape = (tensors.up.shape[0], *tensors.down.shape[1:])
    inner = tensors.up.shape[1] == tensors.down.shape[0] and math.prod(tensors.up.shape[2:]) == 1
    squeezed = tuple(n for i, n in enumerate(flat) if i < 2 or n != 1), tuple(n for i, n in enumerate(shape) if i < 2 or n != 1)
    return inner and squeezed[0] == squeezed[1]


def concatenate(parts: Sequence[tuple[LoraTensors, float]]) -> LoraTensors:
    """One LoRA of scale 1 that is the weighted sum of several: factors side by side along the rank, in fp32."""
    down = torch.cat([t.down.float().flatten(1) for t, _ in parts])
    up = torch.cat([t.up.float().flatten(1) * (t.scale * strength) for t, strength in parts], dim=1)
    kernel = parts[0][0].down.shape[1:]
    return LoraTensors(down.reshape(len(down), *kernel), up.reshape(*up.shape, *(1,) * (len(kernel) - 1)), float(len(down)))


def _near(path: str, modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(difflib.get_close_matches(path, modules, n=2, cutoff=0.4)) or "none; is it for another architecture?"


def _few(faults: list[str], total: int, most: int = 5) -> list[str]:
    if len(faults) <= most:
        return faults
    return [*faults[:most], f"... and {len(faults) - most} more of {total} layers: this LoRA is for another architecture."]

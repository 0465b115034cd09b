"""Modules from a file of tensors: every parameter is looked up by its name there, read, cast and put in its place; nothing is held twice.

A part can be made in two steps: its outline, of which everything but the values is known and checked, and the reading of these, when there is room for them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.io import Scratch
from ..errors import ConfigError
from .ldm_names import Source, sources
from .source import is_of_transformers
from .weight_file import WeightFile

MOST_NAMED = 3

Keep = Callable[[str, Tensor], Tensor]  # name, weight -> what is kept of it, such as fewer bits
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Reader:
    """Puts the weights of an outline on a device, one by one. file: where all of them lie; None where they lie in several, or were read already."""

    read: Callable[[nn.Module, torch.device, Keep | None], None]
    file: Path | None = None

    def __call__(self, module: nn.Module, device: torch.device = CPU, keep: Keep | None = None) -> nn.Module:
        """The module, complete."""
        self.read(module, device, keep)
        return module


def outline(kind: type, config: Mapping[str, Any], style: str, weights: WeightFile, names: Mapping[str, str], dtype: torch.dtype, where: str,
            unused: str = "") -> tuple[nn.Module, Reader]:
    """The module of class `kind`, frozen, its parameters in `dtype` on meta, and what reads them. Adapters may be laid on it before.

    names: name in the part -> name in the file, all of the part's; unused: beginning of names that may be left over. ConfigError, beginning with `where`, names what is missing,
    left over or of another shape.
    """
    module = empty(kind, config, where)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = _find(sources(style, wanted, config), names, where, kind.__name__, unused)
    faults = [f"{where}: {name} is {_by(_shape(weights.shapes[names[source.name]], source))} in the file, {_by(wanted[name])} by its config"
              for name, source in found.items() if not _fits(_shape(weights.shapes[names[source.name]], source), wanted[name])]
    if faults:
        raise ConfigError(faults[:MOST_NAMED] + ([f"{where}: … and {len(faults) - MOST_NAMED} more weights of another shape"] if len(faults) > MOST_NAMED else []))
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    if is_of_transformers(kind):
        module.config.dtype = dtype  # as the library says it of what it has loaded

    def read(module: nn.Module, device: torch.device, keep: Keep | None) -> None:
        for name, tensor in _read(found, wanted, weights, names, dtype, device):
            set_weight(module, name, keep(name, tensor) if keep else tensor)

    return module.requires_grad_(False).eval(), Reader(read, weights.files[0] if len(weights.files) == 1 else None)


def move(module: nn.Module, device: torch.device, keep: Keep | None) -> None:
    """Reads (as of `Reader`) a module whose weights are there already: of what is frozen. What is trained stays the object that an optimizer holds."""
    for name in [name for name, parameter in module.named_parameters() if not parameter.requires_grad]:  # names alone: each weight goes in its turn
        tensor = module.get_parameter(name).data.to(device)
        set_weight(module, name, keep(name, tensor) if keep else tensor)


def set_weight(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of a frozen parameter or of a buffer. ValueError where the parameter is trained: who trains it would go on with the old one."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
        return
    if owner._parameters[leaf].requires_grad:
        raise ValueError(f"{name} is trained and cannot be replaced")
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def empty(kind: type, config: Mapping[str, Any], where: str) -> nn.Module:
    """The module without weights (parameters on meta, buffers real)."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            if is_of_transformers(kind):  # a kernel that a config names is code of the hub
                return kind._from_config(kind.config_class.from_dict(dict(config)), attn_implementation="sdpa")
            return kind.from_config(dict(config))
    except Exception as error:  # constructors raise what a wrong value makes of them; the user needs the place
        raise ConfigError(f"{where}: no {kind.__name__} can be made of its config: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _find(places: Mapping[str, tuple[Source, ...]], names: Mapping[str, str], where: str, what: str, unused: str) -> dict[str, Source]:
    """Parameter -> its place in the file, for all; ConfigError where a parameter or a tensor stays alone."""
    found = {name: next((source for source in options if source.name in names), None) for name, options in places.items()}
    missing = [options[0].name if options else name for name, options in places.items() if found[name] is None]
    used = {source.name for source in found.values() if source}
    left = [name for name in names if name not in used and not (unused and name.startswith(unused))]
    faults = [f"{where}: {len(some)} {text}, such as {', '.join(sorted(some)[:MOST_NAMED])}."
              for some, text in ((missing, f"weights of {what} are missing"), (left, f"tensors belong to no weight of {what}")) if some]
    if faults:
        raise ConfigError(faults)
    return found


def _shape(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    """The shape that a tensor of the file has as a parameter."""
    if source.third is not None and shape:
        shape = (shape[0] // 3 if shape[0] % 3 == 0 else -1, *shape[1:])
    return shape[::-1] if source.turned else shape


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, or a 1x1 convolution where a Linear is wanted and the other way round, as the attention of VAEs is stored."""
    return found == wanted or (min(len(found), len(wanted)) == 2 and tuple(found[2:] + wanted[2:]) == (1, 1) and found[:2] == wanted[:2])


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _read(found: Mapping[str, Source], wanted: Mapping[str, tuple[int, ...]], weights: WeightFile, names: Mapping[str, str], dtype: torch.dtype,
          device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(parameter, its value in memory of torch's own, which is aligned: sums depend on that in their last bits), one after the other."""
    parts: dict[str, list[tuple[str, Source]]] = {}  # q, k and v come from one tensor
    for name, source in sorted(found.items(), key=lambda item: (item[1].name, item[0])):
        parts.setdefault(source.name, []).append((name, source))
    scratch = Scratch()
    for place, takers in parts.items():
        whole = weights.tensor(names[place], scratch)
        for name, source in takers:
            tensor = whole
            if source.third is not None:
                rows = len(tensor) // 3
                tensor = tensor[source.third * rows : (source.third + 1) * rows]
            tensor = (tensor.T if source.turned else tensor).reshape(wanted[name])
            yield name, torch.empty(wanted[name], dtype=dtype, device=device).copy_(tensor)

"""LoRA groups on one component, from config to parameters, files and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..adapters.attach import resolve_path
from ..adapters.base import put
from ..adapters.lora import Lora
from ..adapters.select import Selection, select
from ..errors import CheckpointError, ConfigError
from ..families.base import Component, Models
from ..lora_tensors import LoraTensors
from ..randomness import generator


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate; `name` is how the log and TensorBoard call them."""

    name: str
    lr: float
    parameters: tuple[nn.Parameter, ...]


def lay_groups(models: Models, key: str, groups: Sequence, seed: int) -> list["LoraTrainable"]:
    """A config key's groups on every component that the key is for; components that no pattern names have none.

    Whether a pattern matches nothing, and whether two groups claim a layer, is judged over all of the components together.
    """
    made = [LoraTrainable(component, groups, key) for component in models.family.components if component.config_key == key]
    for trainable, selections in zip(made, choose(models, [trainable.component for trainable in made], groups, key)):
        trainable.lay(models, selections, seed)
    return [trainable for trainable in made if trainable.adapters]


def choose(models: Models, components: Sequence[Component], groups: Sequence, key: str) -> list[list[Selection]]:
    """Per component, what each group claims of it."""
    together = nn.ModuleDict({component.name: models.modules[component.name] for component in components})

    def aliases(path: str) -> tuple[str, ...]:
        name, _, rest = path.partition(".")
        return models.family.aliases(name, rest)

    selections = select(together, groups, key, aliases, [component.alias for component in components if component.alias])
    return [[selection.below(f"{component.name}.") for selection in selections] for component in components]


class LoraTrainable:
    """The groups of a config key, such as `lora_unet`, laid on one component.

    `touches` is the component's role, 'denoiser' or 'text': outputs of what is touched must not be cached.
    """

    def __init__(self, component: Component, groups: Sequence, key: str):
        self.component, self.groups, self.key = component, groups, key
        self.touches = {component.role}
        self.adapters: dict[str, Lora] = {}  # model path -> adapter
        self.group_of: dict[str, int] = {}
        self.selections = []

    def attach(self, models: Models, seed: int) -> None:
        """Finds the layers of this component alone and lays fresh adapters beside them."""
        self.lay(models, choose(models, [self.component], self.groups, self.key)[0], seed)

    def lay(self, models: Models, selections: list[Selection], seed: int) -> None:
        """Lays fresh adapters beside the selected layers; call before the model moves to its device."""
        name = self.component.name
        model, self.selections = models.modules[name], selections
        self.file_path = lambda path: models.family.file_path(name, path)
        for index, (group, selection) in enumerate(zip(self.groups, self.selections)):
            for path in selection.paths:
                layer = model.get_submodule(path)
                lora = Lora(layer, self._rank(group, layer, index), 0.0, group.dropout)
                if layer.weight.is_meta:  # an outline, whose weights are read later
                    lora.to_empty(device="cpu")
                lora.alpha = float(lora.rank if group.alpha is None else group.alpha)
                draws = generator(seed, "lora", self.component.alias + self.file_path(path)).random(lora.down.shape, dtype="float32")
                lora.reset(torch.from_numpy(draws))
                put(layer, lora)
                lora.train()
                self.adapters[path], self.group_of[path] = lora, index

    def _rank(self, group, layer: nn.Module, index: int) -> int:
        if 0 < group.rank < 1:
            return max(1, round(group.rank * layer.weight.shape[0]))
        if group.rank != int(group.rank):
            raise ConfigError(f"{self.key}[{index}].rank = {group.rank}: a whole number, or a share below 1 of the layer's output width.")
        return int(group.rank)

    def param_groups(self) -> list[ParamGroup]:
        """One per config group that has layers here, in config order."""
        stem, held = self.component.file_stem, set(self.group_of.values())
        return [
            ParamGroup(stem if len(self.groups) == 1 else f"{stem}-{i}", group.lr,
                       tuple(p for path, lora in self.adapters.items() if self.group_of[path] == i for p in (lora.down, lora.up)))
            for i, group in enumerate(self.groups) if i in held
        ]

    def export(self) -> dict[str, LoraTensors]:
        """Module path as files spell it -> fp32 tensors on the CPU."""
        return {self.file_path(path): lora.tensors() for path, lora in self.adapters.items()}

    @torch.no_grad()
    def load(self, layers: Mapping[str, LoraTensors], source: str) -> list[str]:
        """Starts from a file's LoRA; its ranks must be the config's, its scale is folded into `up`. Returns notices."""
        modules, faults, loaded, ranks = dict.fromkeys(self.adapters), [], set(), {}
        for path, tensors in layers.items():
            name = resolve_path(path, modules)
            if name is None:
                faults.append(f"{source}: {path} is not among the layers of {self.key}; add it to layers, or its effect would be lost.")
            elif tensors.rank != self.adapters[name].rank:
                ranks.setdefault((tensors.rank, self.group_of[name], self.adapters[name].rank), []).append(path)
            elif tensors.down.numel() != self.adapters[name].down.numel() or tensors.up.numel() != self.adapters[name].up.numel():
                faults.append(f"{source}: {path} has shape {tuple(tensors.up.shape)} x {tuple(tensors.down.shape)}: it is for another architecture.")
            else:
                loaded.add(name)
                self._copy(self.adapters[name], tensors)
        faults += [f"{source}: {len(paths)} layers have rank {rank}, such as {paths[0]}, and {self.key}[{group}].rank gives {wanted}; they must agree."
                   + (" `python -m hcpdiff.tools.lora_resize` cuts a file to a lower rank." if wanted < rank else "") for (rank, group, wanted), paths in ranks.items()]
        if faults:
            raise CheckpointError(faults if len(faults) <= 6 else [*faults[:6], f"... and {len(faults) - 6} more."])
        fresh = len(self.adapters) - len(loaded)
        return [f"{source}: {len(loaded)} layers loaded" + (f", {fresh} layers of {self.key} are not in it and start fresh." if fresh else ".")]

    def _copy(self, lora: Lora, tensors: LoraTensors) -> None:
        lora.down.copy_(tensors.down.reshape(lora.down.shape))
        lora.up.copy_(tensors.up.float().reshape(lora.up.shape) * (tensors.scale / lora.scale if lora.scale else 1.0))

    def rows(self) -> list[tuple[str, str, int, str, str, float, str]]:
        """For the start table: (group, pattern, layers, rank, alpha, lr, parameters) per pattern."""
        out = []
        for i, (group, selection) in enumerate(zip(self.groups, self.selections)):
            own = [lora for path, lora in self.adapters.items() if self.group_of[path] == i]
            if not own:
                continue
            ranks = sorted({lora.rank for lora in own})
            rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
            alpha = "rank" if group.alpha is None else f"{group.alpha:g}"
            count = sum(p.numel() for lora in own for p in lora.parameters())
            named = f"{self.key}[{i}] {self.component.alias}".rstrip()
            for j, (pattern, layers) in enumerate(selection.per_pattern.items()):
                out.append((named if j == 0 else "", pattern, layers, rank, alpha, group.lr, f"{count:,}" if j == 0 else ""))
        return out

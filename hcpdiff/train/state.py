"""What a resumed run needs of a trainer, as plain data, and the way back."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import CheckpointError
from .trainer import Trainer


KEYS = frozenset({"step", "positions", "skipped", "loss_scale", "optimizer", "layout", "adapters"})


def training_state(trainer: Trainer, trainables: Sequence) -> dict[str, Any]:
    """All that a resumed run needs, as plain data."""
    trainer.settle()
    return {
        "step": trainer.state.step,
        "positions": [[p.epoch, p.chunk] for p in trainer.state.positions],
        "skipped": [trainer.state.skipped, trainer.state.skipped_in_row, trainer.state.scale_skips],
        "loss_scale": [trainer.loss_scale.value, trainer.loss_scale.clean],
        "optimizer": trainer.optimizer.state_dict(),
        "layout": layout(trainables),
        "adapters": {t.component.name: {path: {"down": lora.down, "up": lora.up} for path, lora in t.adapters.items()} for t in trainables},
    }


def layout(trainables: Sequence) -> list[list[str]]:
    """Which layers each parameter group holds, in order: optimizer state knows its parameters by place only."""
    return [[path for path in t.adapters if t.group_of[path] == index] for t in trainables for index in sorted(set(t.group_of.values()))]


def restore(trainer: Trainer, trainables: Sequence, state: Mapping[str, Any], position: Callable, options: frozenset[str] = frozenset()) -> None:
    """Puts a trainer where `training_state` was taken; CheckpointError if it does not fit (`misfits`), and nothing is loaded half.

    The optimizer's arguments are those of this run, as the lr is, also where the config does not set them (any more): what its class takes by name, and
    `options`, for a class that does not say what it takes. What else its groups hold has been learnt, and is the state's.
    """
    faults = misfits(trainables, state) or _what_the_optimizer_lacks(trainer.optimizer, state["optimizer"])
    if faults:
        raise CheckpointError([f"train.resume: {fault}" for fault in faults])
    with torch.no_grad():
        for t in trainables:
            for path, tensors in state["adapters"][t.component.name].items():
                t.adapters[path].down.copy_(tensors["down"])
                t.adapters[path].up.copy_(tensors["up"])
    trainer.optimizer.load_state_dict(_own_options(state["optimizer"], trainer, options))
    trainer.state.step, trainer.state.positions = state["step"], [position(*p) for p in state["positions"]]
    trainer.state.skipped, trainer.state.skipped_in_row, trainer.state.scale_skips = (*state["skipped"], 0)[:3]  # early states have two
    trainer.loss_scale.load(*state["loss_scale"])


def _own_options(optimizer_state: dict, trainer: Trainer, options: frozenset[str]) -> dict:
    """The saved optimizer state under this run's own settings: a resumed run may have been given another lr or weight decay."""
    kept = {"initial_lr", "lr", "name", *options, *inspect.signature(type(trainer.optimizer)).parameters} - {"params"}
    groups = [{**saved, **{key: own[key] for key in kept if key in own}} for saved, own in zip(optimizer_state["param_groups"], trainer.optimizer.param_groups)]
    return {**optimizer_state, "param_groups": groups}


def _what_the_optimizer_lacks(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> list[str]:
    """What an optimizer of torch would look for in its state and not find there, since an option was set (amsgrad, momentum) that needs more of it.

    Asked of the optimizer itself: a copy of it takes one step with a tensor like its group's first. Options that other packages' optimizers may change are theirs to judge.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return []
    faults = []
    for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        trial, like = copy.copy(optimizer), torch.nn.Parameter(torch.ones_like(group["params"][0]))
        like.grad = torch.ones_like(like)
        trial.state, trial.param_groups = defaultdict(dict), [{**group, "params": [like]}]
        trial.step()
        held = saved["state"].get(old["params"][0])
        lacking = sorted(trial.state[like].keys() - held.keys()) if held is not None else []
        if lacking:
            faults.append(f"train.optimizer: as it is set now it needs {', '.join(lacking)}, which the saved state does not hold. Set its options back; they are in the run's cfg.yaml.")
    return list(dict.fromkeys(faults))


def misfits(trainables: Sequence, state: Mapping[str, Any]) -> list[str]:
    """Why the tensors of a state cannot be put into these trainables; empty if they can."""
    faults = [line for t in trainables for line in _differences(t, state["adapters"].get(t.component.name, {}))]
    faults += [f"the state has LoRA layers of the {name}, this config trains none." for name in state["adapters"] if name not in {t.component.name for t in trainables}]
    if not faults and state["layout"] != layout(trainables):
        faults = ["the same LoRA layers are in other groups, or the groups in another order."]
    return faults


def _differences(trainable, saved: Mapping) -> list[str]:
    missing = [path for path in trainable.adapters if path not in saved]
    extra = [path for path in saved if path not in trainable.adapters]
    shape = [path for path, lora in trainable.adapters.items() if path in saved and saved[path]["down"].shape != lora.down.shape]
    found = ((missing, "LoRA layers are new in"), (extra, "LoRA layers of the state are not in"), (shape, "LoRA layers have another rank in"))
    return [f"{len(paths)} {what} {trainable.key}, such as {paths[0]}." for paths, what in found if paths]

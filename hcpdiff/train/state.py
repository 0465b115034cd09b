"""What a resumed run needs of a trainer, as plain data, and the way back."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch import Tensor

from ..errors import CheckpointError
from .form import config, count, every, is_number, mapping, number, one, plain, positions, record, rows, text
from .trainer import Trainer

_FACTOR = one(lambda value: isinstance(value, Tensor) and value.is_floating_point())
_MARKS = one(lambda value: isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 2)
_BYTES = one(lambda value: isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1)
_SOURCE = record(names=_BYTES, images=_MARKS, captions=_MARKS, templates=text)
FORM = record(
    step=count, positions=positions, skipped=rows(count, 2, 3), loss_scale=rows(number, 2, 2), layout=rows(rows(text)),
    optimizer=record(state=mapping, param_groups=rows(record(params=rows(count)))), adapters=every(every(record(down=_FACTOR, up=_FACTOR))),
    weights=every(every(text), str.isdecimal),
    run=record("learns", "started", "versions", "device", world=count, accumulation=count, config=config, marks=every(text), alphas=every(number),
               data=every(every(_SOURCE)), learns=record(prediction=text, schedule=text), started=number, versions=plain, device=plain))


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


def restore(trainer: Trainer, trainables: Sequence, state: Mapping[str, Any], position: Callable, options: frozenset[str] = frozenset(),
            where: str = "train.resume") -> None:
    """Puts a trainer where `training_state` was taken; CheckpointError if it does not fit (`misfits`), and nothing is loaded half.

    The optimizer's arguments are those of this run, as the lr is, also where the config does not set them (any more): what its class takes by name, and
    `options`, for a class that does not say what it takes. What else its groups hold has been learnt, and is the state's. `where`: what faults begin with.
    """
    faults = misfits(trainables, state) or _optimizer_misfits(trainer.optimizer, state["optimizer"])
    if faults:
        raise CheckpointError([f"{where}: {fault}" for fault in faults])
    with torch.no_grad():
        for t in trainables:
            for path, tensors in state["adapters"][t.component.name].items():
                t.adapters[path].down.copy_(tensors["down"])
                t.adapters[path].up.copy_(tensors["up"])
    try:
        trainer.optimizer.load_state_dict(_own_options(state["optimizer"], trainer, options))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # optimizers of other packages raise what a wrong value makes of them
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{where}: train.optimizer cannot take the saved state of its own ({why}).") from error
    trainer.state.step, trainer.state.positions = state["step"], [position(*p) for p in state["positions"]]
    trainer.state.skipped, trainer.state.skipped_in_row, trainer.state.scale_skips = (*state["skipped"], 0)[:3]  # early states have two
    trainer.loss_scale.load(*state["loss_scale"])


def _own_options(optimizer_state: dict, trainer: Trainer, options: frozenset[str]) -> dict:
    """The saved optimizer state under this run's own settings: a resumed run may have been given another lr or weight decay."""
    kept = {"initial_lr", "lr", "name", *options, *inspect.signature(type(trainer.optimizer)).parameters} - {"params"}
    groups = [{**saved, **{key: own[key] for key in kept if key in own}} for saved, own in zip(optimizer_state["param_groups"], trainer.optimizer.param_groups)]
    return {**optimizer_state, "param_groups": groups}


def _optimizer_misfits(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> list[str]:
    """What an optimizer of torch would look for in its state and not find there, since an option was set (amsgrad, momentum) that needs more of it; or would find
    otherwise than it made it. Options and states of other packages' optimizers are theirs to judge."""
    if [len(group["params"]) for group in optimizer.param_groups] != [len(group["params"]) for group in saved["param_groups"]]:
        return ["the saved state of the optimizer is of other groups of parameters."]
    if not type(optimizer).__module__.startswith("torch.optim"):
        return []
    faults = []
    for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        fresh = {shape: _fresh_state(optimizer, group, shape) for shape in {parameter.shape for parameter in group["params"]}}
        pairs = [(saved["state"][place], fresh[parameter.shape]) for place, parameter in zip(old["params"], group["params"], strict=True) if place in saved["state"]]
        pairs = [(held if isinstance(held, Mapping) else dict.fromkeys(made, "odd"), made) for held, made in pairs]
        lacking = sorted({key for held, made in pairs for key, value in made.items() if held.get(key) is None and value is not None})
        odd = sorted({key for held, made in pairs for key, value in made.items() if held.get(key) is not None and not _alike(held[key], value)})
        if lacking:
            faults.append(f"train.optimizer: as it is set now it needs {', '.join(lacking)}, which the saved state does not hold. "
                          f"Set its options back; they are in the run's cfg.yaml.")
        if odd:
            faults.append(f"the saved state of the optimizer holds no {', '.join(odd)} that {type(optimizer).__name__} can go on with.")
    return list(dict.fromkeys(faults))


def _fresh_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], shape: torch.Size) -> dict[str, Any]:
    """What the optimizer keeps of a parameter of this shape; asked of itself: a copy of it takes one step."""
    trial, like = copy.copy(optimizer), torch.nn.Parameter(group["params"][0].new_ones(shape))
    like.grad = torch.ones_like(like)
    trial.state, trial.param_groups = defaultdict(dict), [{**group, "params": [like]}]
    trial.step()
    return trial.state[like]


def _alike(saved: Any, fresh: Any) -> bool:
    if isinstance(fresh, Tensor):
        return isinstance(saved, Tensor) and saved.shape == fresh.shape and saved.dtype.is_floating_point == fresh.dtype.is_floating_point
    return is_number(saved) if is_number(fresh) else type(saved) is type(fresh)


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
    shape = [path for path, lora in trainable.adapters.items()
             if path in saved and (saved[path]["down"].shape, saved[path]["up"].shape) != (lora.down.shape, lora.up.shape)]
    found = ((missing, "LoRA layers are new in"), (extra, "LoRA layers of the state are not in"), (shape, "LoRA layers have another rank in"))
    return [f"{len(paths)} {what} {trainable.key}, such as {paths[0]}." for paths, what in found if paths]

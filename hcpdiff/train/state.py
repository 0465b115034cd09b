"""What a resumed run needs of a trainer, as plain data, and the way back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import CheckpointError
from .trainer import Trainer


def training_state(trainer: Trainer, trainables: Sequence) -> dict[str, Any]:
    """All that a resumed run needs, as plain data."""
    return {
        "step": trainer.state.step,
        "positions": [[p.epoch, p.chunk] for p in trainer.state.positions],
        "skipped": [trainer.state.skipped, trainer.state.skipped_in_row],
        "loss_scale": [trainer.loss_scale.value, trainer.loss_scale.clean],
        "optimizer": trainer.optimizer.state_dict(),
        "adapters": {t.component.name: {path: {"down": lora.down, "up": lora.up} for path, lora in t.adapters.items()} for t in trainables},
    }


def restore(trainer: Trainer, trainables: Sequence, state: Mapping[str, Any], position: Callable) -> None:
    """Puts a trainer where `training_state` was taken; faults are named, and nothing is loaded half."""
    faults = [line for t in trainables for line in _differences(t, state["adapters"].get(t.component.name, {}))]
    faults += [f"the state trained {name}, this config does not." for name in state["adapters"] if name not in {t.component.name for t in trainables}]
    if faults:
        raise CheckpointError(["train.resume: the state belongs to another configuration:", *faults])
    with torch.no_grad():
        for t in trainables:
            for path, tensors in state["adapters"][t.component.name].items():
                t.adapters[path].down.copy_(tensors["down"])
                t.adapters[path].up.copy_(tensors["up"])
    trainer.optimizer.load_state_dict(_on_device(state["optimizer"], trainer))
    trainer.state.step, trainer.state.positions = state["step"], [position(*p) for p in state["positions"]]
    trainer.state.skipped, trainer.state.skipped_in_row = state["skipped"]
    trainer.loss_scale.value, trainer.loss_scale.clean = state["loss_scale"]


def _on_device(optimizer_state: dict, trainer: Trainer) -> dict:
    """The saved optimizer state under this run's own lr settings: a resumed run may have been given another lr."""
    groups = [{**saved, **{key: own[key] for key in ("initial_lr", "lr", "name")}} for saved, own in zip(optimizer_state["param_groups"], trainer.optimizer.param_groups)]
    return {**optimizer_state, "param_groups": groups}


def _differences(trainable, saved: Mapping) -> list[str]:
    missing = [path for path in trainable.adapters if path not in saved]
    extra = [path for path in saved if path not in trainable.adapters]
    shape = [path for path, lora in trainable.adapters.items() if path in saved and saved[path]["down"].shape != lora.down.shape]
    found = ((missing, "layers are new in"), (extra, "layers of the state are not in"), (shape, "layers have another rank in"))
    return [f"{len(paths)} {what} {trainable.key}, such as {paths[0]}." for paths, what in found if paths]

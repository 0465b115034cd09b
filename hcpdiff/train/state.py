"""What a resumed run needs of a trainer, as plain data, and the way back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import CheckpointError
from .trainer import Trainer

# What makes a run the run that it is: key, its name, what to do.
DECISIVE = (
    ("base_mark", "the base model of fingerprint", "Name the model that it was trained on."),
    ("config.train.optimizer._target_", "train.optimizer._target_", "Keep it, or start anew from its weights with model.init_lora."),
    ("config.seed", "seed", "Keep it."),
)


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


def resume_notes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the run that was saved and the one that goes on, for the log.

    Another base model, optimizer or seed would not be the same run: CheckpointError.
    """
    was, asked = _flat(saved), _flat(now)
    changed = {key: (was.get(key), asked.get(key)) for key in sorted(was.keys() | asked.keys()) if was.get(key) != asked.get(key)}
    faults = [f"train.resume: the run was saved with {name} {changed[key][0]!r}, now it is {changed[key][1]!r}: that would be another run. {hint}"
              for key, name, hint in DECISIVE if key in changed]
    if faults:
        raise CheckpointError(faults)
    own = {"config.train.resume", "config.exp_dir"}
    return [f"resumed with another {key.removeprefix('config.')}: {old!r} before, {new!r} now" for key, (old, new) in changed.items() if key not in own]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> leaf."""
    if isinstance(tree, Mapping):
        return {key: leaf for name, item in tree.items() for key, leaf in _flat(item, f"{path}.{name}" if path else str(name)).items()}
    return {path: tree}


def layout(trainables: Sequence) -> list[list[str]]:
    """Which layers each parameter group holds, in order: optimizer state knows its parameters by place only."""
    return [[path for path in t.adapters if t.group_of[path] == index] for t in trainables for index in range(len(t.groups))]


def restore(trainer: Trainer, trainables: Sequence, state: Mapping[str, Any], position: Callable, options: frozenset[str] = frozenset()) -> None:
    """Puts a trainer where `training_state` was taken; faults are named, and nothing is loaded half.

    `options` are the optimizer's arguments that the config of this run sets: they hold, as the lr does.
    """
    faults = [line for t in trainables for line in _differences(t, state["adapters"].get(t.component.name, {}))]
    faults += [f"the state trained {name}, this config does not." for name in state["adapters"] if name not in {t.component.name for t in trainables}]
    if not faults and state["layout"] != layout(trainables):
        faults = ["the same layers are in other groups, or the groups in another order."]
    if faults:
        raise CheckpointError([f"train.resume: the state belongs to another configuration: {fault} Start from the run's own cfg.yaml." for fault in faults])
    with torch.no_grad():
        for t in trainables:
            for path, tensors in state["adapters"][t.component.name].items():
                t.adapters[path].down.copy_(tensors["down"])
                t.adapters[path].up.copy_(tensors["up"])
    trainer.optimizer.load_state_dict(_own_options(state["optimizer"], trainer, options))
    trainer.state.step, trainer.state.positions = state["step"], [position(*p) for p in state["positions"]]
    trainer.state.skipped, trainer.state.skipped_in_row, trainer.state.scale_skips = state["skipped"]
    trainer.loss_scale.load(*state["loss_scale"])


def _own_options(optimizer_state: dict, trainer: Trainer, options: frozenset[str]) -> dict:
    """The saved optimizer state under this run's own settings: a resumed run may have been given another lr or weight decay."""
    kept = {"initial_lr", "lr", "name", *options}
    groups = [{**saved, **{key: own[key] for key in kept if key in own}} for saved, own in zip(optimizer_state["param_groups"], trainer.optimizer.param_groups)]
    return {**optimizer_state, "param_groups": groups}


def _differences(trainable, saved: Mapping) -> list[str]:
    missing = [path for path in trainable.adapters if path not in saved]
    extra = [path for path in saved if path not in trainable.adapters]
    shape = [path for path, lora in trainable.adapters.items() if path in saved and saved[path]["down"].shape != lora.down.shape]
    found = ((missing, "layers are new in"), (extra, "layers of the state are not in"), (shape, "layers have another rank in"))
    return [f"{len(paths)} {what} {trainable.key}, such as {paths[0]}." for paths, what in found if paths]

"""What happens beside the steps: logging, saving, previews."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.format import save_lora
from ..checkpoint.resume import save_state
from ..errors import CheckpointError
from ..loggers import Logger
from .optim import weights_for_use
from .trainer import Hook, Trainer


class LogHook(Hook):
    """Every `every` steps: each step's scalars to the loggers, and a line with loss, lr, speed and time left."""

    def __init__(self, logger: Logger, every: int, steps_per_epoch: int):
        self.logger, self.every, self.steps_per_epoch = logger, every, steps_per_epoch
        self.since, self.counted = time.monotonic(), 0

    def on_step_end(self, trainer: Trainer) -> None:
        step = trainer.state.step
        self.logger.advance(step)
        if step % self.every == 0 or step == trainer.total_steps:
            self.flush(trainer)

    def flush(self, trainer: Trainer) -> None:
        """Writes what has been recorded since the last call."""
        records = trainer.take_records()
        if not records:
            return
        for step, values in records:
            self.logger.scalars(step, values)
        now = time.monotonic()
        speed = len(records) / max(1e-9, now - self.since)
        self.since = now
        step, last = records[-1]
        shown = {"epoch": step / self.steps_per_epoch, "loss": sum(values["loss"] for _, values in records) / len(records), "grad_norm": last["grad_norm"],
                 **{name.replace("lr/", "lr "): value for name, value in last.items() if name.startswith("lr/")}}
        if trainer.state.skipped:
            shown["skipped"] = trainer.state.skipped
        self.logger.progress(step, {**shown, "speed": speed, "left": (trainer.total_steps - step) / speed})


class SaveHook(Hook):
    """Every `every` steps and at the end: weight files for users in ckpts/, and a state to resume from. Rank 0 writes; nobody waits."""

    def __init__(self, run: Path, trainables: Sequence, metadata: Mapping[str, str], dtype: torch.dtype, every: int | None, keep_states: int,
                 describe: Callable[[], dict[str, Any]], log: LogHook):
        self.run, self.trainables, self.metadata, self.dtype = run, trainables, metadata, dtype
        self.every, self.keep_states, self.describe, self.log = every, keep_states, describe, log
        self.saved = None

    def on_step_end(self, trainer: Trainer) -> None:
        if self.every and trainer.state.step % self.every == 0:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.saved != trainer.state.step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Writes the checkpoint and the state of the step that is done."""
        step = trainer.state.step
        self.log.flush(trainer)
        with weights_for_use(trainer.optimizer):
            paths = [self._export(trainable, step) for trainable in self.trainables]
        save_state(self.run, step, training_state(trainer, self.trainables) | {"run": self.describe()}, self.keep_states)
        self.saved = step
        self.log.logger.flush()
        self.log.logger.say(f"saved {', '.join(str(path) for path in paths)}")

    def _export(self, trainable, step: int) -> Path:
        layers = trainable.export()
        bad = [path for path, t in layers.items() if not (torch.isfinite(t.down).all() and torch.isfinite(t.up).all())]
        if bad:
            raise CheckpointError(f"step {step} is not saved: {len(bad)} layers hold NaN or infinity, such as {bad[0]}. The checkpoints before it are whole.")
        path = self.run / "ckpts" / f"{trainable.component.file_stem}-{step}.safetensors"
        save_lora(path, layers, {**self.metadata, "step": str(step), "component": trainable.component.name}, dtype=self.dtype)
        return path


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


class PreviewHook(Hook):
    """Draws the preview prompts every `every` steps and at the end, into previews/ and the loggers."""

    def __init__(self, draw: Callable[[], list], run: Path, every: int, logger: Logger):
        self.draw, self.run, self.every, self.logger = draw, run, every, logger
        self.drawn = None

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.step % self.every == 0:
            self._draw(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.drawn != trainer.state.step:
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        step = trainer.state.step
        with weights_for_use(trainer.optimizer):
            images = self.draw()
        folder = self.run / "previews"
        folder.mkdir(exist_ok=True)
        for index, image in enumerate(images):
            image.save(folder / f"{step}-{index}.png")
        self.logger.images(step, "preview", images)
        self.drawn = step

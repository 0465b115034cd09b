"""What happens beside the steps: logging, saving, previews."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.format import save_lora
from ..checkpoint.resume import save_state
from ..errors import CheckpointError, HCPError
from ..loggers import Logger
from .optim import weights_for_use
from .state import training_state
from .trainer import Hook, Trainer


class LogHook(Hook):
    """Every `every` steps: each step's scalars to the loggers, and a line with loss, lr, speed and time left."""

    def __init__(self, logger: Logger, every: int, steps_per_epoch: int):
        self.logger, self.every, self.steps_per_epoch = logger, every, steps_per_epoch
        self.since, self.first = time.monotonic(), True

    def on_epoch_begin(self, trainer: Trainer, epoch: int) -> None:
        if not trainer.records:  # prompts have just been encoded: that is no step's time
            self.since = time.monotonic()

    def on_step_end(self, trainer: Trainer) -> None:
        step = trainer.state.step
        self.logger.advance(step)
        if self.first or step % self.every == 0 or step == trainer.total_steps:
            self.first = False  # a first line at once: loss, and how long it will take
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


class Periodic(Hook):
    """Does one thing every `every` steps (None: never) and at the end, once a step."""

    def __init__(self, every: int | None):
        self.every, self.last = every, None

    def on_step_end(self, trainer: Trainer) -> None:
        if self.every and trainer.state.step % self.every == 0:
            self._once(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._once(trainer)

    def _once(self, trainer: Trainer) -> None:
        if self.last != trainer.state.step:
            self.last = trainer.state.step
            self.act(trainer)

    def act(self, trainer: Trainer) -> None:
        """The thing itself."""


class SaveHook(Periodic):
    """Every `every` steps and at the end: weight files for users in ckpts/, and a state to resume from. Rank 0 writes; nobody waits."""

    def __init__(self, run: Path, trainables: Sequence, metadata: Mapping[str, str], dtype: torch.dtype, every: int | None, keep_states: int,
                 describe: Callable[[], dict[str, Any]], log: LogHook):
        super().__init__(every)
        self.run, self.trainables, self.metadata, self.dtype = run, trainables, metadata, dtype
        self.keep_states, self.describe, self.log = keep_states, describe, log

    def on_stop(self, trainer: Trainer) -> None:
        self._once(trainer)

    def act(self, trainer: Trainer) -> None:
        """Writes the checkpoint and the state of the step that is done."""
        step = trainer.state.step
        self.log.flush(trainer)
        with weights_for_use(trainer.optimizer):
            paths = [self._export(trainable, step) for trainable in self.trainables]
        save_state(self.run, step, training_state(trainer, self.trainables) | {"run": self.describe()}, self.keep_states)
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


class PreviewHook(Periodic):
    """Draws the preview prompts every `every` steps and at the end, into previews/ and the loggers."""

    def __init__(self, draw: Callable[[], list], run: Path, every: int, logger: Logger):
        super().__init__(every)
        self.draw, self.run, self.logger = draw, run, logger

    def act(self, trainer: Trainer) -> None:
        """Draws with the weights as they are."""
        step = trainer.state.step
        try:
            with weights_for_use(trainer.optimizer):
                images = self.draw()
            folder = self.run / "previews"
            folder.mkdir(exist_ok=True)
            for index, image in enumerate(images):
                image.save(folder / f"{step}-{index}.png")
        except (HCPError, OSError, torch.OutOfMemoryError) as error:  # a picture is no reason to lose a run
            self.logger.say(f"warning: the preview of step {step} could not be drawn: {error}")
            return
        self.logger.images(step, "preview", images)

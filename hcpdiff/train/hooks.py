"""What happens beside the steps: logging, and what is done every so many of them; saving is in `save.py`, previews in `previews.py`."""

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence

from ..loggers import Logger
from .trainer import Hook, Trainer


class LogHook(Hook):
    """Every `every` steps: each step's scalars to the loggers, and a line with loss, lr, speed and time left.

    A line that is due is written once its numbers are known, which beside a GPU is one step later: nothing waits for a device for its sake.
    Saves and previews (`Trainer.beside`) are left out of the speed.
    """

    def __init__(self, logger: Logger, every: int, steps_per_epoch: int, compiles: bool = False):
        """compiles: whether the first step compiles the model, so that its time says nothing about the others."""
        self.logger, self.every, self.steps_per_epoch, self.compiles = logger, every, steps_per_epoch, compiles
        self.since, self.beside, self.first, self.due = time.monotonic(), 0.0, True, None
        self.usual = Usual()

    def on_epoch_begin(self, trainer: Trainer, epoch: int) -> None:
        if not trainer.records and trainer.pending is None:  # what other hooks did before the first step is no step's time
            self.since, self.beside = time.monotonic(), trainer.beside

    def on_step_end(self, trainer: Trainer) -> None:
        step = trainer.state.step
        self.logger.advance(step)
        if self.compiles and self.first:
            self.logger.say(f"step {step} took {time.monotonic() - self.since:.0f} s, compiling included")
        self._write_what_is_due(trainer)
        if step == trainer.total_steps:
            self.flush(trainer)
        elif self.first or step % self.every == 0:
            self.first, self.due = False, step  # a first line at once: loss, and how long it will take
            self._write_what_is_due(trainer)

    def _write_what_is_due(self, trainer: Trainer) -> None:
        if self.due is not None and self.due <= trainer.known:
            self._write(trainer, trainer.take_records(self.due))

    def on_stop(self, trainer: Trainer) -> None:
        self.flush(trainer)

    def on_nonfinite(self, trainer: Trainer) -> None:
        self.flush(trainer)

    def on_fault(self, trainer: Trainer) -> None:
        self.flush(trainer)

    def flush(self, trainer: Trainer) -> None:
        """Writes what has been recorded since the last call, up to the last step. A step that changed nothing is recorded with the numbers that it had, NaN or infinite."""
        self._write(trainer, trainer.take_records())

    def _write(self, trainer: Trainer, records: list) -> None:
        self.due = None
        if not records:
            return
        for step, values in records:
            self.logger.scalars(step, values)
        for line in self._warnings(trainer, records):
            self.logger.say(f"warning: {line}")
        step, last = records[-1]
        shown = {"epoch": step / self.steps_per_epoch, "loss": mean_loss(records), "grad_norm": last["grad_norm"],
                 **{name.replace("lr/", "lr "): value for name, value in last.items() if name.startswith("lr/")}}
        if trainer.state.skipped:
            shown["skipped"] = trainer.state.skipped
        if trainer.loss_scale.active:
            shown |= {"loss_scale": int(trainer.loss_scale.value), "scale_skips": trainer.state.scale_skips}
        self.logger.progress(step, {**shown, **self._pace(trainer, step, len(records))})

    def _pace(self, trainer: Trainer, step: int, steps: int) -> dict[str, float]:
        """Steps a second since the last line, and seconds left at that; neither where the model was compiled meanwhile."""
        now, beside, compiled = time.monotonic(), trainer.beside, self.compiles
        speed = steps / max(1e-9, now - self.since - (beside - self.beside))
        self.since, self.beside, self.compiles = now, beside, False
        return {} if compiled else {"speed": speed, "left": (trainer.total_steps - step) / speed}

    def _warnings(self, trainer: Trainer, records: list) -> list[str]:
        skips = trainer.take_skips()
        lines = [str(skip) for skip in skips[:5]] + [f"{len(skips) - 5} more of these steps changed nothing"] * (len(skips) > 5)
        usual = self.usual.exceeded_by(mean_loss(records))
        if usual is not None:
            lines.append(f"the loss is {mean_loss(records):.4g} over the last {len(records)} steps; it was about {usual:.4g}. Training may have diverged: "
                         f"a lower lr, or train.max_grad_norm, may help; earlier checkpoints are whole.")
        return lines


def mean_loss(records: Sequence[tuple[int, Mapping[str, float]]]) -> float:
    """Mean loss of the steps that had one; NaN if none had."""
    losses = [values["loss"] for _, values in records if math.isfinite(values["loss"])]
    return sum(losses) / len(losses) if losses else math.nan


class Usual:
    """The median of the last intervals' mean losses, to notice one that has exploded and is still finite."""

    def __init__(self):
        self.means, self.high = deque(maxlen=50), False

    def exceeded_by(self, mean: float) -> float | None:
        """The usual loss, if this mean is more than ten times that, and more than a model costs that predicts nothing (1, for a target of unit variance)
        twice over; else None, and the mean counts as usual. Said once, until it has come down."""
        usual = statistics.median(self.means) if len(self.means) >= 5 else math.inf
        high, was = mean > max(2.0, 10 * usual), self.high
        self.high = high
        if not high and math.isfinite(mean):
            self.means.append(mean)
        return usual if high and not was else None


class Periodic(Hook):
    """Does one thing every `every` steps (None: never) and at the end, once a step; what was not done is tried again where the run ends with that step."""

    def __init__(self, every: int | None):
        self.every, self.last = every, None

    def on_step_end(self, trainer: Trainer) -> None:
        if self.every and trainer.state.step % self.every == 0:
            trainer.settle()
            if not trainer.lacking:  # else that step has not been
                self._once(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._once(trainer)

    def _once(self, trainer: Trainer) -> None:
        trainer.settle()
        if self.last != trainer.state.step:
            began = time.monotonic()
            if self.act(trainer):
                self.last = trainer.state.step
            trainer.beside += time.monotonic() - began

    def act(self, trainer: Trainer) -> bool:
        """The thing itself. Whether it is done, so that the end of the run need not do it again after the same step."""

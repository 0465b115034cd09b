"""The loop. It knows batches, a loss, gradients, an optimizer and hooks; it knows no model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import HCPError, NonFiniteError
from .optim import Gradients, set_lr
from .parallel import Parallel
from .signals import StopRequest


class Hook:
    """What happens beside the steps. `trainer.state.step` counts finished steps."""

    def on_epoch_begin(self, trainer: "Trainer", epoch: int) -> None:
        """Before the first step of an epoch (0-based), also when a resumed run starts inside one."""

    def on_step_end(self, trainer: "Trainer") -> None:
        """After each optimizer step."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step."""

    def on_stop(self, trainer: "Trainer") -> None:
        """After the step that a signal made the last one for now."""


class Feed(Protocol):
    """Where batches come from."""

    def batches(self, start: Sequence, rank: int, world: int, first_index: int, count: int) -> Iterable[tuple[Any, list, list]]:
        """(step, positions after it, this rank's micro-batches) for `count` optimizer steps."""


@dataclass
class TrainState:
    """Where a run stands, between two optimizer steps."""

    step: int = 0  # finished optimizer steps
    positions: list = field(default_factory=list)  # per dataset
    skipped: int = 0  # steps that changed nothing, in all
    skipped_in_row: int = 0


class LossScale:
    """Dynamic loss scale for fp16 (arXiv:1710.03740): halves on overflow, doubles after 2000 clean steps. 1 and inactive otherwise."""

    def __init__(self, active: bool):
        self.active, self.value, self.clean = active, 65536.0 if active else 1.0, 0

    def update(self, finite: bool) -> None:
        """Call after each step, with whether its gradients were finite."""
        if not self.active:
            return
        self.clean = self.clean + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.clean % 2000 == 0:
            self.value *= 2


@dataclass
class StepRecord:
    """What one step gave: scalars still on the device, so that nothing waits for them before the log interval."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    lrs: list[float]


class Trainer:
    """Runs optimizer steps from `state` until `total_steps`."""

    def __init__(self, *, feed: Feed, loss: Callable[[Any], Tensor], gradients: Gradients, optimizer: torch.optim.Optimizer, lr_factor: Callable[[int], float],
                 parallel: Parallel, hooks: Sequence[Hook], total_steps: int, max_grad_norm: float | None, max_nonfinite: int, fp16: bool):
        self.feed, self.loss, self.gradients, self.optimizer, self.lr_factor = feed, loss, gradients, optimizer, lr_factor
        self.parallel, self.hooks, self.total_steps = parallel, list(hooks), total_steps
        self.max_grad_norm, self.max_nonfinite = max_grad_norm, max_nonfinite
        self.loss_scale, self.state, self.records = LossScale(fp16), TrainState(), []

    def fit(self, stop: StopRequest) -> bool:
        """Trains to the end, or to the end of the step in which any process was asked to stop; whether it is the end. Hooks see every step."""
        state, epoch = self.state, None
        feed = self.feed.batches(state.positions, self.parallel.rank, self.parallel.world, state.step, self.total_steps - state.step)
        for _, after, micro in feed:
            if state.positions[0].epoch != epoch:
                epoch = state.positions[0].epoch
                self._tell("on_epoch_begin", epoch)
            stopped = self._step(micro, stop)
            state.step, state.positions = state.step + 1, after
            self._tell("on_step_end")
            if stopped and state.step < self.total_steps:
                self._tell("on_stop")
                return False
        self._tell("on_end")
        return True

    def _tell(self, event: str, *args) -> None:
        for hook in self.hooks:
            getattr(hook, event)(self, *args)

    def _step(self, micro: list, stop: StopRequest) -> bool:
        lrs = set_lr(self.optimizer, self.lr_factor(self.state.step))
        self.gradients.clear()
        for batch in micro:
            self.backward(batch)
        self.gradients.stop += float(stop.signal != 0)
        self.parallel.sum_(self.gradients.flat)
        if self.loss_scale.active:
            self.gradients.values.div_(self.loss_scale.value)
        loss = self.gradients.loss.clone()
        norm = self.gradients.clip(self.max_grad_norm)
        finite = bool(torch.isfinite(norm + loss))
        if finite:
            self.optimizer.step()
        self._count(finite)
        self.records.append(StepRecord(self.state.step + 1, loss, norm, lrs))
        return bool(self.gradients.stop)

    def backward(self, batch) -> None:
        """Adds one micro-batch's gradients and loss to the buffer."""
        try:
            loss = self.loss(batch)
            (loss * self.loss_scale.value).backward()
        except torch.OutOfMemoryError as error:
            raise HCPError(out_of_memory(batch)) from error
        self.gradients.loss += loss.detach()

    def _count(self, finite: bool) -> None:
        scaling = self.loss_scale.active and self.loss_scale.value > 1
        self.loss_scale.update(finite)
        state = self.state
        if finite:
            state.skipped_in_row = 0
            return
        state.skipped += 1
        if scaling:  # fp16 looking for its scale is no fault
            return
        state.skipped_in_row += 1
        if state.skipped_in_row >= self.max_nonfinite:
            raise NonFiniteError(f"loss or gradient was not finite for {state.skipped_in_row} steps in a row (step {state.step + 1}); those steps changed nothing. "
                                 f"Lower the lr, or set mixed_precision: fp32; the checkpoints in ckpts/ are from before.")

    def take_records(self) -> list[tuple[int, dict[str, float]]]:
        """(step, values) of the steps since the last call; the one place where scalars are fetched from the device."""
        records, self.records = self.records, []
        if not records:
            return []
        fetched = torch.stack([torch.stack((r.loss, r.grad_norm)) for r in records]).tolist()
        names = [group["name"] for group in self.optimizer.param_groups]
        return [(r.step, {"loss": loss, "grad_norm": norm, **{f"lr/{name}": lr for name, lr in zip(names, r.lrs)}})
                for r, (loss, norm) in zip(records, fetched)]


def out_of_memory(batch) -> str:
    """What to say when a micro-batch does not fit."""
    height, width = batch.target_size[0].tolist()
    return (f"out of memory in a training step of {len(batch.prompts)} images of {width}x{height}. Lower data.<dataset>.batch_size (and raise "
            f"train.gradient_accumulation_steps to keep the global batch), set model.gradient_checkpointing: true, or lower bucket.target_area.")

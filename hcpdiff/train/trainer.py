"""The loop. It knows batches, a loss, gradients, an optimizer and hooks; it knows no model."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ..adapters.shadow import Shadow
from ..errors import FeedError, HCPError, NonFiniteError, PeerError
from .optim import Gradients, set_lr
from .parallel import Parallel
from .signals import StopRequest
from .undo import Undo
from .watch import LAGGING, LossScale, Names, Seen, Skip, Watch, explain


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

    def on_nonfinite(self, trainer: "Trainer") -> None:
        """Before the run ends because too many steps in a row were not finite."""

    def on_fault(self, trainer: "Trainer") -> None:
        """Before the run ends because a process cannot make its next batch, if it has finished a step since it started. No collectives."""


class Feed(Protocol):
    """Where batches come from."""

    def batches(self, start: Sequence, rank: int, world: int, first_index: int, count: int) -> Generator[tuple[Any, list, list], None, None]:
        """(step, positions after it, this rank's micro-batches) for `count` optimizer steps; closed, it stops what makes them."""

    def names(self, step: Any, world: int) -> Names:
        """(id, weight) of each sample of a step, by process and micro-batch. Asked for only when a step went wrong."""


@dataclass
class TrainState:
    """Where a run stands, between two optimizer steps. The counters are exact after `Trainer.settle`."""

    step: int = 0  # finished optimizer steps
    positions: list = field(default_factory=list)  # per dataset
    skipped: int = 0  # steps that changed nothing since loss or gradient was not finite, in all
    skipped_in_row: int = 0
    scale_skips: int = 0  # those that only looked for fp16's loss scale


@dataclass(frozen=True)
class Pending:
    """A step whose numbers the host has not seen yet."""

    number: int
    step: Any  # of the feed
    lrs: list[float]
    scale: float
    positions: list  # before it


class Trainer:
    """Runs optimizer steps from `state` until `total_steps`.

    loss: batch -> the samples' weighted losses (B,), or their sum. `lag`: whether the host learns a step's numbers only after the next one's backward
    pass has been asked for (None: where the device works ahead of the host), so that it never waits for a device that has nothing else to do. shadow: copies
    of the weights that stand in for them in the forward and backward passes of a step, which end before the optimizer changes anything. less_memory: what to
    try where a micro-batch does not fit.
    """

    def __init__(self, *, feed: Feed, loss: Callable[[Any], Tensor], gradients: Gradients, optimizer: torch.optim.Optimizer, lr_factor: Callable[[int], float],
                 parallel: Parallel, hooks: Sequence[Hook], total_steps: int, max_grad_norm: float | None, max_nonfinite: int, fp16: bool, lag: bool | None = None,
                 shadow: Shadow | None = None, less_memory: str = ""):
        self.feed, self.loss, self.gradients, self.optimizer, self.lr_factor = feed, loss, gradients, optimizer, lr_factor
        self.parallel, self.hooks, self.total_steps, self.shadow, self.less_memory = parallel, list(hooks), total_steps, shadow, less_memory
        self.max_grad_norm, self.max_nonfinite = max_grad_norm, max_nonfinite
        device = gradients.flat.device
        self.lag = device.type in LAGGING if lag is None else lag
        self.loss_scale, self.state = LossScale(fp16, device), TrainState()
        self.watch, self.undo = Watch(gradients, self.loss_scale, parallel.rank), Undo(optimizer, gradients.parameters)
        self.pending: Pending | None = None
        self.stopping, self.hopeless, self.last_skip = False, False, None
        self.first, self.fault, self.lacking = 0, None, False  # step at the start; why this process has no batch; whether any has none
        self.records: list[tuple[int, dict[str, float]]] = []  # of rank 0 only, as are the skips
        self.skips: list[Skip] = []
        self.crowded: list[list[int]] = []  # of steps in which there were any: processes without room for the text encoders
        self.beside = 0.0  # seconds that hooks took for saves and previews: no step's time

    def fit(self, stop: StopRequest) -> bool:
        """Trains to the end, or to the end of the step in which any process was asked to stop (the next one with `lag`); whether it is the end.

        A signal in the first step of a run of one process raises Interrupted, for there is nothing to keep yet. FeedError, in every process: one of them cannot make a batch.
        """
        self.first = self.state.step
        feed = self.feed.batches(self.state.positions, self.parallel.rank, self.parallel.world, self.state.step, self.total_steps - self.state.step)
        with ExitStack() as patience:
            if self.parallel.world > 1:  # all end after the same step, also if it is the first
                patience.enter_context(stop.patiently())
            with closing(feed):  # now, and not when an error that holds it is forgotten
                if not self._steps(self._made(feed), stop, patience):
                    return False
            self._learn()
            self._tell("on_end")
        return True

    def _made(self, feed: Iterable[tuple[Any, list, list]]) -> Iterator[tuple[Any, list, list]]:
        """What the feed gives. Where it fails, steps without a batch come instead of those that are left: the other processes are met in them as ever, and learn of it."""
        try:
            yield from feed
        except Exception as error:  # the feed's: what a step raises does not come by here
            self.fault = error.with_traceback(None) if isinstance(error, HCPError) else error  # which would hold this frame, and so the trainer
        if self.fault:
            for _ in range(self.total_steps - self.state.step):
                yield None, self.state.positions, []

    def _end_without_batch(self) -> NoReturn:
        """All processes are here, at the last step that they have finished. They end with the same error; one that is no user's mistake is for its own process
        to show."""
        unsaved, ours = [], self.fault is not None and not isinstance(self.fault, HCPError)
        lost = self.fault.faults if self.fault and not ours else []
        if self.state.step > self.first:
            try:
                self._tell("on_fault")
            except HCPError as error:
                unsaved = [error.with_traceback(None)]
            except torch.OutOfMemoryError:
                unsaved = [HCPError(f"step {self.state.step} could not be saved: out of memory. {self.less_memory}".rstrip())]
            except Exception as error:
                lost = distinct(faults for faults, *_ in self.parallel.gather((lost, [], True)))
                if self.fault or lost:
                    raise error from self.fault or FeedError(lost)
                raise
        told = self.parallel.gather((lost, unsaved, ours))  # also waits for the save
        lost, unsaved = distinct(faults for faults, *_ in told), [error for _, errors, _ in told for error in errors]
        if ours:
            for error in unsaved:
                self.fault.add_note(str(error))
            raise self.fault
        if any(theirs for *_, theirs in told):
            raise PeerError("another process of this run could not make a batch, or keep the steps before it; what it said stands above.")
        kind = type(unsaved[0]) if unsaved else FeedError  # and so its exit code
        raise kind(lost + [fault for error in unsaved for fault in error.faults]) from self.fault

    def _steps(self, feed: Iterable[tuple[Any, list, list]], stop: StopRequest, patience: ExitStack) -> bool:
        """Whether none of them was the last by a wish. From the first one's end on there is something to keep, and `patience` is entered."""
        state, epoch, patient = self.state, None, False
        for step, after, micro in feed:
            if state.positions[0].epoch != epoch:
                epoch = state.positions[0].epoch
                self._tell("on_epoch_begin", epoch)
            self._step(step, micro, stop)
            stopped = self.stopping  # before a hook looks ahead of the other ranks
            state.step, state.positions = state.step + 1, after
            if not patient:
                patient = True
                patience.enter_context(stop.patiently())
            self._tell("on_step_end")
            if stopped and state.step < self.total_steps:
                self._learn()
                self._tell("on_stop")
                return False
        return True

    def _tell(self, event: str, *args) -> None:
        for hook in self.hooks:
            getattr(hook, event)(self, *args)

    def _step(self, step: Any, micro: list, stop: StopRequest) -> None:
        self.gradients.clear()
        with self.shadow.fresh() if self.shadow else nullcontext():
            for index, batch in enumerate(micro):
                self.backward(batch, index)
        self.gradients.stop += float(stop.signal != 0)
        if self.fault:
            self.gradients.lacking += 1.0
        self.parallel.sum_(self.gradients.flat)
        self.loss_scale.unscale(self.gradients.values)
        norm = self.gradients.clip(self.max_grad_norm)
        self._learn()  # of the step before; the optimizer's host side is right again before it is used
        scale = self.loss_scale.value
        bad = self.watch.report(norm)
        lrs = set_lr(self.optimizer, self.lr_factor(self.state.step))
        self.pending = Pending(self.state.step + 1, step, lrs, scale, self.state.positions)
        if self.lag:
            self._update_unseen(bad)
        elif not self._learn().bad:
            self.optimizer.step()

    def _update_unseen(self, bad: Tensor) -> None:
        """An update that the device takes back itself if the flag is set."""
        self.undo.remember()
        self.optimizer.step()
        if not self.undo.take_back(bad):  # the first update: state has only now been made
            self._learn(everything=True)

    def backward(self, batch, index: int = 0) -> None:
        """Adds one micro-batch's gradients and loss to the buffer."""
        try:
            losses = self.loss(batch)
            loss = losses.sum()
            self.loss_scale.scaled(loss).backward()
        except torch.OutOfMemoryError as error:
            raise HCPError(f"out of memory in a training step of {size_of(batch)}. {self.less_memory}") from error
        self.gradients.loss += loss.detach()
        self.watch.note(index, losses)

    def settle(self, everything: bool = False) -> Seen | None:
        """Waits for the last step's numbers: then counters, records, optimizer and weights are exact. Any rank may call it at any time between steps.
        A step for which a process had no batch has not been."""
        if self.pending is None:
            return None
        pending, self.pending = self.pending, None
        seen = self.watch.read()
        if seen.bad and self.lag:
            self.undo.put_back(everything)
        self.stopping |= seen.stop
        self.loss_scale.value, self.loss_scale.clean = seen.scale
        if seen.crowded and self.parallel.rank == 0:
            self.crowded.append(seen.crowded)
        if seen.lacking:
            self.lacking, self.state.step, self.state.positions = True, pending.number - 1, pending.positions
            return seen
        self._count(pending, seen)
        if self.parallel.rank == 0:
            names = [group["name"] for group in self.optimizer.param_groups]
            values = {"loss": seen.loss, "grad_norm": seen.grad_norm, **{f"lr/{name}": lr for name, lr in zip(names, pending.lrs)}}
            self.records.append((pending.number, values | ({"loss_scale": pending.scale} if self.loss_scale.active else {})))
        return seen

    def _learn(self, everything: bool = False) -> Seen | None:
        """As settle, at a place where all ranks are together: here a run may end."""
        seen = self.settle(everything)
        if self.lacking:
            self._end_without_batch()
        if self.hopeless:
            self._tell("on_nonfinite")
            raise NonFiniteError(f"loss or gradient was not finite for {self.state.skipped_in_row} steps in a row. Those steps changed nothing; the last: {self.last_skip}. Lower the "
                                 f"lr, or set mixed_precision: fp32 where it is not; if it is always the same few images, look at them. The last step that changed something was "
                                 f"{self.state.step - self.state.skipped_in_row}; checkpoints and states are from before or of it.")
        return seen

    def _count(self, pending: Pending, seen: Seen) -> None:
        state = self.state
        if not seen.bad:
            state.skipped_in_row = 0
        elif pending.scale > 1 and math.isfinite(seen.loss):  # fp16 looking for its scale is no fault
            state.scale_skips += 1
        else:
            state.skipped += 1
            state.skipped_in_row += 1
            self.hopeless = state.skipped_in_row >= self.max_nonfinite
            self.last_skip = explain(pending.number, seen, self.feed.names(pending.step, self.parallel.world))
            if self.parallel.rank == 0:
                self.skips.append(self.last_skip)

    @property
    def known(self) -> int:
        """The last step whose numbers the host has seen."""
        return self.state.step if self.pending is None else self.pending.number - 1

    def take_records(self, until: int | None = None) -> list[tuple[int, dict[str, float]]]:
        """(step, values) of the steps since the last call, up to the last one, whose numbers are waited for; with `until` up to that one, of what is known."""
        if until is None:
            self.settle()
        taken = [record for record in self.records if until is None or record[0] <= until]
        self.records = self.records[len(taken) :]
        return taken

    def take_skips(self) -> list[Skip]:
        """The steps since the last call that changed nothing."""
        skips, self.skips = self.skips, []
        return skips

    def take_crowded(self) -> list[list[int]]:
        """Of the steps since the last call: the processes whose device had no room for the text encoders."""
        crowded, self.crowded = self.crowded, []
        return crowded


def distinct(lists: Iterable[Iterable[str]]) -> list[str]:
    """What stands in any of the lists, each once."""
    return list(dict.fromkeys(item for items in lists for item in items))


def size_of(batch) -> str:
    """A micro-batch's number and size of images, in words."""
    (height, width), count = batch.target_size[0].tolist(), len(batch.prompts)
    return f"{count} image{'s' if count > 1 else ''} of {width}x{height}"

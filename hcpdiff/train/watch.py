"""A step's numbers: gathered on the device, known to the host at once on a CPU and one step later beside a GPU, so that neither waits for the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .optim import Gradients

LAGGING = ("cuda", "xpu")  # devices that work ahead of the host; on mps a copy that does not wait cannot be trusted


class LossScale:
    """Dynamic loss scale for fp16 (arXiv:1710.03740): halves on overflow, doubles after 2000 clean steps. 1 and inactive otherwise.

    `pair` (scale, clean steps) lives on the device, since the next step needs it before the host has seen this one; `value` and `clean` are what the
    host knows of it.
    """

    def __init__(self, active: bool, device: torch.device):
        self.active = active
        self.pair = torch.empty(2, device=device)
        self.load(65536.0 if active else 1.0, 0)

    def load(self, value: float, clean: int) -> None:
        """Goes on from a saved state."""
        self.value, self.clean = value, clean
        self.pair.copy_(torch.tensor([float(value), float(clean)]))

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss * self.pair[0] if self.active else loss

    def unscale(self, values: Tensor) -> None:
        """Gradients of the true loss, in place."""
        if self.active:
            values.div_(self.pair[0])

    def update(self, overflow: Tensor, bad: Tensor) -> None:
        """After a step (bool scalars). A loss that is not finite is no overflow: the scale had no part in it, and stays; nor is a step that has not been."""
        if not self.active:
            return
        scale, clean = self.pair
        clean = torch.where(overflow, 0.0, torch.where(bad, clean, clean + 1))
        grown = torch.where(bad | (clean % 2000 != 0), scale, scale * 2)
        torch.stack((torch.where(overflow, (scale / 2).clamp(min=1.0), grown), clean), out=self.pair)


@dataclass(frozen=True)
class Seen:
    """One step's numbers on the host. `lacking`: a process had no batch, so that there was no step. `crowded`: processes whose device had no room for the text
    encoders. `parts`: per process and micro-batch, whether its gradient was the first not finite (there), and its samples' weighted losses."""

    loss: float
    grad_norm: float
    bad: bool
    stop: bool
    lacking: bool
    scale: tuple[float, int]
    crowded: list[int]
    parts: list[list[list[float]]]


class Watch:
    """Takes a step's numbers off the device. `report` and then, whenever one likes, `read`; one report at a time."""

    def __init__(self, gradients: Gradients, scale: LossScale, rank: int):
        self.gradients, self.scale = gradients, scale
        self.slots = gradients.slots[rank] if rank < len(gradients.slots) else gradients.slots[:0]
        self.each = gradients.slots.shape[:2].numel() > 1  # else the step's gradient is the micro-batch's
        self.buffer, self.event = self._meeting_place()

    def _meeting_place(self) -> tuple[Tensor | None, torch.Event | None]:
        """Page-locked memory, to which a device can copy while the host goes on, and the mark that the copy is done."""
        device = self.gradients.flat.device
        if device.type not in LAGGING:
            return None, None
        return torch.empty(len(self.gradients.tail) + 4, pin_memory=True), torch.Event(device)

    def note(self, index: int, losses: Tensor) -> None:
        """After the backward pass of this process's micro-batch `index`: its samples' weighted losses (any shape)."""
        if index >= len(self.slots):
            return
        slot, losses = self.slots[index], losses.detach().flatten()[: self.slots.shape[1] - 1]
        slot[1 : 1 + len(losses)] = losses
        if self.each:
            slot[0] = 1.0 - torch.isfinite(torch.linalg.vector_norm(self.gradients.values)).float()

    def report(self, norm: Tensor) -> Tensor:
        """After the sum over processes and the norm: sends the numbers on their way, moves the loss scale, and returns the flag: True if the step must
        change nothing (a bool scalar on the device, the same on every rank)."""
        finite_loss, finite = torch.isfinite(self.gradients.loss), torch.isfinite(norm)
        lacking = self.gradients.lacking > 0
        bad = ~(finite & finite_loss) | lacking
        self.scale.update(~finite & finite_loss & ~lacking, bad)
        numbers = torch.cat((self.gradients.tail, norm[None], bad[None].float(), self.scale.pair))
        if self.event is None:
            self.buffer = numbers
        else:
            self.buffer.copy_(numbers, non_blocking=True)
            self.event.record()
        return bad

    def read(self) -> Seen:
        """The reported numbers; waits until the device has come to them."""
        if self.event is not None:
            self.event.synchronize()
        numbers = self.buffer.cpu().numpy()
        loss, stop, lacking, norm, bad, value, clean = numbers[-7:].tolist()
        slots = self.gradients.slots
        crowded = [rank for rank, number in enumerate(numbers[slots.numel() : -7].tolist()) if number]
        return Seen(loss, norm, bad != 0, stop != 0, lacking != 0, (value, int(clean)), crowded, numbers[: slots.numel()].reshape(slots.shape).tolist())


@dataclass(frozen=True)
class Skip:
    """A step that changed nothing although no loss scale was to blame, and what is known of why."""

    step: int
    loss: float
    grad_norm: float
    culprits: list[str]  # ids of the samples whose loss is not finite, else of the micro-batch whose gradient is not
    by_loss: bool
    where: str

    def __str__(self) -> str:
        if self.by_loss:
            return f"step {self.step} changed nothing: the loss is not finite for {listed(self.culprits)}{self.where}"
        what = "the gradient is not finite, the loss is" if math.isfinite(self.loss) else "the loss is not finite"
        among = f"; in the batch: {listed(self.culprits)}{self.where}" if self.culprits else ""
        return f"step {self.step} changed nothing: {what} ({self.loss:.4g}){among}"


Names = Sequence[Sequence[Sequence[tuple[str, float]]]]  # per process and micro-batch: (id, weight) of each sample


def explain(step: int, seen: Seen, names: Names) -> Skip:
    """Which samples made a step's numbers not finite."""
    samples = [(rank, number, name, part / weight if weight else part) for rank, micros in enumerate(names) for number, micro in enumerate(micros)
               for (name, weight), part in zip(micro, _losses(seen, rank, number))]
    lost = [sample for sample in samples if not math.isfinite(sample[3])]
    if lost:
        return Skip(step, seen.loss, seen.grad_norm, [f"{name} ({loss})" for _, _, name, loss in lost], True, _where(names, {sample[:2] for sample in lost}))
    first = {(rank, next(n for n, micro in enumerate(micros) if micro[0])) for rank, micros in enumerate(seen.parts) if any(micro[0] for micro in micros)}
    first = first or {(rank, number) for rank, number, _, _ in samples}
    return Skip(step, seen.loss, seen.grad_norm, [f"{name} ({loss:.4g})" for rank, number, name, loss in samples if (rank, number) in first], False,
                _where(names, first))


def _losses(seen: Seen, rank: int, number: int) -> list[float]:
    return seen.parts[rank][number][1:] if rank < len(seen.parts) and number < len(seen.parts[rank]) else []


def _where(names: Names, places: set[tuple[int, int]]) -> str:
    """Which micro-batch of which process, where there are several."""
    several_ranks, several = len(names) > 1, max(len(micros) for micros in names) > 1 if names else False
    said = [", ".join([f"micro-batch {number + 1}"] * several + [f"process {rank}"] * several_ranks) for rank, number in sorted(places)]
    return f" ({'; '.join(said)})" if any(said) else ""


def listed(items: Sequence[str], most: int = 8) -> str:
    """a, b, c and 4 more."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")

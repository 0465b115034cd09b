"""Optimizer, learning-rate schedule, and the flat gradient buffer between backward pass and optimizer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..trainables.lora import ParamGroup

FUSED = tuple(f"torch.optim.{place}{name}" for name in ("Adam", "AdamW") for place in ("", f"{name.lower()}."))


def lr_factor(config, total: int) -> Callable[[int], float]:
    """Factor on every group's lr as a function of the optimizer step (0 is the first).

    Warmup rises to 1 at its last step; decay ends just above `min_lr_ratio` at the last one, so that no step is wasted on a rate of zero.
    """
    total = config.num_training_steps or total
    warmup = config.num_warmup_steps
    warmup = round(warmup * total) if isinstance(warmup, float) and warmup < 1 else int(warmup)
    if config.name == "constant":
        return lambda step: 1.0
    if config.name == "one_cycle":
        return _one_cycle(total, warmup or max(1, round(0.3 * total)), config.min_lr_ratio)
    shape = _shapes(config)[config.name]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step + 1 - warmup) / max(1, total + 1 - warmup))
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape(progress)

    return factor


def _shapes(config) -> dict[str, Callable[[float], float]]:
    return {
        "constant_with_warmup": lambda p: 1.0,
        "linear": lambda p: 1 - p,
        "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
        "cosine_with_restarts": lambda p: 0.0 if p >= 1 else 0.5 * (1 + math.cos(math.pi * ((config.num_cycles * p) % 1.0))),
        "polynomial": lambda p: (1 - p) ** config.power,
    }


def _one_cycle(total: int, rise: int, floor: float) -> Callable[[int], float]:
    """1/25 up to 1 in `rise` steps, down to `floor`, both along a cosine (arXiv:1708.07120; torch's OneCycleLR)."""

    def factor(step: int) -> float:
        if step < rise:
            start, end, p = 1 / 25, 1.0, step / max(1, rise - 1)
        else:
            start, end, p = 1.0, floor, min(1.0, (step - rise + 1) / max(1, total - rise))
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * p))

    return factor


def simulated_factor(make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], total: int) -> Callable[[int], float]:
    """The factor that a torch scheduler gives at each step of a run, found by stepping it on a rate of 1; so a resumed run needs no state of it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    schedule, factors = make(optimizer), []
    for _ in range(total):
        factors.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return lambda step: factors[min(step, total - 1)]


class Gradients:
    """Every gradient as a view of one flat fp32 buffer, so that reduction, norm, clipping and clearing are one operation each.

    Behind them, summed over the processes with them: `slots` (processes, micro-batches, 1 + samples), in which each process notes what Watch wants to know of
    its micro-batches and leaves the others' zero; `crowded`, of each process whether its device had no room for the text encoders in the step; the step's loss;
    the wish of any process to stop; and how many have no batch for the step.
    """

    def __init__(self, groups: Sequence[ParamGroup], device: torch.device, processes: int = 1, micro: int = 1, samples: int = 1):
        self.parameters = [p for group in groups for p in group.parameters]
        count, shape = sum(p.numel() for p in self.parameters), (processes, micro, 1 + samples)
        self.flat = torch.zeros(count + math.prod(shape) + processes + 3, dtype=torch.float32, device=device)
        self.values, self.tail = self.flat[:count], self.flat[count:]
        self.slots, self.crowded = self.tail[: math.prod(shape)].view(shape), self.tail[math.prod(shape) : -3]
        self.loss, self.stop, self.lacking = self.flat[-3], self.flat[-2], self.flat[-1]
        self.attach()

    def attach(self) -> None:
        """Makes each parameter's `.grad` a view of the buffer; backward passes then add into it."""
        start = 0
        for parameter in self.parameters:
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def clear(self) -> None:
        """Zero, without letting the views go."""
        self.flat.zero_()

    def clip(self, max_norm: float | None) -> Tensor:
        """The total norm (a scalar tensor); scales the gradients down to `max_norm` where it is higher."""
        norm = torch.linalg.vector_norm(self.values)
        if max_norm is not None:
            self.values.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_
        return norm


def optimizer_groups(groups: Sequence[ParamGroup], scale: float) -> list[dict]:
    """Param groups for a torch optimizer; `initial_lr` is what the schedule multiplies."""
    return [{"params": list(g.parameters), "lr": g.lr * scale, "initial_lr": g.lr * scale, "name": g.name} for g in groups]


def with_fused(spec: Mapping, device: torch.device) -> dict:
    """An optimizer's spec, with torch's fused kernel where it is Adam's and the spec does not choose itself: one call for all tensors, on a CPU a quarter of the
    time of a loop over them."""
    chosen = {"fused", "foreach", "differentiable", "_args_"} & spec.keys()
    takes = spec["_target_"] in FUSED and device.type in ("cpu", "cuda", "xpu") and not chosen
    return {**spec, "fused": True} if takes else dict(spec)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> list[float]:
    """Writes initial_lr * factor into every group and returns the rates."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return [group["lr"] for group in optimizer.param_groups]


@contextmanager
def weights_for_use(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Schedule-free optimizers (arXiv:2405.15682) train on other weights than those to be used; inside, parameters are the latter."""
    swaps = callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
    if swaps:
        optimizer.eval()
    try:
        yield
    finally:
        if swaps:
            optimizer.train()

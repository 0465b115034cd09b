"""Half-precision copies of all LoRA factors, made once per optimizer step in the place of two casts per layer and call."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .lora import Factors, Lora

_ALIGN = 64  # elements: each factor begins where the matrix units can read it


class Shadow:
    """The factors of `loras` in one flat fp32 buffer, of which the parameters become views, and a half-precision copy of it in which up holds the scale.

    The copy is true inside `fresh` only, where nothing changes a factor: between the beginning of a step and its optimizer. Everywhere else (previews,
    saves, an update taken back, the other weights of a schedule-free optimizer) a LoRA casts its factors itself, so nobody can meet an old copy.
    """

    def __init__(self, loras: Sequence[Lora], dtype: torch.dtype):
        """Takes the parameters where they lie; they stay the same objects."""
        ups = sorted(loras, key=lambda lora: lora.scale)
        parameters = [lora.down for lora in loras] + [lora.up for lora in ups]
        starts = _starts(parameters)
        self.full = torch.zeros(starts[-1], dtype=torch.float32, device=parameters[0].device)
        self.half = torch.zeros_like(self.full, dtype=dtype)
        self.dtype, self.true = dtype, False
        self.scaled = [(start, end, scale) for (start, end), scale in _runs(starts[len(loras) :], [lora.scale for lora in ups])]
        self.plain = starts[len(loras)]  # where the ups begin
        views = {parameter: self.half[start : start + parameter.numel()].view(parameter.shape) for parameter, start in zip(parameters, starts)}
        self.places = [(parameter, self.full[start : start + parameter.numel()].view(parameter.shape)) for parameter, start in zip(parameters, starts)]
        for parameter, place in self.places:
            parameter.data = place.copy_(parameter.detach())
        self.views: dict[Lora, Factors] = {lora: (views[lora.down], views[lora.up]) for lora in loras}
        for lora in loras:
            lora.shadow = self

    def factors(self, lora: Lora, dtype: torch.dtype) -> Factors | None:
        """(down, scale x up) of a LoRA in `dtype`, where the copy is of it and true."""
        return self.views[lora] if self.true and dtype == self.dtype else None

    def _gather(self) -> None:
        """Copies into the buffer what lies elsewhere by now (`parameter.data = ...`, as some optimizers do). It stays there: its owner may go on writing to it."""
        for parameter, place in self.places:
            if parameter.data_ptr() != place.data_ptr():
                place.copy_(parameter.detach())

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Copies the factors; inside, LoRAs multiply with the copies."""
        with torch.no_grad():
            self._gather()
            self.half[: self.plain].copy_(self.full[: self.plain])
            for start, end, scale in self.scaled:
                self.half[start:end].copy_(self.full[start:end] if scale == 1 else self.full[start:end] * scale)
        self.true = True
        try:
            yield
        finally:
            self.true = False


def _starts(parameters: Sequence[nn.Parameter]) -> list[int]:
    """Where each parameter begins, and where the last one ends."""
    starts = [0]
    for parameter in parameters:
        starts.append(starts[-1] + -(-parameter.numel() // _ALIGN) * _ALIGN)
    return starts


def _runs(starts: Sequence[int], scales: Sequence[float]) -> list[tuple[tuple[int, int], float]]:
    """Neighbours of one scale as one stretch."""
    runs: list[tuple[tuple[int, int], float]] = []
    for start, end, scale in zip(starts, starts[1:], scales):
        if runs and runs[-1][1] == scale:
            runs[-1] = ((runs[-1][0][0], end), scale)
        else:
            runs.append(((start, end), scale))
    return runs

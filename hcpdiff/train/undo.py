"""An optimizer's update, taken back by a flag that only the device knows.

The device's tensors (parameters, and optimizer state beside them) are chosen there: old where the flag is set, new where not. What an optimizer keeps
on the host (its groups' numbers, counters in Python or in CPU tensors) cannot follow a flag that the host has not seen: it is put back when the host
has, before the next update reads it. No optimizer has to know of it; what it keeps outside `state` and `param_groups` is not seen (nor saved).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 24  # elements compared at a time: bounds what the choice needs beside the copy


class Undo:
    """`remember`, the update, `take_back(flag)`; later `put_back` if the flag turned out to be set."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], on_host: Callable[[Tensor], bool] | None = None):
        device = parameters[0].device
        self.optimizer, self.parameters = optimizer, list(parameters)
        self.on_host = on_host or (lambda tensor: tensor.device != device)
        self.layout = _Layout([], [], [])
        self.boxes: list[tuple[Any, Any]] = []
        self.old: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Copies everything that an update may change; the last copy is let go."""
        self.old.clear()
        boxes = self._boxes()
        self.layout = self._look(boxes)
        self.boxes = [(box, box.copy()) for box in boxes]
        self.counters = [counter.clone() for counter in self.layout.counters]
        self.old = self.layout.copies()

    @torch.no_grad()
    def take_back(self, flag: Tensor) -> bool:
        """Where `flag` (a bool scalar on the device) is set, tensors are as remembered, bit for bit. False, and nothing is done, if the update has made
        or dropped tensors, as an optimizer's first one does: then the flag has to be looked at."""
        now = self._look(self._boxes())
        if now.places != self.layout.places:
            return False
        now.choose(flag, self.old)
        self.old.clear()  # the next forward pass may use their memory
        return True

    @torch.no_grad()
    def put_back(self, everything: bool = False) -> None:
        """The host's part as remembered; `everything`: the device's too, also where the update has changed which tensors there are."""
        for box, copy in self.boxes:
            if isinstance(box, list):
                box[:] = copy
            else:
                box.clear()
                box.update(copy)
        for counter, copy in zip(self.layout.counters, self.counters):
            counter.copy_(copy)
        if everything:
            self.layout.restore(self.old)

    def _boxes(self) -> list[Any]:
        """Every dict and list in which the optimizer keeps something."""
        boxes = _containers(self.optimizer.state)
        for group in self.optimizer.param_groups:
            boxes.append(group)
            for key, value in group.items():
                if key != "params" and isinstance(value, (dict, list)):
                    boxes += _containers(value)
        return boxes

    def _look(self, boxes: list[Any]) -> "_Layout":
        """The tensors in these; the layout that is known, if they are the same ones: to look through a thousand of them takes milliseconds."""
        found = [(box, key, leaf) for box in boxes for key, leaf in (box.items() if isinstance(box, dict) else enumerate(box)) if isinstance(leaf, Tensor)]
        marks = [(id(tensor), tensor.data_ptr()) for tensor in (*self.parameters, *(leaf for _, _, leaf in found))]
        if marks == self.layout.marks:  # the layout holds them, so nothing else can have their ids
            return self.layout
        device = [(box, key, leaf) for box, key, leaf in found if not self.on_host(leaf)]
        places = [(id(box), key, leaf.shape, leaf.dtype) for box, key, leaf in device]
        layout = _Layout([*self.parameters, *(leaf for _, _, leaf in device)], [leaf for _, _, leaf in found if self.on_host(leaf)], places)
        layout.marks = marks
        return layout


class _Layout:
    """Tensors that an update may change, as flat views, those of one dtype and device together in chunks: a thousand small tensors are a few calls."""

    def __init__(self, tensors: Sequence[Tensor], counters: Sequence[Tensor], places: list[tuple]):
        self.tensors, self.counters, self.places, self.marks = list(tensors), list(counters), places, None
        self.chunks = list(_chunks([tensor.detach().view(-1) for tensor in tensors if tensor.is_contiguous()]))
        self.chunks += [[tensor.detach()] for tensor in tensors if not tensor.is_contiguous()]

    def copies(self) -> list[Tensor]:
        """A copy of each chunk."""
        return [chunk[0].clone() if len(chunk) == 1 else torch.cat(chunk) for chunk in self.chunks]

    def choose(self, flag: Tensor, old: Sequence[Tensor]) -> None:
        """In place: the old values where the flag is set."""
        for chunk, before in zip(self.chunks, old, strict=True):
            if len(chunk) == 1:
                torch.where(flag, before, chunk[0], out=chunk[0])
            else:
                new = torch.cat(chunk)
                _spread(torch.where(flag, before, new, out=new), chunk)

    def restore(self, old: Sequence[Tensor]) -> None:
        """In place: the old values."""
        for chunk, before in zip(self.chunks, old, strict=True):
            _spread(before, chunk) if len(chunk) > 1 else chunk[0].copy_(before)


def _spread(flat: Tensor, chunk: list[Tensor]) -> None:
    torch._foreach_copy_(chunk, flat.split([len(tensor) for tensor in chunk]))


def _containers(tree: Any) -> list[Any]:
    """A tree's dicts and lists, the tree first."""
    found = [tree]
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, (dict, list)):
            found += _containers(value)
    return found


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device together, so many that they make about a chunk."""
    kinds: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        chunk, size = [], 0
        for tensor in same:
            chunk.append(tensor)
            size += tensor.numel()
            if size >= _CHUNK:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

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
        self.boxes: list[tuple[Any, Any]] = []
        self.counters: list[tuple[Tensor, Tensor]] = []
        self.chunks: list[tuple[list[Tensor], Tensor]] = []
        self.places: list[tuple] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Copies everything that an update may change; the last copy is let go."""
        self.chunks.clear()
        tensors, self.places = self._on_device()
        self.boxes = [(box, box.copy()) for box in self._containers()]
        self.counters = [(leaf, leaf.clone()) for _, _, leaf in self._leaves() if isinstance(leaf, Tensor) and self.on_host(leaf)]
        self.chunks = [(part, _flat(part)) for part in _parts(tensors)]

    @torch.no_grad()
    def take_back(self, flag: Tensor) -> bool:
        """Where `flag` (a bool scalar on the device) is set, tensors are as remembered, bit for bit. False, and nothing is done, if the update has made
        or dropped tensors, as an optimizer's first one does: then the flag has to be looked at."""
        tensors, places = self._on_device()
        if places != self.places:
            return False
        for part, (_, old) in zip(_parts(tensors), self.chunks, strict=True):
            new = _flat(part)
            torch._foreach_copy_([t.detach() for t in part], _split(torch.where(flag, old, new, out=new), part))
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
        for counter, copy in self.counters:
            counter.copy_(copy)
        for part, old in self.chunks if everything else ():
            torch._foreach_copy_([t.detach() for t in part], _split(old, part))

    def _on_device(self) -> tuple[list[Tensor], list[tuple]]:
        """(tensors on the device, what tells whether they are the same ones in the same places)."""
        found = [(id(box), key, leaf) for box, key, leaf in self._leaves() if isinstance(leaf, Tensor) and not self.on_host(leaf)]
        places = [(box, key, leaf.shape, leaf.dtype) for box, key, leaf in found]
        return [*self.parameters, *(leaf for _, _, leaf in found)], places

    def _containers(self) -> Iterator[Any]:
        yield from _containers(self.optimizer.state)
        for group in self.optimizer.param_groups:
            yield group
            for key, value in group.items():
                if key != "params" and isinstance(value, (dict, list)):
                    yield from _containers(value)

    def _leaves(self) -> Iterator[tuple[Any, Any, Any]]:
        """(container, key, value) of all that an optimizer keeps."""
        for box in self._containers():
            for key, value in box.items() if isinstance(box, dict) else enumerate(box):
                if not isinstance(value, (dict, list)):
                    yield box, key, value


def _containers(tree: Any) -> Iterator[Any]:
    """A tree's dicts and lists, the tree first."""
    yield tree
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, (dict, list)):
            yield from _containers(value)


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device together, so many that they make about a chunk."""
    kinds: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        part, size = [], 0
        for tensor in same:
            part.append(tensor)
            size += tensor.numel()
            if size >= _CHUNK:
                yield part
                part, size = [], 0
        if part:
            yield part


def _flat(part: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in part])


def _split(flat: Tensor, part: Sequence[Tensor]) -> list[Tensor]:
    return [piece.view(tensor.shape) for piece, tensor in zip(flat.split([tensor.numel() for tensor in part]), part)]

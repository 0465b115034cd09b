"""The contract of an adapter, and how a layer carries one without changing its path or its parameters' names."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Layer(Protocol):
    """What an adapter may ask of the layer that it changes."""

    weight: Tensor
    bias: Tensor | None

    def base_forward(self, x: Tensor) -> Tensor:
        """The frozen layer alone."""


class Adapter(nn.Module):
    """A trainable change of one layer. `merged` is its definition; `forward` is any faster route to the same numbers."""

    def merged(self, weight: Tensor, bias: Tensor | None, strength: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """The layer's dense weight (fp32 or fp64) and bias with the adapter in it."""
        raise TypeError(f"{type(self).__name__} does not define merged()")

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define forward()")


class _Adapted:
    """Mixed into the class of a layer that carries an adapter: the layer keeps its identity, path and parameter names."""

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x, self)

    def base_forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


_adapted_classes: dict[type, type] = {}


def put(layer: nn.Module, adapter: Adapter) -> None:
    """Lays `adapter` beside `layer` in place. Its parameters appear as `<path>.adapter.*`, the base's keep their names."""
    if isinstance(layer, _Adapted):
        raise ValueError("the layer already carries an adapter")
    base = type(layer)
    if base not in _adapted_classes:
        _adapted_classes[base] = type(f"Adapted{base.__name__}", (_Adapted, base), {})
    layer.__class__ = _adapted_classes[base]
    layer.adapter = adapter


def take(layer: nn.Module) -> Adapter:
    """Removes and returns the layer's adapter; the layer is what it was before `put`."""
    adapter = layer.adapter
    del layer.adapter
    layer.__class__ = type(layer).__mro__[2]
    return adapter


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer of every layer of `model` that carries an adapter."""
    return {path: module for path, module in model.named_modules() if isinstance(module, _Adapted)}


@torch.no_grad()
def detach(model: nn.Module) -> None:
    """Takes every adapter off `model`."""
    for layer in adapted_layers(model).values():
        take(layer)

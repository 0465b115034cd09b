"""A frozen weight that is kept in few bits and looks like a dense one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import traceback
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.checkpoint import CheckpointPolicy

from .codes import decode, encode

aten = torch.ops.aten
NAMES = ("codes", "scales", "pairs")  # of the parts


class Quantized(Tensor):
    """`shape` and `dtype` are those of the weight that it stands for; every operation on it gets the dense weight, which lives as long as the operation.

    What autograd or a checkpoint keeps is this tensor, not the dense one, so the backward pass makes it dense again. Turned about (`t`) or laid out in another
    shape (`flatten`) it stays in few bits. It cannot be written to and has no gradient.
    """

    @staticmethod
    def __new__(cls, parts, code, shape, dtype, turned=False):
        size, strides = tuple(shape), tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
        if turned:
            size, strides = size[::-1], strides[::-1]
        return Tensor._make_wrapper_subclass(cls, size, strides=strides, dtype=dtype, device=parts[0].device, requires_grad=False)

    def __init__(self, parts: tuple[Tensor, ...], code: str, shape: tuple[int, ...], dtype: torch.dtype, turned: bool = False):
        self.code, self.own_shape, self.turned = code, tuple(shape), turned
        self.names = NAMES[: len(parts)]
        for name, part in zip(NAMES, parts):
            setattr(self, name, part)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, weight: Tensor, code: str, dtype: torch.dtype) -> "Quantized":
        """A weight (its size a multiple of 64) kept as `code`; it comes back in `dtype`."""
        return cls(encode(weight, code), code, weight.shape, dtype)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that are kept."""
        return tuple([getattr(self, name) for name in self.names])

    def dense(self) -> Tensor:
        """The weight, new."""
        weight = decode(self.parts, self.code, self.dtype).reshape(self.own_shape)
        return weight.t() if self.turned else weight

    def __repr__(self) -> str:
        return f"Quantized({self.code}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        return list(self.names), (self.code, self.own_shape, self.dtype, self.turned)

    @classmethod
    def __tensor_unflatten__(cls, parts, facts, size, stride) -> "Quantized":
        return cls(tuple(parts[name] for name in NAMES if name in parts), *facts)

    def _stable_hash_for_caching(self) -> str:
        """By which a compiler's cache knows that it may take a graph again: all that a graph depends on but the numbers.

        The number is to be raised with each change of what `__torch_dispatch__` traces: the caches do not see that code."""
        return repr(("Quantized 2", self.code, self.own_shape, self.dtype, self.turned, str(self.device)))

    def _like(self, change=lambda part: part, shape=None, dtype=None, turned=None) -> "Quantized":
        return Quantized(tuple(change(part) for part in self.parts), self.code, self.own_shape if shape is None else shape, dtype or self.dtype,
                         self.turned if turned is None else turned)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        keep = KEPT.get(func)
        made = keep(*args, **kwargs) if keep and isinstance(args[0], Quantized) else None
        if made is not None:  # who traces must see a view as one; it costs as much as all the rest
            return made if type(made.codes) is Tensor else return_and_correct_aliasing(func, args, kwargs, made)
        if func._schema.is_mutable and _writes(func, args):
            raise TypeError(f"{func}: a quantized weight is frozen and cannot be written to")
        return func(*[_dense(arg) for arg in args], **{name: _dense(value) for name, value in kwargs.items()})


def _dense(value):
    if not isinstance(value, Quantized):
        return value
    if type(value.codes) is Tensor:
        return value.dense()
    with _made_again():
        return value.dense()


@contextmanager
def _made_again() -> Iterator[None]:
    """What is traced here is computed in the backward pass once more. A compiler sees that both passes make the same dense weight, and would keep the forward's."""
    meta = traceback.get_current_meta()
    before = dict(meta)
    meta["recompute"], meta["ac_graph_id"] = CheckpointPolicy.MUST_RECOMPUTE, 0
    try:
        yield
    finally:
        meta.clear()
        meta.update(before)


def _writes(func, args) -> bool:
    """Whether an operation would change a quantized argument."""
    return any(isinstance(arg, Quantized) and info.alias_info is not None and info.alias_info.is_write for arg, info in zip(args, func._schema.arguments))


def _turn(own: Quantized) -> Quantized | None:
    return own._like(turned=not own.turned) if own.dim() == 2 else None


def _view(own: Quantized, sizes) -> Quantized | None:
    if own.turned:
        return None
    rest = own.numel() // max(1, math.prod(size for size in sizes if size != -1))
    return own._like(shape=tuple(rest if size == -1 else size for size in sizes))


def _to(own: Quantized, dtype=None, device=None, non_blocking=False, **layout) -> Quantized:
    return own._like(lambda part: part.to(device or part.device, non_blocking=non_blocking, copy=True), dtype=dtype)


# Operations that leave the numbers as they are, and what makes their result in few bits (None: this one is made dense after all).
KEPT = {aten.detach.default: Quantized._like, aten.alias.default: Quantized._like, aten.clone.default: lambda own, **layout: own._like(torch.clone),
        aten.t.default: _turn, aten.view.default: _view, aten._unsafe_view.default: _view, aten._to_copy.default: _to}

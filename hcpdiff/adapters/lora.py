"""LoRA (arXiv:2106.09685): W' = W + alpha / rank * up @ down, beside the frozen weight.

The factors are fp32 whatever the compute dtype is. In half precision the small term is laid down first and the base's product is
accumulated onto it in fp32 with one rounding: `base(x)` rounded first would swallow a change smaller than its last bit.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..lora_tensors import LoraTensors
from .base import Adapter, Layer

if TYPE_CHECKING:
    from .shadow import Shadow


HALF = (torch.bfloat16, torch.float16)
Factors = tuple[Tensor, Tensor]


def _factors(down: Tensor, up: Tensor, scale: float, dtype: torch.dtype) -> Factors:
    """down and up to multiply with in `dtype`; in half precision up holds the scale, so that it is rounded once."""
    return down.to(dtype), (scale * up).to(dtype) if dtype in HALF else up.to(dtype)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """In place. By 1 it would be a kernel for nothing, in every layer of every step."""
    return tensor if factor == 1 else tensor.mul_(factor)


def _lora_linear(x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float,
                 ready: Factors | None) -> Tensor:
    """y = x W^T + b + s (z down^T) up^T for 2-D x, where z is x or its dropped-out copy; computes no gradient of W. `ready`: the factors in half precision, where they are known.

    What the backward pass needs is kept before y is computed: checkpointing computes a block again until it has all of that, and so stops before the block's last y.
    """
    with torch.no_grad():
        low, high = ready or _factors(down, up, scale, x.dtype)
        h = (x if dropped is None else dropped) @ low.t()  # (N, rank)
    y = _LoraLinear.apply(x, dropped, weight, h, low, high, down, up, scale)
    with torch.no_grad():
        if x.dtype in HALF:  # `high` holds the scale
            torch.mm(h, high.t(), out=y).addmm_(x, weight.t())
            return y if bias is None else y.add_(bias)
        base = torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)
        return base.addmm_(h, high.t(), alpha=scale)


class _LoraLinear(torch.autograd.Function):
    """Keeps z and h = z down^T for the backward pass of `_lora_linear`; gives y's place, still without numbers."""

    @staticmethod
    def forward(ctx, x, dropped, weight, h, low, high, down, up, scale):
        ctx.scale, ctx.rest, ctx.dtype = scale, 1.0 if x.dtype in HALF else scale, down.dtype
        ctx.save_for_backward(x if dropped is None else dropped, h, weight, low, high)
        return x.new_empty(x.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx, g):
        z, h, weight, low, high = ctx.saved_tensors
        want_x, want_dropped, _, _, _, _, want_down, want_up, _ = ctx.needs_input_grad
        gh = (high.t() @ g.t()).t()  # (N, rank); this product and h^T g are laid out so that a CPU's matrix routines run along N: up to 18 times faster
        grad_x = g @ weight if want_x else None
        if want_x and not want_dropped:
            grad_x.addmm_(gh, low, alpha=ctx.rest)
        grad_dropped = _times(gh @ low, ctx.rest) if want_dropped else None
        grad_down = _times((gh.t() @ z).to(ctx.dtype), ctx.rest) if want_down else None
        grad_up = _times((h.t() @ g).t().to(ctx.dtype), ctx.scale) if want_up else None
        return grad_x, grad_dropped, None, None, None, None, grad_down, grad_up, None


@torch.library.custom_op("hcpdiff::small_first", mutates_args=())
def _small_first(h: Tensor, high: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """h high^T + x W^T, added up in fp32 and rounded once. A compiler that saw the two products would be free to round each, as inductor does on some devices and in some
    versions where something elementwise follows (decision 0091)."""
    return (h @ high.t()).addmm_(x, weight.t())


@_small_first.register_fake
def _(h, high, x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


def _save_small_first(ctx, inputs, output):
    h, high, _, weight = inputs
    ctx.save_for_backward(h, high, weight)


def _small_first_backward(ctx, g):
    h, high, weight = ctx.saved_tensors
    want_h, want_high, want_x, _ = ctx.needs_input_grad
    return g @ high if want_h else None, g.t() @ h if want_high else None, g @ weight if want_x else None, None


_small_first.register_autograd(_small_first_backward, setup_context=_save_small_first)


def _compiled_linear(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """What _lora_linear computes, in operations that a compiler looks into."""
    low, high = _factors(down, up, scale, x.dtype)
    h = z @ low.t()
    if x.dtype not in HALF:
        return torch.addmm(F.linear(x, weight, bias), h, high.t(), alpha=scale)
    y = _small_first(h, high, x, weight)
    return y if bias is None else y + bias


class _StandIn(torch.autograd.Function):
    """A factor's half-precision copy in its place: the gradient goes to the factor."""

    @staticmethod
    def forward(ctx, factor, copy, scale):
        ctx.dtype, ctx.scale = factor.dtype, scale
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, g):
        return _times(g.to(ctx.dtype), ctx.scale), None, None


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a Linear multiplies `x` in: its own dtype, or autocast's."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1


class Lora(Adapter):
    """LoRA of one Linear or Conv2d.

    Linear: down (rank, in), up (out, rank). Conv2d: down (rank, in / groups, kh, kw) with the base's stride, padding and dilation,
    up (out, rank, 1, 1). `down` starts as Kaiming-uniform (a = sqrt 5), `up` as zero, so that a new adapter changes nothing.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        out_width, *in_shape = layer.weight.shape
        device = layer.weight.device
        self.rank, self.alpha, self.dropout = rank, float(alpha), dropout
        self.shadow: "Shadow | None" = None
        self.down = nn.Parameter(torch.empty(rank, *in_shape, dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.zeros(out_width, rank, *(1,) * (len(in_shape) - 1), dtype=torch.float32, device=device))

    @torch.no_grad()
    def reset(self, uniform: Tensor) -> None:
        """Fresh start from `uniform`, draws in [0, 1) of down's shape: Kaiming-uniform with a = sqrt(5), i.e. +-1/sqrt(fan_in)."""
        bound = 1 / math.sqrt(self.down[0].numel())
        self.down.copy_((2 * uniform - 1) * bound)
        self.up.zero_()

    @classmethod
    def of(cls, layer: nn.Module, tensors: LoraTensors, dropout: float = 0.0) -> "Lora":
        """The adapter that a file's tensors describe."""
        lora = cls(layer, tensors.rank, tensors.alpha, dropout)
        with torch.no_grad():
            lora.down.copy_(tensors.down.reshape(lora.down.shape))
            lora.up.copy_(tensors.up.reshape(lora.up.shape))
        return lora

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def tensors(self) -> LoraTensors:
        """fp32 copies on the CPU, for a file."""
        return LoraTensors(self.down.detach().cpu().clone(), self.up.detach().cpu().clone(), self.alpha)

    def merged(self, weight: Tensor, bias: Tensor | None, strength: float = 1.0) -> tuple[Tensor, Tensor | None]:
        delta = (self.up.to(weight.dtype).flatten(1) @ self.down.to(weight.dtype).flatten(1)).reshape(weight.shape)
        return weight + strength * self.scale * delta, bias

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        given, dtype = x.dtype, _product_dtype(x)
        x = x.to(dtype)
        z = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        if isinstance(layer, nn.Conv2d):
            return self._pointwise(x, z, layer) if dtype in HALF and _pointwise(layer) else self._conv(x, x if z is None else z, layer)
        if layer.weight.dtype not in (given, dtype):  # quantised by another library: the layer knows how to multiply, we do not
            low, high, rest = self._operands(dtype)
            small = F.linear(F.linear(x if z is None else z, low), high)
            return torch.add(layer.base_forward(x), small, alpha=rest)
        flat = x.reshape(-1, x.shape[-1])
        y = self._product(flat, None if z is None else z.reshape(flat.shape), layer.weight, layer.bias, self.down, self.up)
        return y.reshape(*x.shape[:-1], -1)

    def _product(self, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        """(N, in) -> (N, out) of a Linear and its LoRA."""
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)  # other than x only under autocast
        if torch.compiler.is_compiling():
            return _compiled_linear(x, x if z is None else z, weight, bias, down, up, self.scale)
        ready = self._ready(x.dtype)
        return _lora_linear(x, z, weight, bias, down, up, self.scale, ready and (ready[0].flatten(1), ready[1].flatten(1)))

    def _ready(self, dtype: torch.dtype) -> Factors | None:
        """The factors in half precision, if they are known and true now."""
        return self.shadow.factors(self, dtype) if self.shadow is not None else None

    def _operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """down, up and what is left of the scale, differentiable, in `dtype`."""
        rest = 1.0 if dtype in HALF else self.scale
        ready = None if torch.compiler.is_compiling() else self._ready(dtype)
        if ready:
            return _StandIn.apply(self.down, ready[0], 1.0), _StandIn.apply(self.up, ready[1], self.scale), rest
        return *_factors(self.down, self.up, self.scale, dtype), rest

    def _pointwise(self, x: Tensor, z: Tensor | None, layer: nn.Conv2d) -> Tensor:
        """A 1x1 convolution as the Linear that it is, over (B*H*W, C), so that half precision keeps the small term."""
        flat, flat_z = (None if part is None else part.permute(0, 2, 3, 1).reshape(-1, part.shape[1]) for part in (x, z))
        y = self._product(flat, flat_z, layer.weight.flatten(1), layer.bias, self.down.flatten(1), self.up.flatten(1))
        return y.reshape(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)

    def _conv(self, x: Tensor, z: Tensor, layer: nn.Conv2d) -> Tensor:
        low, high, rest = self._operands(x.dtype)
        h = layer._conv_forward(z, low, None)  # the base's own stride, padding mode and dilation
        small = F.conv2d(h, high)  # before the large one, as in _lora_linear
        return torch.add(layer.base_forward(x), small, alpha=rest)

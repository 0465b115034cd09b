"""LoRA (arXiv:2106.09685): W' = W + alpha / rank * up @ down, beside the frozen weight.

The factors are fp32 whatever the compute dtype is. In half precision the small term is laid down first and the base's product is
accumulated onto it in fp32 with one rounding: `base(x)` rounded first would swallow a change smaller than its last bit.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..lora_tensors import LoraTensors
from .base import Adapter, Layer


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + b + s (z down^T) up^T for 2-D x, where z is x or its dropped-out copy; computes no gradient of W.

    Keeps z and h = z down^T for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, down, up, scale):
        z = x if dropped is None else dropped
        low, high = down.to(x.dtype), up.to(x.dtype)
        h = z @ low.t()  # (N, rank)
        if x.dtype in (torch.bfloat16, torch.float16):
            y = (h @ (scale * up).to(x.dtype).t()).addmm_(x, weight.t())
            if bias is not None:
                y.add_(bias)
        else:
            y = F.linear(x, weight, bias).addmm_(h, high.t(), alpha=scale)
        ctx.save_for_backward(z, h, weight, low, high)
        ctx.scale, ctx.dtype = scale, down.dtype
        return y

    @staticmethod
    def backward(ctx, g):
        z, h, weight, low, high = ctx.saved_tensors
        want_x, want_dropped, _, _, want_down, want_up, _ = ctx.needs_input_grad
        gh = g @ high  # (N, rank)
        grad_x = g @ weight if want_x else None
        if want_x and not want_dropped:
            grad_x.addmm_(gh, low, alpha=ctx.scale)
        grad_dropped = (gh @ low).mul_(ctx.scale) if want_dropped else None
        grad_down = (gh.t() @ z).to(ctx.dtype).mul_(ctx.scale) if want_down else None
        grad_up = (g.t() @ h).to(ctx.dtype).mul_(ctx.scale) if want_up else None
        return grad_x, grad_dropped, None, None, grad_down, grad_up, None


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
        z = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        if isinstance(layer, nn.Conv2d):
            if x.dtype in (torch.bfloat16, torch.float16) and _pointwise(layer):
                return self._pointwise(x, z, layer)
            return self._conv(x, x if z is None else z, layer)
        if layer.weight.dtype != x.dtype:  # quantised or under autocast: the layer knows how to multiply, we do not
            h = F.linear(x if z is None else z, self.down.to(x.dtype))
            return layer.base_forward(x) + F.linear(h, self.up.to(x.dtype)) * self.scale
        flat = x.reshape(-1, x.shape[-1])
        flat_z = None if z is None else z.reshape(flat.shape)
        y = _LoraLinear.apply(flat, flat_z, layer.weight, layer.bias, self.down, self.up, self.scale)
        return y.reshape(*x.shape[:-1], -1)

    def _pointwise(self, x: Tensor, z: Tensor | None, layer: nn.Conv2d) -> Tensor:
        """A 1x1 convolution as the Linear that it is, over (B*H*W, C), so that half precision keeps the small term."""
        flat, flat_z = (None if part is None else part.permute(0, 2, 3, 1).reshape(-1, part.shape[1]) for part in (x, z))
        y = _LoraLinear.apply(flat, flat_z, layer.weight.flatten(1), layer.bias, self.down.flatten(1), self.up.flatten(1), self.scale)
        return y.reshape(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)

    def _conv(self, x: Tensor, z: Tensor, layer: nn.Conv2d) -> Tensor:
        h = layer._conv_forward(z, self.down.to(x.dtype), None)  # the base's own stride, padding mode and dilation
        return layer.base_forward(x) + F.conv2d(h, self.up.to(x.dtype)) * self.scale

"""Two ways to keep a weight in few bits: blocks of 64 numbers, each with a scale of its own in fp32.

int8: whole numbers from -127 to 127 times the scale; 1.06 bytes a weight.
nf4: one of 16 levels, quantiles of the normal distribution (QLoRA, arXiv:2305.14314, appendix E), times the scale; 0.56 bytes a weight.
"""

import functools
from statistics import NormalDist

import torch
from torch import Tensor

BLOCK = 64
TAIL = 0.9677083  # probability at the outermost levels, of QLoRA's paper: midway between those of 15 and of 16 levels
WIDE = {2: torch.int32, 4: torch.int64}  # bytes of a number -> an integer that holds two of them

INT8, NF4 = "int8", "nf4"
CODES = (INT8, NF4)


def encode(weight: Tensor, code: str) -> tuple[Tensor, ...]:
    """A weight whose size is a multiple of 64 -> the tensors that are kept of it: (codes, scales fp32), and of nf4 the pairs of levels."""
    blocks = weight.detach().to(torch.float32, copy=True).reshape(-1, BLOCK)
    most = blocks.abs().amax(1, keepdim=True)
    scales = most / 127 if code == INT8 else most
    blocks.div_(torch.where(scales > 0, scales, 1.0))
    if code == INT8:
        return blocks.round_().to(torch.int8), scales
    levels = _levels().to(blocks.device)
    number = torch.bucketize(blocks, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).view(-1, BLOCK // 2, 2)
    return number[..., 0] << 4 | number[..., 1], scales, torch.cartesian_prod(levels, levels)


def kept_bytes(count: int, code: str) -> int:
    """Bytes that `encode` gives for a weight of `count` numbers."""
    scales = count // BLOCK * 4
    return count + scales if code == INT8 else count // 2 + scales + 16 * 16 * 2 * 4


def decode(parts: tuple[Tensor, ...], code: str, dtype: torch.dtype) -> Tensor:
    """What `encode` gave -> the weight's numbers in `dtype`, (blocks, 64), rounded once after the product with the scale (nf4: its levels before, too)."""
    if code == INT8:
        return _scaled(*parts, dtype)
    codes, scales, pairs = parts
    levels = pairs.to(dtype).view(WIDE[dtype.itemsize]).flatten()  # both numbers of a byte are fetched as one
    return levels[codes.int()].view(dtype).mul_(scales)


def _scaled(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in fp32, written as `dtype`: one pass over the codes, nothing in between is kept."""
    return torch.mul(codes, scales, out=torch.empty(codes.shape, dtype=dtype, device=codes.device))


@functools.cache
def _levels() -> Tensor:
    """(16,) fp32, ascending from -1 to 1 with 0 among them: 8 steps of equal probability above it, 7 below."""
    inverse = NormalDist().inv_cdf

    def half(count: int) -> list[float]:
        return [inverse(TAIL + (0.5 - TAIL) * step / count) for step in range(count)]

    values = [-value for value in half(7)] + [0.0] + half(8)[::-1]
    return torch.tensor(values, dtype=torch.float64).div(max(values)).float()

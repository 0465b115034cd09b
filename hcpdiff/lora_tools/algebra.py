"""LoRA as products of thin matrices: sums, norms, and the best approximation of a lower rank (Eckart and Young). Worked out in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lora_tensors import LoraTensors

NOISE = 2.0**-23  # singular values below this share of the largest are under the last bit of float32 factors


@dataclass(frozen=True)
class Limit:
    """How much is kept of a matrix: at most `rank` singular values, and as many as hold `energy` of the sum of their squares. None: no limit."""

    rank: int | None = None
    energy: float | None = None

    def kept(self, sigma: Tensor) -> int:
        """Number of the falling singular values `sigma` to keep: one at least, none that is rounding noise."""
        squares = sigma.double().square()
        total = float(squares.sum())
        count = int((sigma > float(sigma[0]) * NOISE).sum())
        if self.rank is not None:
            count = min(count, self.rank)
        if self.energy is not None and total > 0:
            count = min(count, int((squares.cumsum(0) < self.energy * total).sum()) + 1)
        return max(1, count)


def norm(lora: LoraTensors) -> float:
    """Frobenius norm of the delta, from the factors alone: ||up @ down||^2 = sum((up^T up) * (down down^T))."""
    up, down = _matrices(lora)
    return abs(lora.scale) * math.sqrt(max(0.0, float(((up.t() @ up) * (down @ down.t())).sum())))


def concatenated(terms: Sequence[tuple[LoraTensors, float]]) -> LoraTensors | None:
    """The sum of weight * delta over `terms` as one LoRA whose rank is the sum of the ranks. None where no term has an effect.

    Terms with the first one's effective scale keep the bits of their factors; of the others `up` takes the difference, rounded once to float32.
    """
    shares = [(lora, weight * lora.scale) for lora, weight in terms if weight * lora.scale != 0]
    if not shares:
        return None
    common = abs(shares[0][1])
    wide = torch.float64 if any(lora.down.dtype == torch.float64 for lora, _ in shares) else torch.float32
    kernel = max((tuple(lora.down.shape[2:]) for lora, _ in shares), key=len)  # a 1x1 convolution may be stored as a matrix
    downs = [lora.down.reshape(*lora.down.shape[:2], *kernel).to(wide) for lora, _ in shares]
    ups = [(lora.up.double() * (share / common)).to(wide).reshape(*lora.up.shape[:2], *(1 for _ in kernel)) for lora, share in shares]
    down, up = torch.cat(downs), torch.cat(ups, 1)
    return LoraTensors(down, up, common * down.shape[0])


def truncated(lora: LoraTensors, limit: Limit) -> LoraTensors:
    """The nearest LoRA within `limit`, with the same effective scale: float32 factors that share the singular values evenly."""
    up, down = _matrices(lora)
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.t())
    u, sigma, v = torch.linalg.svd(left.R @ right.R.t())
    rank = limit.kept(sigma)
    root = sigma[:rank].sqrt()
    return _shaped((left.Q @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ right.Q.t()), lora.down.shape[2:], lora.scale)


def nearest(delta: Tensor, limit: Limit) -> LoraTensors:
    """The LoRA within `limit` that is nearest to a dense change of a weight, (out, in) or (out, in, kh, kw), which is not all zero. Scale 1.

    The singular values come from the eigenvalues of the smaller Gram matrix, good to 1e-8 of the largest: a fifth of the time of an SVD.
    """
    matrix = delta.flatten(1).double()
    tall = matrix.shape[0] > matrix.shape[1]
    side = matrix.t() if tall else matrix
    values, vectors = torch.linalg.eigh(side @ side.t())  # rising
    sigma = values.flip(0).clamp(min=0).sqrt()
    rank = limit.kept(sigma)
    basis, root = vectors.flip(1)[:, :rank], sigma[:rank].sqrt()
    inner, outer = (basis.t() @ side) / root[:, None], basis * root
    up, down = (inner.t(), outer.t()) if tall else (outer, inner)
    return _shaped(up, down, delta.shape[2:], 1.0)


def stored_in(lora: LoraTensors, dtype: torch.dtype) -> bool:
    """Whether the factors have no digits beyond `dtype`."""
    return all(torch.equal(factor.to(dtype).to(factor.dtype), factor) for factor in (lora.down, lora.up))


def _matrices(lora: LoraTensors) -> tuple[Tensor, Tensor]:
    """up (out, r), down (r, in * kh * kw)."""
    return lora.up.flatten(1).double(), lora.down.flatten(1).double()


def _shaped(up: Tensor, down: Tensor, kernel: torch.Size, scale: float) -> LoraTensors:
    rank = down.shape[0]
    width = down.shape[1] // math.prod(kernel)
    ones = (1 for _ in kernel)
    return LoraTensors(down.float().reshape(rank, width, *kernel).contiguous(), up.float().reshape(up.shape[0], rank, *ones).contiguous(), scale * rank)

"""The numbers of one layer's LoRA, as files hold them and adapters use them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraTensors:
    """LoRA of one layer (arXiv:2106.09685): delta W = alpha / rank * up @ down.

    Linear: down (rank, in), up (out, rank). Conv2d: down (rank, in, kh, kw), up (out, rank, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Inner dimension of the factors."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Effective scale, alpha / rank."""
        return self.alpha / self.rank

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense change of the weight, in the base weight's shape: (out, in) or (out, in, kh, kw)."""
        flat = self.up.to(dtype).flatten(1) @ self.down.to(dtype).flatten(1)
        return (self.scale * flat).reshape(self.up.shape[0], *self.down.shape[1:])

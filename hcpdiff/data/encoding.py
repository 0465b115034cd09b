"""One image with the VAE: what comes out of it, on its way to the CPU, and the entry that it becomes."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .sample import stack_pixels

Entry = dict[str, Tensor]
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # (1,3,H,W) fp32 in [-1,1] on the CPU -> mean, std (1,C,h,w) on any device


class Arriving:
    """A tensor on its way to the CPU: called, it is there. From a GPU it is copied behind the work that makes it, and nobody waits meanwhile."""

    def __init__(self, tensor: Tensor):
        self._event = None
        if tensor.device.type in ("cuda", "xpu"):
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self._event, self._device = torch.Event(tensor.device), tensor.device.index
            self._event.record()
        else:
            self._host = tensor.to("cpu", copy=True).contiguous()

    def __call__(self) -> Tensor:
        if self._event is None:
            return self._host
        with torch.accelerator.device_index(self._device):  # another thread's device is the first one, on which asking would take memory
            self._event.synchronize()
        return self._host.clone()  # ordinary memory: page-locked memory is scarce, and entries may be kept


class Encoding:
    """One view with the VAE; `entry()` is its entry, once it is there."""

    def __init__(self, name: str, rgb: np.ndarray, mask: np.ndarray | None, encode: Encode):
        self.name, self.mask = name, mask
        self.parts = [Arriving(part[0].detach()) for part in encode(stack_pixels([rgb]))]

    def entry(self) -> Entry:
        """mean, std and mask on the CPU. Latents that are not finite are an error that names the image."""
        mean, std = (part() for part in self.parts)
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise DataError(f"{self.name}: the VAE's latents are not finite; run it in fp32 (mixed_precision: fp32) or use another VAE")
        return {"mean": mean, "std": std} if self.mask is None else {"mean": mean, "std": std, "mask": torch.from_numpy(self.mask)}

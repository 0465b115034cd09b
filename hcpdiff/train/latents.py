"""Latents are encoded once, before the first step; then the VAE is let go."""

import time
from collections.abc import Callable

import torch

from ..data.dataset import TrainData
from ..device import send
from ..families.base import Models
from ..families.read_parts import CPU
from .parallel import Parallel

EVERY = 5.0  # seconds between two lines on how far it is


def cache_latents(data: TrainData, models: Models, mark: str, parallel: Parallel, keep_vae: bool, say: Callable[[str], None]) -> None:
    """Fills the cache of every dataset that has one; each process does its share. keep_vae: for previews, which fetch it from the CPU when they draw. A VAE that
    nothing needs is not even read."""
    exchange = parallel.gather if parallel.world > 1 else None
    began = time.monotonic()
    own = data.cache_latents(_encoder(models, parallel.device), mark, parallel.rank, parallel.world, exchange, Telling("latents", say, "images", end=False))
    encoded = sum(parallel.gather(own))
    if any(one.cache != "none" for one in data.datasets):
        say(_summary(data, encoded, time.monotonic() - began))
    if data.all_cached and not keep_vae:
        models.drop("vae")
    else:
        models.read("vae", CPU if data.all_cached else parallel.device)


def _summary(data: TrainData, encoded: int, seconds: float) -> str:
    """How many images came from a cache on disk, which, and how many were encoded."""
    cached = [one for one in data.datasets if one.cache != "none"]
    total, folders = sum(map(len, cached)), list(dict.fromkeys(one.cache_dir for one in cached if one.cache == "disk"))
    found = max(0, total - encoded)  # more are encoded than there are where machines share no disk
    parts = [f"{found} from {', '.join(folders)}"] if found else []
    parts += [f"{encoded} encoded{'' if folders else ' and kept in memory'}"] if encoded else []
    return f"latents: {total} images, {', '.join(parts)}, {seconds:.1f} s"


def _encoder(models: Models, device: torch.device) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    ready = False

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal ready
        if not ready:
            models.read("vae", device)
            ready = True
        return models.family.posterior(models, send(pixels, device))  # left there: the cache fetches them while the next image is encoded

    return encode


class Telling:
    """A line every few seconds, and one at the end (`end`)."""

    def __init__(self, what: str, say: Callable[[str], None], unit: str = "encoded", end: bool = True):
        self.what, self.say, self.unit, self.end, self.said = what, say, unit, end, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.end if done == total else now - self.said > EVERY:
            self.said = now
            self.say(f"{self.what}: {done}/{total} {self.unit}")

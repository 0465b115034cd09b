"""One forward and backward pass of the largest batch before the first step: what does not fit is known at once, not after an hour."""

import time

import torch

from .. import device as machine
from ..data.sample import Batch
from .trainer import Trainer


def probe(trainer: Trainer, shape: tuple[int, int, int], geometry: tuple[int, int]) -> str:
    """A line on the memory and time of a batch of `shape` (samples, width, height); out of memory is an error that names it.

    Changes nothing: gradients are cleared, no weight moves, random states are kept by the loss itself.
    """
    batch = blank_batch(shape, geometry)
    started = time.monotonic()
    trainer.backward(batch)
    trainer.gradients.clear()
    device = trainer.gradients.flat.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    samples, width, height = shape
    return f"largest batch ({samples} x {width} x {height}) fits: peak memory {machine.peak_memory(device)}, first pass {time.monotonic() - started:.1f} s"


def blank_batch(shape: tuple[int, int, int], geometry: tuple[int, int]) -> Batch:
    """A batch of empty latents and empty prompts."""
    samples, width, height = shape
    factor, channels = geometry
    latent = torch.zeros(samples, channels, height // factor, width // factor)
    size = torch.tensor([[height, width]] * samples)
    return Batch(ids=("probe",) * samples, prompts=[""] * samples, pixels=None, latent_mean=latent, latent_std=latent, vae_noise=latent, noise=latent,
                 offset_noise=latent[:, :, :1, :1], u=torch.full((samples,), 0.5, dtype=torch.float64), weights=torch.full((samples,), 1 / samples), mask=None,
                 original_size=size, crop_top_left=torch.zeros_like(size), target_size=size, module_seed=0)

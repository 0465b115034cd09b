"""One micro-batch through the model: from latents or pixels and prompts to the loss, summed with the plan's weights."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..device import send
from ..diffusion.objective import DiscreteObjective
from ..families.base import Conditioning, Models
from ..loss import LossFunction

Conditioner = Callable[[Sequence[str]], Conditioning]


class DenoisingStep:
    """loss(batch): sum over the batch of weight x mean over (C,h,w) of mask x loss(pred, target), in fp32.

    Weights are already divided by the step's total, so the sum over all micro-batches and processes is the step's mean loss.
    """

    def __init__(self, models: Models, objective: DiscreteObjective, loss: LossFunction, condition: Conditioner, device: torch.device,
                 dtype: torch.dtype, noise_offset: float = 0.0, min_snr_gamma: float | None = None):
        objective = replace(objective, alphas_cumprod=objective.alphas_cumprod.to(device))
        self.models, self.objective, self.loss_function, self.condition = models, objective, loss, condition
        self.device, self.dtype = device, dtype
        self.exact = torch.promote_types(torch.float32, dtype)  # of latents, noise, target and loss
        self.noise_offset, self.min_snr_gamma = noise_offset, min_snr_gamma

    def latents(self, batch) -> Tensor:
        """(B,C,h,w) fp32, a fresh sample of the posterior, scaled."""
        if batch.latent_mean is None:
            with torch.no_grad():
                mean, std = self.models.family.posterior(self.models, self._here(batch.pixels))
        else:
            mean, std = self._here(batch.latent_mean), self._here(batch.latent_std)
        z = mean.to(self.exact) + std.to(self.exact) * self._here(batch.vae_noise)
        return self.models.family.scale_latent(self.models, z)

    def loss(self, batch) -> Tensor:
        """The batch's part of the step's loss, a scalar to call backward on."""
        return self.losses(batch).sum()

    def losses(self, batch) -> Tensor:
        """(B,) weighted losses of the samples; their sum is the batch's part of the step's loss."""
        x0 = self.latents(batch)
        noise = self._here(batch.noise)
        if self.noise_offset:
            noise = noise + self.noise_offset * self._here(batch.offset_noise)
        t = self._here(self.objective.timesteps(batch.u, tuple(x0.shape)))
        x_t = self.objective.corrupt(x0, noise, t)
        extras = {name: self._here(getattr(batch, name)) for name in ("original_size", "crop_top_left", "target_size")}
        with seeded(batch.module_seed, self.device):  # dropout inside modules
            cond = self.condition(batch.prompts).to(self.dtype)
            pred = self.models.family.denoise(self.models, x_t.to(self.dtype), t, cond, extras)
        element = self.loss_function(pred, self.objective.target(x0, noise, t))
        return self._per_sample(element, t, batch.mask) * self._here(batch.weights)

    def _here(self, tensor: Tensor) -> Tensor:
        return send(tensor, self.device)

    def _per_sample(self, element: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            element = element * self._here(mask)
        loss = element.flatten(1).mean(1)
        return loss if self.min_snr_gamma is None else loss * self.objective.min_snr_weight(t, self.min_snr_gamma)


@contextmanager
def seeded(seed: int, device: torch.device):
    """The global generators of CPU and device at `seed` inside, and as they were afterwards."""
    forked = {"devices": [device], "device_type": device.type} if device.type in ("cuda", "xpu") else {"devices": []}
    with torch.random.fork_rng(**forked):
        torch.manual_seed(seed)
        yield

"""Discrete-time diffusion (DDPM, arXiv:2006.11239): noising, target and signal-to-noise ratio for each kind of prediction."""

from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class DiscreteObjective:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, with the model predicting noise, v (arXiv:2202.00512) or x_0.

    `alphas_cumprod` (T,) float32 is a_t of the base model's own schedule; timesteps are drawn from [min_timestep, max_timestep).
    """

    alphas_cumprod: Tensor
    prediction: str = "epsilon"
    min_timestep: int = 0
    max_timestep: int | None = None

    def timesteps(self, u: Tensor, latent_shape: tuple[int, ...] = ()) -> Tensor:
        """u (B,) in [0,1) -> (B,) int64, uniform over the allowed timesteps."""
        top = self.max_timestep or len(self.alphas_cumprod)
        span = top - self.min_timestep
        return (self.min_timestep + (u * span).long()).clamp_(max=top - 1)

    def _roots(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alphas_cumprod.to(like.device)[t].to(like.dtype).reshape(-1, *(1,) * (like.dim() - 1))
        return a.sqrt(), (1 - a).sqrt()

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, in x0's shape and dtype."""
        signal, sigma = self._roots(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should predict."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        signal, sigma = self._roots(t, x0)
        return signal * noise - sigma * x0

    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a prediction stands for."""
        signal, sigma = self._roots(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - sigma * pred) / signal
        if self.prediction == "sample":
            return pred
        return signal * x_t - sigma * pred

    def snr(self, t: Tensor) -> Tensor:
        """(B,) signal-to-noise ratio a_t / (1 - a_t)."""
        a = self.alphas_cumprod.to(t.device)[t]
        return a / (1 - a)

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """(B,) weight of the loss on this objective's own target (Min-SNR-gamma, arXiv:2303.09556, table 1).

        The paper's min(snr, gamma) weighs the loss on x_0; divided by how much a prediction's error counts there.
        """
        snr = self.snr(t)
        capped = snr.clamp(max=gamma)
        if self.prediction == "epsilon":
            return torch.where(snr > 0, capped / snr.clamp(min=torch.finfo(snr.dtype).tiny), torch.ones_like(snr))
        if self.prediction == "v_prediction":
            return capped / (snr + 1)
        return capped

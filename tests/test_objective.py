"""Noising, targets and weights against diffusers' schedulers and the papers' formulas."""

import pytest
import torch
from diffusers import DDPMScheduler

from hcpdiff.diffusion.objective import PREDICTIONS, DiscreteObjective
from hcpdiff.loss import make_loss


def pair(prediction, **extra):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, **extra)
    return scheduler, DiscreteObjective(scheduler.alphas_cumprod, prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noising_and_target_equal_diffusers(prediction):
    scheduler, objective = pair(prediction)
    x0, noise = torch.randn(2, 6, 4, 3, 3, dtype=torch.float64)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(objective.corrupt(x0, noise, t), scheduler.add_noise(x0, noise, t), rtol=1e-6, atol=1e-6)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}[prediction]
    torch.testing.assert_close(objective.target(x0, noise, t), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_to_x0_inverts_the_target(prediction):
    _, objective = pair(prediction)
    x0, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([3, 400, 900])
    found = objective.to_x0(objective.target(x0, noise, t), objective.corrupt(x0, noise, t), t)
    torch.testing.assert_close(found, x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_the_papers_weight_of_the_x0_loss(prediction):
    """min(snr, gamma) x |x0 error|^2 equals the weight times the loss on the prediction."""
    _, objective = pair(prediction)
    x0, noise, off = torch.randn(3, 5, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([10, 100, 300, 700, 990])
    x_t, target = objective.corrupt(x0, noise, t), objective.target(x0, noise, t)
    pred = target + 0.1 * off
    x0_error = (objective.to_x0(pred, x_t, t) - x0).square().flatten(1).mean(1)
    a = objective.alphas_cumprod[t].double()
    reference = torch.clamp(a / (1 - a), max=5.0) * x0_error
    ours = objective.min_snr_weight(t, 5.0).double() * (pred - target).square().flatten(1).mean(1)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_zero_terminal_snr_has_finite_weights(prediction):
    _, objective = pair(prediction, rescale_betas_zero_snr=True)
    t = torch.arange(1000)
    assert objective.snr(t)[-1] < 1e-6 and torch.isfinite(objective.min_snr_weight(t, 5.0)).all()


def test_timesteps_cover_the_range_evenly():
    objective = DiscreteObjective(torch.linspace(0.99, 0.01, 1000), min_timestep=200, max_timestep=600)
    t = objective.timesteps((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    assert t.min() == 200 and t.max() == 599 and (torch.bincount(t)[200:] == 10).all()
    assert objective.timesteps(torch.tensor([1 - 1e-17], dtype=torch.float64)).item() == 599


@pytest.mark.parametrize("kind,reference", [
    ("mse", lambda d: d**2), ("l1", torch.abs),
    ("huber", lambda d: torch.where(d.abs() < 0.5, 0.5 * d**2, 0.5 * (d.abs() - 0.25))),
    ("smooth_l1", lambda d: torch.where(d.abs() < 0.5, d**2, d.abs() - 0.25)),
])
def test_losses_are_their_formulas(kind, reference):
    pred, target = torch.randn(2, 100)
    torch.testing.assert_close(make_loss(kind, 0.5)(pred, target), reference(pred - target))

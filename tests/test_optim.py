"""Learning-rate schedules against transformers' and torch's, and the flat gradient buffer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hcpdiff.config.schema import SchedulerConfig
from hcpdiff.train.optim import Gradients, lr_factor, optimizer_groups, set_lr, simulated_factor
from hcpdiff.train.parts import make_optimizer
from hcpdiff.trainables.lora import ParamGroup


def reference(name, steps, warmup, **extra):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, warmup, steps + 1, **extra)
    values = []
    for _ in range(steps):  # ours skips the wasted step at rate zero: it is one ahead
        optimizer.step()
        schedule.step()
        values.append(schedule.get_last_lr()[0])
    return values


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_transformers_one_step_ahead(name, warmup):
    extra = {"scheduler_specific_kwargs": {"lr_end": 0.0, "power": 1.0}} if name == "polynomial" else {}
    ours = lr_factor(SchedulerConfig(name=name, num_warmup_steps=warmup), 40)
    assert [ours(step) for step in range(40)] == pytest.approx(reference(name, 40, warmup, **extra), abs=1e-9)


def test_no_step_has_a_rate_of_zero():
    for name in ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "one_cycle"):
        factor = lr_factor(SchedulerConfig(name=name, num_warmup_steps=3), 20)
        assert all(0 < factor(step) <= 1 for step in range(20 if name != "one_cycle" else 19)), name


def test_one_cycle_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=50, pct_start=0.3, cycle_momentum=False, final_div_factor=1e12)
    ours = lr_factor(SchedulerConfig(name="one_cycle"), 50)
    for step in range(50):
        assert ours(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        if step < 49:
            schedule.step()


def test_warmup_can_be_a_share_and_the_end_a_floor():
    factor = lr_factor(SchedulerConfig(name="cosine", num_warmup_steps=0.1, min_lr_ratio=0.2), 100)
    assert factor(9) == 1 and factor(4) == 0.5 and factor(99) == pytest.approx(0.2, abs=1e-3) and factor(500) == pytest.approx(0.2)


def test_flat_gradients_equal_autograds_and_clip_as_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    twin = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    twin.load_state_dict(model.state_dict())
    groups = [ParamGroup("a", 1.0, tuple(model[0].parameters())), ParamGroup("b", 2.0, tuple(model[1].parameters()))]
    gradients, x = Gradients(groups, torch.device("cpu")), torch.randn(7, 5)
    for _ in range(2):  # accumulates, clears, accumulates
        gradients.clear()
        twin.zero_grad()
        for part in (x[:3], x[3:]):
            model(part).square().sum().backward()
            twin(part).square().sum().backward()
    norm = gradients.clip(0.5)
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    torch.testing.assert_close(norm, expected)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
        assert p.grad.untyped_storage().data_ptr() == gradients.flat.untyped_storage().data_ptr()


def test_groups_keep_their_own_rate():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    groups = [ParamGroup(f"g{i}", 10.0**-i, tuple(layer.parameters())) for i, layer in enumerate(layers)]
    optimizer = torch.optim.AdamW(optimizer_groups(groups, 2.0))
    assert set_lr(optimizer, 0.5) == [1.0, 0.1] and [g["name"] for g in optimizer.param_groups] == ["g0", "g1"]


def test_a_torch_scheduler_gives_the_factors_that_it_gives_torch():
    for make in (lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 7), lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=20)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        schedule, expected = make(optimizer), []
        for _ in range(20):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        ours = simulated_factor(make, 20)
        assert [ours(step) for step in range(20)] == pytest.approx(expected)
        assert ours(17) == ours(17) and ours(99) == ours(19)


def test_small_gradients_are_not_scaled_up():
    weight = nn.Parameter(torch.zeros(3))
    gradients = Gradients([ParamGroup("a", 1.0, (weight,))], torch.device("cpu"))
    (weight * torch.tensor([0.1, 0.2, 0.2])).sum().backward()
    assert gradients.clip(1.0).item() == pytest.approx(0.3)
    torch.testing.assert_close(weight.grad, torch.tensor([0.1, 0.2, 0.2]))
    assert gradients.clip(None).item() == pytest.approx(0.3)


def made(optimizer, device="cpu", value=1.0):
    weight = nn.Parameter(torch.full((4,), value, device=device))
    cfg = SimpleNamespace(train=SimpleNamespace(optimizer={"_target_": "torch.optim.AdamW", **optimizer}, scale_lr=False))
    return weight, make_optimizer([ParamGroup("a", 1e-2, (weight,))], cfg, 1, ())


def test_adam_is_fused_unless_the_config_chooses():
    assert made({})[1].param_groups[0]["fused"] and made({"_target_": "torch.optim.Adam"})[1].param_groups[0]["fused"]
    assert not made({"fused": False})[1].param_groups[0]["fused"]
    assert not made({"foreach": True})[1].param_groups[0]["fused"]
    assert not made({"_target_": "torch.optim.SGD"})[1].param_groups[0]["fused"]


def test_fused_adamw_is_adamw_and_goes_on_from_a_state_of_the_other():
    """Up to the last bit: a run saved by an earlier version goes on."""
    (a, fused), (b, loop) = made({"weight_decay": 0.1}), made({"weight_decay": 0.1, "foreach": False})
    for step in range(6):
        a.grad, b.grad = (torch.linspace(-1, 1, 4) * (step + 1) for _ in range(2))
        fused.step()
        loop.step()
        if step == 2:
            state = copy.deepcopy(loop.state_dict())
            fused.load_state_dict({**state, "param_groups": [{**state["param_groups"][0], "fused": True, "foreach": None}]})
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

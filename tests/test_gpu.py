"""What only a GPU reaches; skipped without one."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_step_reference import Setup, make_batch

from hcpdiff import device as machine
from hcpdiff.train.optim import Gradients, optimizer_groups
from hcpdiff.train.signals import StopRequest
from hcpdiff.train.trainer import Hook, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on_gpu(dtype: torch.dtype) -> Setup:
    setup = Setup(dtype=torch.float32)
    device = torch.device("cuda")
    setup.unet.to(device)
    for path, module in setup.unet.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and not path.endswith("adapter"):
                parameter.data = parameter.data.to(dtype)
    setup.hidden = setup.hidden.to(device, dtype)
    setup.step.device, setup.step.dtype = device, dtype
    setup.step.objective = replace(setup.step.objective, alphas_cumprod=setup.step.objective.alphas_cumprod.to(device))
    return setup


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.02)])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(dtype, tolerance):
    reference, ours = Setup(dtype=torch.float32), on_gpu(dtype)
    batch = make_batch(dtype=torch.float32)
    expected, loss = reference.step.loss(batch), ours.step.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    expected.backward()
    loss.backward()
    pairs = zip(reference.trainable.adapters.values(), ours.trainable.adapters.values())
    flat = [torch.cat([p.grad.flatten().cpu() for lora in side for p in lora.parameters()]) for side in zip(*pairs)]
    assert torch.dot(*flat) / flat[0].norm() / flat[1].norm() > 1 - tolerance
    assert all(p.grad.dtype == torch.float32 for lora in ours.trainable.adapters.values() for p in lora.parameters())


def test_auto_precision_and_attention():
    assert machine.compute_dtype("auto", torch.device("cuda", 0)) in (torch.bfloat16, torch.float16)
    assert "GiB" in machine.describe(torch.device("cuda", 0)) and "GiB" in machine.peak_memory(torch.device("cuda", 0))


class Steps:
    """Batches 0 to 5; those of `bad` have a NaN in a latent."""

    def __init__(self, bad):
        self.bad = bad

    def batches(self, start, rank, world, first_index, count):
        for step in range(count):
            batch = make_batch(seed=step, dtype=torch.float32)
            batch.latent_mean[1, 0, 0, 0] = math.nan if step in self.bad else 0.0
            yield step, [SimpleNamespace(epoch=0)], [batch]

    def names(self, step, world):
        return [[[(f"{step}.{i}", 1 / 3) for i in range(3)]]]


def trained(bad=(), lag=True, fp16=False, hooks=(), make=torch.optim.AdamW):
    setup = on_gpu(torch.float32)
    groups = setup.trainable.param_groups()
    trainer = Trainer(feed=Steps(bad), loss=setup.step.losses, gradients=Gradients(groups, torch.device("cuda"), samples=3), optimizer=make(optimizer_groups(groups, 1.0)),
                      lr_factor=lambda step: 1.0, parallel=SimpleNamespace(rank=0, world=1, sum_=lambda t: t), hooks=hooks, total_steps=6, max_grad_norm=1.0, max_nonfinite=5,
                      fp16=fp16, lag=lag)
    trainer.state.positions = [SimpleNamespace(epoch=0)]
    try:
        trainer.fit(StopRequest())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return trainer


@pytest.mark.parametrize("fp16", [False, True])
def test_no_step_but_the_first_waits_for_the_gpu(fp16):
    strict = Hook()
    strict.on_step_end = lambda trainer: torch.cuda.set_sync_debug_mode("error")
    strict.on_end = lambda trainer: torch.cuda.set_sync_debug_mode("default")
    assert trained(bad=(2, 3), fp16=fp16, hooks=[strict]).state.skipped == 2


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda g: torch.optim.AdamW(g, fused=True), lambda g: torch.optim.SGD(g, momentum=0.9)])
def test_what_the_host_learns_late_is_what_it_learns_at_once(make):
    late, once = (trained(bad=(0, 2, 3), lag=lag, make=make) for lag in (True, False))
    assert late.state.skipped == once.state.skipped == 3
    assert [str(skip) for skip in late.take_skips()] == [str(skip) for skip in once.take_skips()]
    for ours, theirs in zip(late.gradients.parameters, once.gradients.parameters):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    states = [[state["step"] for state in trainer.optimizer.state.values() if "step" in state] for trainer in (late, once)]
    assert [float(step) for step in states[0]] == [float(step) for step in states[1]]

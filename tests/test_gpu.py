"""What only a GPU reaches; skipped without one."""

import pytest
import torch
from test_step_reference import Setup, make_batch

from hcpdiff import device as machine

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

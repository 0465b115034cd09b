"""Half-precision copies of LoRA weights: the numbers of casting each time, and never an old one."""

from contextlib import nullcontext

import pytest
import torch
from test_adapters import LAYERS
from test_step_reference import Setup, make_batch
from torch import nn

from hcpdiff.adapters.base import put
from hcpdiff.adapters.lora import Lora
from hcpdiff.adapters.shadow import Shadow


def layers(dtype=torch.bfloat16):
    """(layers with a LoRA, their LoRAs, an input of each): several kinds and scales."""
    torch.manual_seed(0)
    made, loras, inputs = [], [], []
    for number, (make, shape) in enumerate(LAYERS.values()):
        layer = make().to(dtype).requires_grad_(False)
        lora = Lora(layer, 2, (1, 2, 3)[number % 3])
        lora.reset(torch.rand(lora.down.shape))
        nn.init.normal_(lora.up)
        put(layer, lora)
        made, loras, inputs = [*made, layer], [*loras, lora], [*inputs, torch.randn(shape).to(dtype).requires_grad_()]
    return made, loras, inputs


def numbers(made, loras, inputs):
    found = []
    for layer, lora, x in zip(made, loras, inputs):
        y = layer(x)
        found += [y, *torch.autograd.grad(y.float().square().sum(), [x, lora.down, lora.up])]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_give_the_bits_that_casting_gives(dtype):
    made, loras, inputs = layers(dtype)
    expected = numbers(made, loras, inputs)
    shadow = Shadow(loras, dtype)
    assert all(shadow.factors(lora, dtype) is None for lora in loras)
    with shadow.fresh():
        assert all(shadow.factors(lora, dtype) is not None for lora in loras)
        for got, want in zip(numbers(made, loras, inputs), expected, strict=True):
            assert torch.equal(got, want) and got.dtype == want.dtype


def test_parameters_keep_identity_values_and_places_in_one_buffer():
    _, loras, _ = layers()
    before = [(p, p.detach().clone()) for lora in loras for p in lora.parameters()]
    shadow = Shadow(loras, torch.bfloat16)
    for (old, value), new in zip(before, (p for lora in loras for p in lora.parameters()), strict=True):
        assert new is old and torch.equal(new, value) and new.is_leaf and new.requires_grad
        assert new.untyped_storage().data_ptr() == shadow.full.untyped_storage().data_ptr() and new.data_ptr() % 128 == shadow.full.data_ptr() % 128


def test_outside_a_step_the_weights_are_what_they_are_now():
    """However they were changed: an optimizer, `.data`, a file, an update taken back."""
    made, loras, inputs = layers()
    shadow = Shadow(loras, torch.bfloat16)
    with shadow.fresh():
        numbers(made, loras, inputs)
    for lora in loras:
        lora.up.data.mul_(-3)
    now = [layer(x) for layer, x in zip(made, inputs)]
    for lora in loras:
        lora.shadow = None
    for got, layer, x in zip(now, made, inputs):
        assert torch.equal(got, layer(x))
    for lora in loras:
        lora.shadow = shadow
    with shadow.fresh():
        assert all(torch.equal(got, layer(x)) for got, layer, x in zip(now, made, inputs))
    with pytest.raises(KeyError), shadow.fresh():
        raise KeyError
    assert not shadow.true


def test_checkpointing_computes_again_with_the_copies_of_its_step():
    setup = Setup(dtype=torch.float32)
    setup.unet.train().enable_gradient_checkpointing()
    for path, module in setup.unet.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and not path.endswith("adapter"):
                parameter.data = parameter.data.bfloat16()
    setup.hidden, setup.step.dtype = setup.hidden.bfloat16(), torch.bfloat16
    loras = list(setup.trainable.adapters.values())
    grads = []
    for copies in (False, True):
        if copies:
            shadow = Shadow(loras, torch.bfloat16)
            with shadow.fresh():
                setup.step.loss(make_batch(dtype=torch.float32)).backward()
        else:
            setup.step.loss(make_batch(dtype=torch.float32)).backward()
        grads.append([p.grad for lora in loras for p in lora.parameters()])
        setup.unet.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and any(a.abs().sum() > 0 for a in grads[0])


class Assigning(torch.optim.Optimizer):
    """Steps down the gradient. `own`: its weights are its own, and parameters are pointed at them once; else each step gives a parameter a new tensor."""

    def __init__(self, params, own: bool):
        super().__init__(params, {})
        self.own = {}
        if own:
            for p in self.param_groups[0]["params"]:
                self.own[p] = p.data = p.data.clone()

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p in self.own:
                self.own[p] -= 0.1 * p.grad
            else:
                p.data = p.data - 0.1 * p.grad


@pytest.mark.parametrize("own", [False, True])
def test_weights_that_an_optimizer_assigns_are_those_of_the_next_step(own):
    found = []
    for copies in (False, True):
        made, loras, inputs = layers()
        shadow = Shadow(loras, torch.bfloat16) if copies else None
        optimizer = Assigning([p for lora in loras for p in lora.parameters()], own)
        for _ in range(3):
            optimizer.zero_grad()
            with shadow.fresh() if shadow else nullcontext():
                outputs = [layer(x) for layer, x in zip(made, inputs)]
                sum(y.float().mean() for y in outputs).backward()
            optimizer.step()
        found.append(outputs + [p.detach() for lora in loras for p in lora.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

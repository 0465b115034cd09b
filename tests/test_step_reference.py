"""The training step against a plain loop written here: diffusers' modules, peft's LoRA, formulas from the papers."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from tiny import make_text_encoder, make_unet

from hcpdiff.config.schema import LoraGroup
from hcpdiff.data.sample import Batch
from hcpdiff.diffusion.objective import DiscreteObjective
from hcpdiff.families.base import Conditioning, Models
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.loss import make_loss
from hcpdiff.train.optim import Gradients, optimizer_groups
from hcpdiff.train.step import DenoisingStep
from hcpdiff.trainables.lora import LoraTrainable

PATTERNS = [r"re:.*\.attn.?$", r"re:.*\.ff$", r"re:.*resnets.0.conv1$"]


def make_batch(size=3, seed=0, weights=None, mask=None, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    pair = torch.zeros(size, 2, dtype=torch.int64)
    return Batch(tuple(map(str, range(size))), ["p"] * size, None, draw(size, 4, 8, 8), draw(size, 4, 8, 8).abs(), draw(size, 4, 8, 8), draw(size, 4, 8, 8),
                 draw(size, 4, 1, 1), torch.rand(size, generator=g, dtype=torch.float64), weights if weights is not None else torch.full((size,), 1 / size, dtype=dtype), mask,
                 pair, pair, pair + 64, 7)


class Setup:
    """Our step and peft's twin on the same weights."""

    def __init__(self, prediction="epsilon", dtype=torch.float64, offset=0.0, gamma=None, dropout=0.0):
        torch.manual_seed(0)
        self.unet = make_unet().to(dtype).requires_grad_(False).eval()
        self.twin = copy.deepcopy(self.unet)
        self.hidden = torch.randn(3, 77, 32, dtype=dtype)
        family = StableDiffusion()
        models = Models(family, None, "tiny", {"unet": self.unet}, {}, {}, {"latent_scale": 0.18215, "latent_shift": 0.0})
        group = LoraGroup(lr=1e-2, rank=3, alpha=1.5, layers=PATTERNS, dropout=dropout)
        self.trainable = LoraTrainable(family.components[0], [group], "lora_unet")
        self.trainable.attach(models, seed=0)
        for lora in self.trainable.adapters.values():
            torch.nn.init.normal_(lora.up, std=0.05)
            lora.to(dtype)
        self.alphas = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)
        self.prediction, self.offset, self.gamma, self.dtype = prediction, offset, gamma, dtype
        self.step = DenoisingStep(models, DiscreteObjective(self.alphas, prediction), make_loss("mse", 1.0), lambda prompts: Conditioning(self.hidden[: len(prompts)]),
                                  torch.device("cpu"), dtype, offset, gamma)
        self._make_twin()

    def _make_twin(self):
        self.twin.add_adapter(LoraConfig(r=3, lora_alpha=1.5, target_modules=list(self.trainable.adapters), init_lora_weights=False))
        state = dict(self.twin.named_parameters())
        self.pairs = []
        for path, lora in self.trainable.adapters.items():
            a, b = state[f"{path}.lora_A.default.weight"], state[f"{path}.lora_B.default.weight"]
            with torch.no_grad():
                a.copy_(lora.down)
                b.copy_(lora.up)
            self.pairs += [(lora.down, a), (lora.up, b)]

    def reference_loss(self, batch):
        """Written out, without our objective, loss or adapters."""
        z = (batch.latent_mean + batch.latent_std * batch.vae_noise).to(self.dtype) * 0.18215
        noise = (batch.noise + self.offset * batch.offset_noise).to(self.dtype)
        t = (batch.u * 1000).floor().long()
        a = self.alphas[t].to(self.dtype).view(-1, 1, 1, 1)
        noisy = a**0.5 * z + (1 - a) ** 0.5 * noise
        target = {"epsilon": noise, "sample": z, "v_prediction": a**0.5 * noise - (1 - a) ** 0.5 * z}[self.prediction]
        pred = self.twin(noisy, t, encoder_hidden_states=self.hidden[: len(t)]).sample
        loss = (pred - target) ** 2
        if batch.mask is not None:
            loss = loss * batch.mask
        loss = loss.mean((1, 2, 3))
        if self.gamma is not None:
            snr = self.alphas[t] / (1 - self.alphas[t])
            divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.prediction]
            loss = loss * torch.minimum(snr, torch.full_like(snr, self.gamma)) / divisor
        return (loss * batch.weights).sum()


CASES = {
    "epsilon": {}, "v-prediction": {"prediction": "v_prediction"}, "sample": {"prediction": "sample"}, "noise offset": {"offset": 0.1},
    "min-snr epsilon": {"gamma": 5.0}, "min-snr v": {"prediction": "v_prediction", "gamma": 5.0}, "min-snr sample": {"prediction": "sample", "gamma": 2.0},
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_a_plain_loop_with_peft(name):
    setup = Setup(**CASES[name])
    ours_opt = torch.optim.AdamW(optimizer_groups(setup.trainable.param_groups(), 1.0))
    peft_opt = torch.optim.AdamW([p for _, p in setup.pairs], lr=1e-2)
    for step in range(3):
        batch = make_batch(seed=step, weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
        ours, reference = setup.step.loss(batch), setup.reference_loss(batch)
        assert ours.item() == pytest.approx(reference.item(), rel=1e-9)
        ours_opt.zero_grad()
        peft_opt.zero_grad()
        ours.backward()
        reference.backward()
        for mine, theirs in setup.pairs:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
        ours_opt.step()
        peft_opt.step()


def test_fp32_agrees_to_1e_5():
    setup = Setup(dtype=torch.float32)
    batch = make_batch(dtype=torch.float32)
    ours, reference = setup.step.loss(batch), setup.reference_loss(batch)
    ours.backward()
    reference.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)
    flat = [torch.cat([grad.flatten() for grad in grads]) for grads in zip(*((m.grad, t.grad) for m, t in setup.pairs))]
    assert (flat[0] - flat[1]).norm() / flat[1].norm() < 1e-5


def test_a_mask_weighs_the_loss_per_pixel():
    setup = Setup()
    mask = torch.rand(3, 1, 8, 8)
    batch = make_batch(mask=mask)
    assert setup.step.loss(batch).item() == pytest.approx(setup.reference_loss(batch).item(), rel=1e-9)
    assert setup.step.loss(make_batch(mask=torch.zeros(3, 1, 8, 8))).item() == 0


def test_micro_batches_with_the_plans_weights_add_up_to_the_whole():
    setup = Setup()
    whole = make_batch(3)
    parts = []
    for i in range(3):
        index = slice(i, i + 1)
        part = Batch(*[value[index] if isinstance(value, (torch.Tensor, tuple, list)) else value for value in vars(whole).values()])
        hidden, setup.hidden = setup.hidden, setup.hidden[index]
        parts.append(setup.step.loss(part))
        setup.hidden = hidden
    assert sum(parts).item() == pytest.approx(setup.step.loss(whole).item(), rel=1e-9)


def test_dropout_depends_on_the_batchs_seed_alone_and_leaves_the_generator_alone():
    setup = Setup(dropout=0.5)
    batch = make_batch()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = setup.step.loss(batch)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert setup.step.loss(batch).item() == first.item()
    batch.module_seed += 1
    assert setup.step.loss(batch).item() != first.item()


def test_gradients_land_in_the_flat_buffer_and_nowhere_else():
    setup = Setup(dtype=torch.float32)
    gradients = Gradients(setup.trainable.param_groups(), torch.device("cpu"))
    setup.step.loss(make_batch(dtype=torch.float32)).backward()
    assert gradients.values.abs().sum() > 0
    with_grad = {name for name, p in setup.unet.named_parameters() if p.grad is not None}
    assert with_grad == {f"{path}.adapter.{part}" for path in setup.trainable.adapters for part in ("down", "up")}


def test_text_encoder_lora_learns_through_the_unet():
    torch.manual_seed(0)
    family = StableDiffusion()
    models = Models(family, None, "tiny", {"unet": make_unet().requires_grad_(False), "text_encoder": make_text_encoder().requires_grad_(False)}, {}, {},
                    {"latent_scale": 0.18215, "latent_shift": 0.0})
    trainable = LoraTrainable(family.components[1], [LoraGroup(lr=1e-3, rank=2, layers=["re:.*self_attn$", "re:.*mlp$"])], "lora_text_encoder")
    trainable.attach(models, 0)
    for lora in trainable.adapters.values():
        torch.nn.init.normal_(lora.up)
    ids = torch.randint(0, 1000, (3, 1, 77))
    step = DenoisingStep(models, DiscreteObjective(torch.linspace(0.99, 0.01, 1000)), make_loss("mse", 1.0),
                         lambda prompts: family.encode_text(models, SimpleNamespace(ids=(ids,))), torch.device("cpu"), torch.float32)
    step.loss(make_batch(dtype=torch.float32)).backward()
    assert len(trainable.adapters) == 18
    assert all(p.grad.abs().sum() > 0 for lora in trainable.adapters.values() for p in lora.parameters())
    assert set(trainable.export()) == {f"text_model.{path}" for path in trainable.adapters}

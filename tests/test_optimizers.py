"""Every optimizer that ships an example: it moves the weights, and a run resumed from its state ends in the same bits."""

from types import SimpleNamespace

import pytest
import torch
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from test_trainer import Place, ToyFeed
from torch import nn

from hcpdiff.adapters.lora import Lora
from hcpdiff.checkpoint.resume import load_state, save_state
from hcpdiff.errors import CheckpointError
from hcpdiff.train.optim import Gradients, optimizer_groups, weights_for_use
from hcpdiff.train.signals import StopRequest
from hcpdiff.train.state import restore, training_state
from hcpdiff.train.trainer import Trainer
from hcpdiff.trainables.lora import ParamGroup

OPTIMIZERS = {
    "AdamW": torch.optim.AdamW, "SGD momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9), "Adafactor": torch.optim.Adafactor,
    "Prodigy": lambda groups: Prodigy(groups, safeguard_warmup=True, use_bias_correction=True), "schedule-free": lambda groups: AdamWScheduleFree(groups, warmup_steps=2),
}


def make(name: str, steps: int):
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).requires_grad_(False)
    lora = Lora(layer, 2, 2)
    lora.reset(torch.rand(lora.down.shape))
    nn.init.normal_(lora.up)
    group = ParamGroup("w", 0.05, (lora.down, lora.up))
    optimizer = OPTIMIZERS[name](optimizer_groups([group], 1.0))
    if hasattr(optimizer, "train"):
        optimizer.train()
    trainer = Trainer(feed=ToyFeed(), loss=lambda x: (lora(x[None], layer) - 1).square().sum(), gradients=Gradients([group], torch.device("cpu")), optimizer=optimizer,
                      lr_factor=lambda step: 1.0, parallel=SimpleNamespace(rank=0, world=1, sum_=lambda t: t), hooks=[], total_steps=steps, max_grad_norm=1.0,
                      max_nonfinite=3, fp16=False)
    trainer.state.positions = [Place(0, 0)]
    return trainer, SimpleNamespace(component=SimpleNamespace(name="unet"), adapters={"layer": lora}, key="lora_unet", group_of={"layer": 0}, groups=[0]), lora


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_in_the_same_bits(name, tmp_path):
    whole, _, expected = make(name, 8)
    start = expected.up.detach().clone()
    whole.fit(StopRequest())
    first, trainable, _ = make(name, 5)
    first.fit(StopRequest())
    save_state(tmp_path, 5, training_state(first, [trainable]), keep=1)
    second, trainable, lora = make(name, 8)
    restore(second, [trainable], load_state(tmp_path), Place)
    assert second.state.step == 5
    second.fit(StopRequest())
    assert not torch.equal(start, expected.up)
    assert torch.equal(lora.up, expected.up) and torch.equal(lora.down, expected.down)
    with weights_for_use(whole.optimizer), weights_for_use(second.optimizer):
        assert torch.equal(lora.up, expected.up)


def test_schedule_free_saves_other_weights_than_it_trains():
    trainer, _, lora = make("schedule-free", 6)
    trainer.fit(StopRequest())
    training = lora.up.detach().clone()
    with weights_for_use(trainer.optimizer):
        assert not torch.equal(training, lora.up)
    torch.testing.assert_close(training, lora.up.detach())


def test_a_state_of_other_layers_is_refused_and_changes_nothing(tmp_path):
    trainer, trainable, _ = make("AdamW", 2)
    trainer.fit(StopRequest())
    state = training_state(trainer, [trainable])
    other, wanted, lora = make("AdamW", 4)
    wanted.adapters = {"another": lora}
    before = lora.up.detach().clone()
    with pytest.raises(CheckpointError, match="LoRA layers are new in lora_unet") as caught:
        restore(other, [wanted], state, Place)
    assert len(caught.value.faults) == 2 and torch.equal(before, lora.up)


def test_groups_in_another_order_are_refused_since_optimizers_know_places_only():
    trainer, trainable, lora = make("AdamW", 2)
    trainable.adapters, trainable.group_of, trainable.groups = {"a": lora, "b": lora}, {"a": 0, "b": 1}, [0, 0]
    state = training_state(trainer, [trainable])
    trainable.group_of = {"a": 1, "b": 0}
    with pytest.raises(CheckpointError, match="other groups"):
        restore(trainer, [trainable], state, Place)


def test_an_option_that_needs_more_state_than_was_saved_is_refused_and_changes_nothing():
    trainer, trainable, _ = make("AdamW", 2)
    trainer.fit(StopRequest())
    state = training_state(trainer, [trainable])
    other, trainable, lora = make("AdamW", 4)
    other.optimizer.param_groups[0]["amsgrad"] = True
    before = lora.up.detach().clone()
    with pytest.raises(CheckpointError, match="needs max_exp_avg_sq, which the saved state does not hold"):
        restore(other, [trainable], state, Place)
    assert torch.equal(before, lora.up) and not other.optimizer.state


def test_settings_of_the_run_that_goes_on_hold_and_what_was_learnt_is_the_states():
    trainer, trainable, _ = make("AdamW", 2)
    trainer.fit(StopRequest())
    trainer.optimizer.param_groups[0]["unnamed"] = 1  # what the class does not take by name: learnt, unless the config sets it
    state = training_state(trainer, [trainable])
    for options, unnamed in (((), 1), (("unnamed",), 2)):
        other, trainable, _ = make("AdamW", 4)
        other.optimizer.param_groups[0] |= {"weight_decay": 0.5, "unnamed": 2}
        restore(other, [trainable], state, Place, frozenset(options))
        assert (other.optimizer.param_groups[0]["weight_decay"], other.optimizer.param_groups[0]["unnamed"]) == (0.5, unnamed)

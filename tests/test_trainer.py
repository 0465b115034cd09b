"""The loop on a toy problem: accumulation, skipped steps, states that restore, the run folder."""

import math
import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hcpdiff.checkpoint.resume import load_state, save_state
from hcpdiff.checkpoint.runs import find_run, states
from hcpdiff.errors import CheckpointError, ConfigError, DataError, FeedError, HCPError, Interrupted, NonFiniteError
from hcpdiff.train import signals
from hcpdiff.train.folder import check, claim
from hcpdiff.train.optim import Gradients, optimizer_groups, weights_for_use
from hcpdiff.train.signals import StopRequest
from hcpdiff.train.trainer import Hook, Trainer
from hcpdiff.trainables.lora import ParamGroup


@dataclass
class Place:
    epoch: int
    chunk: int


class ToyFeed:
    """Batch i of step s is the number s * 10 + i; `bad` steps give infinity."""

    def __init__(self, micro=2, bad=()):
        self.micro, self.bad = micro, bad

    def batches(self, start, rank, world, first_index, count):
        for step in range(first_index, first_index + count):
            scale = math.inf if step in self.bad else 1.0
            yield step, [Place(step // 4, step % 4)], [torch.full((3,), scale * (step * 10 + i) / 50) for i in range(self.micro)]

    def names(self, step, world):
        return [[[(f"{step}.{i}", 1.0)] for i in range(self.micro)]]


def toy(steps=6, bad=(), hooks=(), fp16=False, max_nonfinite=3, make=torch.optim.AdamW, lag=None):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3))
    group = ParamGroup("w", 0.1, (weight,))
    gradients = Gradients([group], torch.device("cpu"))
    trainer = Trainer(feed=ToyFeed(bad=bad), loss=lambda x: ((weight - x) ** 2).sum() / 2, gradients=gradients, optimizer=make(optimizer_groups([group], 1.0)),
                      lr_factor=lambda step: 1 / (step + 1), parallel=SimpleNamespace(rank=0, world=1, sum_=lambda t: t, gather=lambda value: [value]), hooks=hooks, total_steps=steps,
                      max_grad_norm=1.0, max_nonfinite=max_nonfinite, fp16=fp16, lag=lag)
    trainer.state.positions = [Place(0, 0)]
    return trainer, weight


def test_the_loop_is_the_plain_loop():
    trainer, weight = toy()
    torch.manual_seed(0)
    twin = nn.Parameter(torch.randn(3))
    optimizer, losses = torch.optim.AdamW([twin], lr=0.1), []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.zero_grad()
        loss = sum(((twin - (step * 10 + i) / 50) ** 2).sum() / 2 for i in range(2))
        loss.backward()
        nn.utils.clip_grad_norm_([twin], 1.0)
        optimizer.step()
        losses.append(loss.item())
    trainer.fit(StopRequest())
    torch.testing.assert_close(weight, twin)
    records = trainer.take_records()
    assert [step for step, _ in records] == [1, 2, 3, 4, 5, 6]
    assert [values["loss"] for _, values in records] == pytest.approx(losses)
    assert [values["lr/w"] for _, values in records] == pytest.approx([0.1 / n for n in range(1, 7)])
    assert trainer.take_records() == []


def test_the_loss_scale_does_not_change_the_result():
    plain, scaled = toy()[0], toy(fp16=True)[0]
    plain.fit(StopRequest()), scaled.fit(StopRequest())
    torch.testing.assert_close(plain.gradients.parameters[0], scaled.gradients.parameters[0])


def test_epochs_are_announced_also_inside_one():
    epochs = []

    class Watch(Hook):
        def on_epoch_begin(self, trainer, epoch):
            epochs.append((trainer.state.step, epoch))

    toy(steps=9, hooks=[Watch()])[0].fit(StopRequest())
    assert epochs == [(0, 0), (5, 1)]


TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=5) | st.integers(0, 99), inner, max_size=3), max_leaves=12)


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_states_come_back_as_they_were(tmp_path_factory, tree):
    run = tmp_path_factory.mktemp("run")
    tensors = {"a": torch.randn(2, 3), "b": [torch.tensor(5, dtype=torch.int64), torch.zeros(0)]}
    save_state(run, 7, {"tree": tree, "tensors": tensors, "step": 7}, keep=2)
    back = load_state(run)
    assert back["tree"] == tree and type(back["tree"]) is type(tree)
    assert torch.equal(back["tensors"]["a"], tensors["a"]) and torch.equal(back["tensors"]["b"][0], tensors["b"][0])


def test_only_the_newest_states_are_kept_and_the_newest_is_loaded(tmp_path):
    for step in (1, 5, 10):
        save_state(tmp_path, step, {"step": step}, keep=2)
    assert states(tmp_path) == [5, 10] and load_state(tmp_path)["step"] == 10
    assert not list((tmp_path / "states").glob(".*"))


def test_a_state_that_cannot_be_held_or_read_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        save_state(tmp_path, 1, {"x": object()}, keep=2)
    assert states(tmp_path) == []
    with pytest.raises(ConfigError, match="holds no training state"):
        load_state(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        find_run(str(tmp_path / "nowhere"))


def test_latest_is_the_newest_resumable_run(tmp_path):
    (tmp_path / "c").mkdir()
    for name in ("b", "a"):
        save_state(tmp_path / name, 3, {"step": 3}, keep=1)
    assert find_run("latest", tmp_path) == (tmp_path / "a", None)
    assert find_run(str(tmp_path / "b" / "states" / "3")) == (tmp_path / "b", 3)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="rights are given up as POSIX does it")
def test_a_run_folder_below_one_of_somebody_else_is_a_mistake_and_no_bug(tmp_path):
    user = os.geteuid()
    tmp_path.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(ConfigError, match="exp_dir = .* cannot be looked at: Permission denied"):
            check(str(tmp_path / "theirs" / "run"), automatic=False)
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


def test_a_chosen_folder_must_be_new_and_an_automatic_one_gets_a_suffix(tmp_path):
    chosen = tmp_path / "run"
    claim(str(chosen), automatic=False)[1].release()
    with pytest.raises(ConfigError, match="not empty. Choose another .it holds no training state"):
        claim(str(chosen), automatic=False)
    save_state(chosen, 1, {"step": 1}, keep=1)
    with pytest.raises(ConfigError, match="not empty. Choose another, or go on there with train.resume="):
        claim(str(chosen), automatic=False)
    assert claim(str(chosen), automatic=True)[0].name == "run-2"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        claim(str(tmp_path / "file" / "run"), automatic=False)


def test_schedule_free_optimizers_show_their_other_weights(monkeypatch):
    calls = []
    optimizer = SimpleNamespace(eval=lambda: calls.append("eval"), train=lambda: calls.append("train"))
    with weights_for_use(optimizer):
        calls.append("use")
    assert calls == ["eval", "use", "train"]


def test_the_probe_changes_nothing():
    from test_step_reference import Setup

    from hcpdiff.train.probe import probe

    setup = Setup(dtype=torch.float32)
    groups = setup.trainable.param_groups()
    before = {path: (lora.down.detach().clone(), lora.up.detach().clone()) for path, lora in setup.trainable.adapters.items()}
    trainer, _ = toy()
    trainer.gradients, trainer.loss = Gradients(groups, torch.device("cpu")), setup.step.loss
    random = torch.get_rng_state()
    assert "largest batch (3 x 64 x 64) fits" in probe(trainer, (3, 64, 64), (8, 4))
    assert trainer.gradients.flat.abs().sum() == 0 and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(lora.down, before[path][0]) and torch.equal(lora.up, before[path][1]) for path, lora in setup.trainable.adapters.items())


def test_every_tensor_of_the_probes_batch_has_memory_of_its_own_for_each_number():
    """A copy into page-locked memory keeps strides: into a tensor whose rows are one row nothing can be written."""
    from hcpdiff.train.probe import blank_batch

    tensors = [value for value in vars(blank_batch((3, 64, 64), (8, 4))).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 8
    for tensor in tensors:
        tensor.copy_(tensor.clone())


def test_a_signal_finishes_the_step_and_a_second_one_stops_at_once(monkeypatch):
    stops = []

    class Watch(Hook):
        def on_step_end(self, trainer):
            if trainer.state.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_stop(self, trainer):
            stops.append(trainer.state.step)

    trainer, _ = toy(steps=6, hooks=[Watch()])
    with StopRequest() as stop:
        assert trainer.fit(stop) is False
        assert stops == [3] and stop.signal == signal.SIGTERM
        while not stop._first:  # its thread has not seen the first one yet
            time.sleep(0.01)
        monkeypatch.setattr(signals, "PATIENCE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("first, told", [(True, []), (False, [(15, 2)])], ids=["in_the_first_step", "later"])
def test_a_signal_is_answered_at_once_while_its_step_goes_on_and_ends_a_run_that_has_nothing_to_keep(first, told):
    """From the thread that hears of it: the step may take minutes."""
    answers, answered = [], threading.Event()

    def answer(number):
        answers.append((number, trainer.state.step + 1))
        answered.set()

    trainer, _ = toy(steps=6)
    plain, left = trainer.loss, [2, 1] if not first else [0, 3]  # micro-batches before the signal, and those of its step after it

    def loss(batch):
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), signal.SIGTERM)
            answered.wait(0 if first else 30)
        return plain(batch)

    trainer.loss = loss
    with StopRequest() as stop:
        stop.told = answer
        with pytest.raises(Interrupted, match="stopped by SIGTERM") if first else nullcontext():
            assert trainer.fit(stop) is False
    assert answers == told and trainer.state.step == (0 if first else 2)


def test_a_first_signal_that_meets_a_long_call_outside_of_steps_stops_the_run_after_it(monkeypatch):
    """Its thread hears of it before Python's handler: the run still ends with its reason, and not first by force."""
    heard = threading.Event()
    arrived = StopRequest._arrived
    monkeypatch.setattr(StopRequest, "_arrived", lambda self, number: (arrived(self, number), heard.set()))
    with StopRequest() as stop, pytest.raises(Interrupted, match="stopped by SIGTERM"):
        came = stop._came
        signal.signal(signal.SIGTERM, lambda number, frame: (heard.wait(30), came(number, frame)))  # as late as after a call that takes seconds
        os.kill(os.getpid(), signal.SIGTERM)


class Lossy(ToyFeed):
    """Cannot make the batches of the step with the (0-based) number `missing`."""

    def __init__(self, missing, error=DataError("cat.jpg: the file is gone")):
        super().__init__()
        self.missing, self.error = missing, error

    def batches(self, start, rank, world, first_index, count):
        for item in super().batches(start, rank, world, first_index, count):
            if item[0] == self.missing:
                raise self.error
            yield item


@pytest.mark.parametrize("lag, fp16", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("missing, told", [(0, []), (4, [4])])
def test_a_batch_that_cannot_be_made_ends_the_run_after_what_was_done_is_told(lag, fp16, missing, told):
    faults = []

    class Watch(Hook):
        def on_fault(self, trainer):
            trainer.settle()
            faults.append(trainer.state.step)

    trainer, weight = toy(steps=6, hooks=[Watch()], lag=lag, fp16=fp16)
    trainer.feed = Lossy(missing)
    with pytest.raises(FeedError, match="cat.jpg: the file is gone"):
        trainer.fit(StopRequest())
    twin, other = toy(steps=missing, fp16=fp16)
    twin.fit(StopRequest())
    assert faults == told and torch.equal(weight, other) and trainer.pending is None
    assert torch.equal(trainer.loss_scale.pair, twin.loss_scale.pair) and [step for step, _ in trainer.take_records()] == list(range(1, missing + 1))


@pytest.mark.parametrize("lag", [False, True])
def test_an_overflow_in_a_step_for_which_another_process_had_no_batch_leaves_the_loss_scale(lag):
    def overflow(flat):
        flat[:3] += math.inf if flat[-1] else 0.0  # the other process has a batch
        return flat

    trainer, weight = toy(steps=6, lag=lag, fp16=True)
    trainer.feed, trainer.parallel.sum_ = Lossy(4), overflow
    with pytest.raises(FeedError):
        trainer.fit(StopRequest())
    twin, other = toy(steps=4, fp16=True)
    twin.fit(StopRequest())
    assert torch.equal(weight, other) and torch.equal(trainer.loss_scale.pair, twin.loss_scale.pair) and trainer.loss_scale.value == twin.loss_scale.value


@pytest.mark.parametrize("full", [False, True], ids=["kept", "not_kept"])
def test_a_fault_of_ours_in_the_feed_costs_no_finished_step_either(full):
    kept = []

    class Keeper(Hook):
        def on_fault(self, trainer):
            kept.append(trainer.state.step)
            if full:
                raise CheckpointError("no space is left")

    trainer, _ = toy(steps=6, hooks=[Keeper()])
    trainer.feed = Lossy(4, ZeroDivisionError("of ours"))
    with pytest.raises(ZeroDivisionError, match="of ours") as caught:
        trainer.fit(StopRequest())
    assert kept == [4] and getattr(caught.value, "__notes__", []) == ["no space is left"] * full


@pytest.mark.parametrize("lost", [DataError("cat.jpg: the file is gone"), ZeroDivisionError("of ours")], ids=["image", "ours"])
def test_an_error_of_ours_while_the_steps_are_kept_has_why_there_is_no_batch_as_its_cause(lost):
    class Keeper(Hook):
        def on_fault(self, trainer):
            raise OSError("the disk is gone")

    trainer, _ = toy(steps=6, hooks=[Keeper()])
    trainer.feed = Lossy(4, lost)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        trainer.fit(StopRequest())
    assert caught.value.__cause__ is lost


def test_no_memory_to_keep_the_steps_is_told_beside_why_there_is_no_batch():
    class Keeper(Hook):
        def on_fault(self, trainer):
            raise torch.OutOfMemoryError("no room")

    trainer, _ = toy(steps=6, hooks=[Keeper()])
    trainer.feed = Lossy(4)
    with pytest.raises(HCPError) as caught:
        trainer.fit(StopRequest())
    assert caught.value.faults == ["cat.jpg: the file is gone", "step 4 could not be saved: out of memory."]


def test_weights_that_are_not_finite_when_a_batch_is_lost_end_with_their_own_exit_code():
    class Keeper(Hook):
        def on_fault(self, trainer):
            raise NonFiniteError("step 4 is not saved")

    trainer, _ = toy(steps=6, hooks=[Keeper()])
    trainer.feed = Lossy(4)
    with pytest.raises(HCPError) as caught:
        trainer.fit(StopRequest())
    assert caught.value.exit_code == 3 and caught.value.faults == ["cat.jpg: the file is gone", "step 4 is not saved"]


def test_an_error_of_a_step_is_none_of_its_batch():
    def fail(batch):
        raise DataError("in the step")

    trainer, _ = toy(steps=6, hooks=[Hook()])
    trainer.loss = fail
    with pytest.raises(DataError) as caught:
        trainer.fit(StopRequest())
    assert type(caught.value) is DataError


def test_a_signal_in_the_last_step_changes_nothing():
    trainer, _ = toy(steps=1)
    stop = StopRequest()
    stop.signal = 2
    assert trainer.fit(stop) is True

"""Numbers are watched: a step that is not finite changes nothing, is counted and named, and the host waits for no device to know it."""

import io
import math
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prodigyopt import Prodigy
from rich.console import Console
from schedulefree import AdamWScheduleFree
from test_step_reference import Setup, make_batch
from test_trainer import Place, ToyFeed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hcpdiff.errors import NonFiniteError
from hcpdiff.loggers.console import ConsoleLogger, progress_line
from hcpdiff.train.hooks import LogHook, Periodic, Usual
from hcpdiff.train.optim import Gradients, optimizer_groups
from hcpdiff.train.signals import StopRequest
from hcpdiff.train.trainer import Hook, Trainer
from hcpdiff.train.undo import Undo
from hcpdiff.trainables.lora import ParamGroup


class EightBit(torch.optim.Optimizer):
    """Momentum in bytes with a scale of its own, counters in Python, a history in a list, a tensor that is replaced and one in the group."""

    def __init__(self, groups):
        super().__init__(groups, {"k": 0, "seen": None, "lr": 1.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["k"] += 1
            group["seen"] = torch.zeros(()) if group["seen"] is None else group["seen"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(bytes=torch.full(p.shape, 128, dtype=torch.uint8), scale=torch.ones(()), n=0, history=[torch.zeros(2), {"last": 0.0}])
                momentum = 0.9 * (state["bytes"].float() - 128) / 127 * state["scale"] + p.grad
                state["scale"] = momentum.abs().max()
                state["bytes"].copy_((momentum / state["scale"] * 127 + 128).nan_to_num(7).clamp(0, 255).to(torch.uint8))
                state["n"] += 1
                state["history"][0] += p.grad.sum()
                state["history"][1]["last"] = float(p.grad.sum())
                group["seen"] += p.grad.sum()
                p -= group["lr"] / (group["k"] + state["n"]) * momentum


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW, "AdamW fused": lambda g: torch.optim.AdamW(g, fused=True), "Adafactor": torch.optim.Adafactor,
    "SGD momentum": lambda g: torch.optim.SGD(g, momentum=0.9), "Prodigy": lambda g: Prodigy(g, safeguard_warmup=True, use_bias_correction=True),
    "schedule-free": lambda g: AdamWScheduleFree(g, warmup_steps=2), "8-bit": EightBit,
}


def test_numbers_are_read_also_from_a_device_that_numpy_does_not_see():
    """Apple's: neither a CPU nor one that works ahead."""
    trainer = make()
    trainer.fit(StopRequest())
    numbers = trainer.watch.buffer

    def refuse():
        raise TypeError("can't convert mps:0 device type tensor to numpy")

    trainer.watch.buffer = SimpleNamespace(cpu=lambda: numbers, numpy=refuse)
    assert trainer.watch.read().loss == float(numbers[-7])


class Spoiled(torch.autograd.Function):
    """The identity, with a gradient that is not finite where it is told to be."""

    @staticmethod
    def forward(ctx, x, spoil):
        ctx.spoil = spoil
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.spoil, None


def make(name="AdamW", steps=6, bad=(), lag=False, fp16=False, hooks=(), max_nonfinite=99, feed=None, gradient_only=False, spoil=math.inf, max_grad_norm=1.0, **run):
    """A trainer of two small parameters; `bad` steps are not finite, in loss and gradient or in the gradient only (fp16: where scale x gradient > `spoil`)."""
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 3))
    group = ParamGroup("w", 0.1, (a, b))
    optimizer = OPTIMIZERS[name](optimizer_groups([group], 1.0))
    getattr(optimizer, "train", lambda: None)()

    def loss(x):
        weights = a
        if gradient_only and not torch.isfinite(x).all():
            x, weights = torch.ones(3), Spoiled.apply(a, torch.tensor(math.inf if trainer.loss_scale.pair[0] > spoil else 1.0))
        return ((weights + b.sum(0) - x) ** 2).sum() / 2

    trainer = Trainer(feed=feed or ToyFeed(bad=bad), loss=loss, gradients=Gradients([group], torch.device("cpu"), micro=2), optimizer=optimizer, lr_factor=lambda step: 1.0,
                      parallel=SimpleNamespace(rank=0, world=1, sum_=lambda t: t), hooks=hooks, total_steps=steps, max_grad_norm=max_grad_norm,
                      max_nonfinite=max_nonfinite, fp16=fp16, lag=lag, **run)
    trainer.state.positions = [Place(0, 0)]
    return trainer


def bits(trainer):
    """Everything that a run carries on, as comparable plain data: tensors as bytes."""
    trainer.settle()

    def plain(tree):
        if isinstance(tree, torch.Tensor):
            return tree.detach().contiguous().flatten().view(torch.uint8).tolist()
        if isinstance(tree, dict):
            return {key: plain(value) for key, value in tree.items()}
        return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree

    scale = [trainer.loss_scale.value, trainer.loss_scale.clean, *trainer.loss_scale.pair.tolist()]
    return [plain(trainer.gradients.parameters), plain(trainer.optimizer.state_dict()), vars(trainer.state) | {"positions": None}, scale]


class Without(ToyFeed):
    """The same steps, without the bad ones."""

    def batches(self, start, rank, world, first_index, count):
        for step in range(first_index, first_index + count + len(self.bad)):
            if step not in self.bad:
                yield step, [Place(0, 0)], [torch.full((3,), (step * 10 + i) / 50) for i in range(self.micro)]


# ---- nothing changes -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [(0,), (2, 3, 5), (0, 1, 7)], ids=str)
def test_a_run_with_bad_steps_is_the_run_without_them_bit_for_bit(name, bad, lag):
    """The first step too, in which optimizers make their state, and the last."""
    spoiled, twin = make(name, 8, bad, lag), make(name, 8 - len(bad), feed=Without(bad=bad))
    spoiled.fit(StopRequest()), twin.fit(StopRequest())
    ours, expected = bits(spoiled), bits(twin)
    assert ours[:2] == expected[:2] and all(torch.isfinite(p).all() for p in spoiled.gradients.parameters)
    assert spoiled.state.skipped == len(bad) and spoiled.state.scale_skips == 0 and spoiled.state.skipped_in_row == (1 if 7 in bad else 0)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(OPTIMIZERS)), st.sets(st.integers(0, 9)), st.booleans(), st.booleans(), st.sampled_from([None, 1.0]))
def test_what_the_host_learns_late_changes_nothing(name, bad, gradient_only, look, norm):
    """Weights, optimizer state, counters and records are those of a run that looks at once, also where a hook looks ahead at each step."""
    looking = Hook()
    looking.on_step_end = lambda trainer: trainer.settle()
    runs = [make(name, 10, bad, lag, gradient_only=gradient_only, hooks=[looking] if lag and look else [], max_grad_norm=norm) for lag in (False, True)]
    for trainer in runs:
        trainer.fit(StopRequest())
    assert bits(runs[0]) == bits(runs[1])
    first, second = (trainer.take_records() for trainer in runs)
    assert str(first) == str(second) and [step for step, _ in first] == list(range(1, 11))
    assert [str(skip) for skip in runs[0].take_skips()] == [str(skip) for skip in runs[1].take_skips()]


def test_counters_in_tensors_of_the_host_are_put_back():
    """As on a GPU, where Adam's `step` stays on the CPU: scalars count as the host's here."""
    for name in ("AdamW", "Adafactor", "8-bit", "schedule-free"):
        spoiled, twin = make(name, 8, (1, 4, 5), lag=True), make(name, 5, feed=Without(bad=(1, 4, 5)))
        spoiled.undo = Undo(spoiled.optimizer, spoiled.gradients.parameters, on_host=lambda tensor: tensor.dim() == 0)
        spoiled.fit(StopRequest()), twin.fit(StopRequest())
        assert bits(spoiled)[:2] == bits(twin)[:2]


def test_tensors_that_are_not_contiguous_or_change_their_memory_are_taken_back():
    class Moving(torch.optim.Optimizer):
        """Its state is transposed, and its parameters get new memory at each step."""

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state.setdefault("sum", torch.zeros(*p.shape, 2).transpose(0, -1))
                    state["sum"] += p.grad.sum()
                    p.data = p.data - 0.01 * (p.grad + state["sum"].mean())

    OPTIMIZERS["moving"] = lambda groups: Moving(groups, {})
    spoiled, twin = make("moving", 6, (2, 3), lag=True), make("moving", 4, feed=Without(bad=(2, 3)))
    spoiled.fit(StopRequest()), twin.fit(StopRequest())
    assert bits(spoiled)[:2] == bits(twin)[:2]
    del OPTIMIZERS["moving"]


def test_a_large_state_is_compared_in_pieces(monkeypatch):
    monkeypatch.setattr("hcpdiff.train.undo._CHUNK", 4)
    spoiled, twin = make("AdamW", 6, (2, 3), lag=True), make("AdamW", 4, feed=Without(bad=(2, 3)))
    spoiled.fit(StopRequest()), twin.fit(StopRequest())
    assert bits(spoiled)[:2] == bits(twin)[:2]


@pytest.mark.parametrize("lag", [False, True])
def test_too_many_in_a_row_end_the_run_with_a_code_of_their_own(lag):
    told, saved = [], []

    class Watching(Hook):
        def on_step_end(self, trainer):
            trainer.settle()  # a hook of rank 0 that sees the end coming must not end the run alone
            saved.append(trainer.state.step)

        def on_nonfinite(self, trainer):
            told.append([step for step, _ in trainer.take_records()])

    trainer = make(steps=9, bad=(1, 3, 4, 5), lag=lag, max_nonfinite=3, hooks=[Watching()])
    with pytest.raises(NonFiniteError, match=r"3 steps in a row.*step 6 changed nothing.*5\.0 \(inf\), 5\.1 \(inf\)") as caught:
        trainer.fit(StopRequest())
    assert caught.value.exit_code == 3 and all(torch.isfinite(p).all() for p in trainer.gradients.parameters)
    assert told == [[1, 2, 3, 4, 5, 6]] and trainer.state.skipped == 4 and saved[-1] == (6 if lag else 5)


@pytest.mark.parametrize("lag", [False, True])
def test_the_last_steps_may_end_the_run_too(lag):
    ends = Hook()
    ends.on_end = lambda trainer: pytest.fail("a run that failed was ended as if it had not")
    with pytest.raises(NonFiniteError):
        make(steps=3, bad=(1, 2), lag=lag, max_nonfinite=2, hooks=[ends]).fit(StopRequest())


def test_a_stop_is_heard_one_step_later_at_most():
    for lag, expected in ((False, 3), (True, 4)):
        stop = StopRequest()
        asks = Hook()
        asks.on_step_end = lambda trainer: setattr(stop, "signal", 2 if trainer.state.step == 2 else stop.signal)
        trainer = make(steps=9, lag=lag, hooks=[asks])
        assert trainer.fit(stop) is False and trainer.state.step == expected
        assert bits(trainer)[:2] == bits(fitted(make(steps=expected)))[:2]


def fitted(trainer):
    trainer.fit(StopRequest())
    return trainer


# ---- fp16 ------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lag", [False, True])
def test_overflow_halves_the_scale_and_is_no_fault(lag):
    trainer = fitted(make(steps=8, bad=range(8), fp16=True, lag=lag, gradient_only=True, spoil=5000.0, max_nonfinite=2))
    assert trainer.loss_scale.value == 4096 and trainer.loss_scale.clean == 4
    assert (trainer.state.scale_skips, trainer.state.skipped, trainer.state.skipped_in_row) == (4, 0, 0) and trainer.take_skips() == []
    assert [values["loss_scale"] for _, values in trainer.take_records()] == [65536, 32768, 16384, 8192, 4096, 4096, 4096, 4096]


@pytest.mark.parametrize("lag", [False, True])
def test_a_scale_of_one_that_still_overflows_is_a_fault(lag):
    trainer = make(steps=40, bad=range(40), fp16=True, lag=lag, gradient_only=True, spoil=0.5, max_nonfinite=5)
    with pytest.raises(NonFiniteError, match="gradient is not finite"):
        trainer.fit(StopRequest())
    assert trainer.loss_scale.value == 1 and trainer.state.scale_skips == 16 and trainer.state.skipped == 5


@pytest.mark.parametrize("lag", [False, True])
def test_a_loss_that_is_not_finite_is_not_the_scales_doing(lag):
    trainer = make(steps=9, bad=(2, 3, 4), fp16=True, lag=lag, max_nonfinite=3)
    with pytest.raises(NonFiniteError):
        trainer.fit(StopRequest())
    assert (trainer.loss_scale.value, trainer.loss_scale.clean, trainer.state.scale_skips) == (65536, 2, 0)


def test_the_scale_doubles_after_two_thousand_clean_steps():
    for lag in (False, True):
        trainer = make(steps=3, fp16=True, lag=lag)
        trainer.loss_scale.load(1024.0, 1998)
        assert bits(fitted(trainer))[3] == [2048.0, 2001, 2048.0, 2001.0]


# ---- names -----------------------------------------------------------------------------------------------------------------------------------------

class Once:
    """A feed of one step: this rank's batches, and what all ranks' are called."""

    def __init__(self, micro, weights=None):
        self.micro = micro

    def batches(self, start, rank, world, first_index, count):
        yield 0, [Place(0, 1)], self.micro[rank]

    def names(self, step, world):
        return [[[(f"r{rank}m{number}s{name}", 1 / 3) for name in batch.ids] for number, batch in enumerate(micro)] for rank, micro in enumerate(self.micro)]


def one_step(micro, rank=0, sum_=lambda t: t, losses=None):
    setup = Setup(dtype=torch.float32)
    groups = setup.trainable.param_groups()
    gradients = Gradients(groups, torch.device("cpu"), len(micro), max(map(len, micro)), 3)
    optimizer = torch.optim.AdamW(optimizer_groups(groups, 1.0))
    trainer = Trainer(feed=Once(micro), loss=losses(setup) if losses else setup.step.losses, gradients=gradients, optimizer=optimizer, lr_factor=lambda step: 1.0,
                      parallel=SimpleNamespace(rank=rank, world=len(micro), sum_=sum_), hooks=[], total_steps=1, max_grad_norm=1.0, max_nonfinite=5, fp16=False)
    trainer.state.positions = [Place(0, 0)]
    before = gradients.parameters[0].detach().clone()
    trainer.fit(StopRequest())
    assert torch.equal(before, gradients.parameters[0]) == bool(trainer.state.skipped)
    return trainer


def batch_of(seed, **extra):
    return make_batch(seed=seed, dtype=torch.float32, **extra)


def test_the_sample_whose_latent_is_nan_is_named():
    spoiled = batch_of(1)
    spoiled.latent_mean[1, 2, 3, 4] = math.nan
    [skip] = one_step([[batch_of(0), spoiled]]).take_skips()
    assert str(skip) == "step 1 changed nothing: the loss is not finite for r0m1s1 (nan) (micro-batch 2)"


def test_the_sample_whose_mask_is_not_finite_is_named():
    mask = torch.ones(3, 1, 8, 8)
    mask[2, 0, 0, 0] = math.inf
    [skip] = one_step([[batch_of(0, mask=mask)]]).take_skips()
    assert skip.culprits == ["r0m0s2 (inf)"] and skip.where == ""


def test_where_only_the_gradient_is_not_finite_its_micro_batch_is_named():
    def losses(setup):
        return lambda batch: Spoiled.apply(setup.step.losses(batch), torch.tensor(math.nan if batch.module_seed == 99 else 1.0))

    spoiled = batch_of(1)
    spoiled.module_seed = 99
    [skip] = one_step([[batch_of(0), spoiled, batch_of(2)]], losses=losses).take_skips()
    assert [name.split(" ")[0] for name in skip.culprits] == ["r0m1s0", "r0m1s1", "r0m1s2"] and "the gradient is not finite, the loss is" in str(skip)
    reference = Setup(dtype=torch.float32).step.losses(spoiled) * 3
    assert [float(name.split("(")[1][:-1]) for name in skip.culprits] == pytest.approx(reference.tolist(), rel=1e-3)


def test_ranks_decide_alike_and_the_first_names_another_ones_sample():
    spoiled = batch_of(1)
    spoiled.noise[0, 0, 0, 0] = math.nan
    micro, barrier, boxes, trainers = [[batch_of(0)], [spoiled]], threading.Barrier(2, timeout=60), [None, None], [None, None]

    def rank(number):
        def sum_(tensor):
            boxes[number] = tensor.clone()
            barrier.wait()
            tensor.copy_(boxes[0] + boxes[1])
            barrier.wait()
        trainers[number] = one_step(micro, number, sum_)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join(120) for thread in threads]
    assert [trainer.state.skipped for trainer in trainers] == [1, 1] and trainers[1].records == []
    assert [str(skip) for skip in trainers[0].take_skips()] == ["step 1 changed nothing: the loss is not finite for r1m0s0 (nan) (process 1)"]


# ---- the host waits for nothing --------------------------------------------------------------------------------------------------------------------

class NoLooking(TorchDispatchMode):
    """Fails where a tensor's value is asked for, as a device would have to be waited for; Adam's counter is the host's own."""

    LOOKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self, trainer):
        super().__init__()
        self.trainer, self.calls = trainer, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        counters = {id(state["step"]) for state in self.trainer.optimizer.state.values() if isinstance(state.get("step"), torch.Tensor)}
        if any(look in str(func) for look in self.LOOKS) and id(args[0]) not in counters:
            raise AssertionError(f"{func} looks at a value")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "SGD momentum", "schedule-free"])
def test_no_value_is_looked_at_in_a_step(name):
    """Prodigy and Adafactor look themselves, at each step."""
    for fp16 in (False, True):
        trainer = make(name, 6, bad=(2,), lag=True, fp16=fp16)
        with NoLooking(trainer) as mode:
            trainer.fit(StopRequest())
        assert mode.calls > 100 and trainer.state.skipped == 1
        with NoLooking(trainer), pytest.raises(AssertionError, match="looks at a value"):
            bool(trainer.gradients.stop)


def test_no_value_is_looked_at_in_the_models_part_of_a_step():
    setup = Setup(dtype=torch.float32, gamma=5.0, offset=0.1, dropout=0.1)
    batch = batch_of(0, mask=torch.ones(3, 1, 8, 8))
    with NoLooking(SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0))) as mode:
        setup.step.losses(batch).sum().backward()
    assert mode.calls > 100


# ---- what a reader of the log sees -----------------------------------------------------------------------------------------------------------------

class Said:
    def __init__(self):
        self.lines, self.values, self.progressed = [], [], []

    def advance(self, step): pass
    def say(self, line): self.lines.append(line)
    def scalars(self, step, values): self.values.append((step, values))
    def progress(self, step, values): self.progressed.append(values)


def test_a_skipped_step_is_recorded_as_it_was_and_said_and_spoils_no_mean():
    said = Said()
    trainer = make(steps=6, bad=(1, 4), lag=True, hooks=[])
    trainer.hooks.append(LogHook(said, 3, 3))
    trainer.fit(StopRequest())
    assert [step for step, _ in said.values] == [1, 2, 3, 4, 5, 6]
    assert [math.isfinite(values["loss"]) for _, values in said.values] == [True, False, True, True, False, True]
    assert [line.split(":")[1] for line in said.lines] == [" step 2 changed nothing", " step 5 changed nothing"]
    assert all(math.isfinite(values["loss"]) for values in said.progressed) and said.progressed[-1]["skipped"] == 2


@pytest.mark.parametrize("every", [1, 2, 3, 99])
@pytest.mark.parametrize("look", [None, 4, 5])
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW"])
def test_the_log_is_the_same_where_the_host_learns_late(every, look, name):
    """Each value with its step, each line after the same steps; also where something, such as a preview, needs exact numbers meanwhile, or a save that flushes the log."""
    def told(lag, flush):
        events, said = [], Said()
        said.scalars = lambda step, values: events.append((step, values))
        said.say = lambda line: events.append(line)
        said.progress = lambda step, values: events.append((step, {name: value for name, value in values.items() if name not in ("speed", "left")}))
        log, looking = LogHook(said, every, 3), Hook()

        def look_ahead(trainer):
            if trainer.state.step == look:
                trainer.settle()
                if flush:
                    log.flush(trainer)
                    events.append("flushed")

        looking.on_step_end = look_ahead
        make(name, 7, (1, 4), lag, hooks=[log, looking]).fit(StopRequest())
        return str(events)

    for flush in (False, True):
        late, at_once = told(True, flush), told(False, flush)
        assert late == at_once and all(f"({step}, {{" in late for step in range(1, 8))


class Clock:
    """A clock that goes on when told: the step takes `step` seconds, `first` the first one."""

    def __init__(self, monkeypatch, step=2.0, first=2.0):
        self.now, self.step, self.first = 100.0, step, first
        monkeypatch.setattr("hcpdiff.train.hooks.time", SimpleNamespace(monotonic=lambda: self.now))

    def ticks(self, trainer):
        loss, seconds = trainer.loss, [0.0, self.first]  # of two micro-batches a step

        def one(batch):
            self.now += seconds.pop() if seconds else self.step / 2
            return loss(batch)

        trainer.loss = one
        return trainer


@pytest.mark.parametrize("lag", [False, True])
def test_the_time_of_previews_and_saves_is_no_steps_time(monkeypatch, lag):
    clock, said = Clock(monkeypatch), Said()

    class Slow(Periodic):
        def act(self, trainer):
            clock.now += 1000.0
            return True

    clock.ticks(make(steps=12, lag=lag, hooks=[LogHook(said, 2, 3), Slow(1)])).fit(StopRequest())
    speeds = [values["speed"] for values in said.progressed]
    assert speeds[2:-1] == pytest.approx([0.5] * 4) and 0.2 < min(speeds) and max(speeds) <= 1  # with lag the first numbers come a step late, and the last two at once
    assert said.progressed[2]["left"] == pytest.approx(16)


def test_a_first_step_that_compiles_gives_no_speed_and_no_time_left(monkeypatch):
    clock, said = Clock(monkeypatch, first=105.0), Said()
    clock.ticks(make(steps=6, hooks=[LogHook(said, 3, 3, compiles=True)])).fit(StopRequest())
    assert said.lines == ["step 1 took 105 s, compiling included"]
    assert not {"speed", "left"} & set(said.progressed[0]) and said.progressed[1]["speed"] == pytest.approx(0.5) and said.progressed[1]["left"] == pytest.approx(6)
    assert progress_line(1, 6, said.progressed[0]).startswith("step 1/6  epoch 0.33  loss ") and "left" not in progress_line(1, 6, said.progressed[0])


def test_a_run_that_is_stopped_has_all_its_steps_in_the_log():
    said, stop, asks = Said(), StopRequest(), Hook()
    asks.on_step_end = lambda trainer: setattr(stop, "signal", 2 if trainer.state.step == 2 else stop.signal)
    trainer = make(steps=9, lag=True, hooks=[LogHook(said, 5, 3), asks])
    assert trainer.fit(stop) is False and [step for step, _ in said.values] == list(range(1, trainer.state.step + 1))


def test_a_loss_that_explodes_and_stays_finite_is_said_once():
    usual = Usual()
    assert all(usual.exceeded_by(mean) is None for mean in (0.1, 0.2, 0.05, 0.1, 0.3, 0.9, 1.5))
    assert usual.exceeded_by(50.0) == pytest.approx(0.2) and usual.exceeded_by(500.0) is None and usual.exceeded_by(math.nan) is None
    assert usual.exceeded_by(0.1) is None and usual.exceeded_by(50.0) is not None
    assert all(Usual().exceeded_by(mean) is None for mean in (1e9, 1e9, 1e9))  # nothing is known yet


@pytest.mark.parametrize("width, shows, leaves_out", [(60, "", "loss"), (80, "loss 1.0119", "epoch"), (110, "epoch 0.20  loss 1.0119", "lr"), (150, "lr unet 6.00e-04  0.17 steps/s", "grad_norm"),
                                                      (200, "epoch 0.20  loss 1.0119  grad_norm 0.1308  lr unet 6.00e-04  0.17 steps/s", "…")])
def test_a_narrow_terminal_keeps_the_count_and_the_times(width, shows, leaves_out):
    logger = ConsoleLogger()
    logger.console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    logger.open(Path(), 0, 20000)
    try:
        logger.advance(2000)
        logger.progress(2000, {"epoch": 0.2, "loss": 1.0119, "grad_norm": 0.1308, "lr unet": 6e-4, "speed": 0.17, "left": 1000.0})
        table = logger.bar.get_renderable()
    finally:
        logger.close()
    plain = Console(file=io.StringIO(), width=width)
    plain.print(table)
    (line,) = plain.file.getvalue().splitlines()
    assert " 2000/20000 " in line and re.search(r"\d:\d\d:\d\d left -:--:--", line) and shows in line and leaves_out not in line and "…" not in line

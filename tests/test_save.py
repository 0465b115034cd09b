"""Saving on the toy problem: what is written, checked, kept, deleted, and what happens when it cannot be."""

import errno
import hashlib
import os
import subprocess
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_trainer import Lossy, Place, toy

from hcpdiff.checkpoint import atomic
from hcpdiff.checkpoint.resume import load_state, save_state
from hcpdiff.checkpoint.runs import SUMS as NAME
from hcpdiff.checkpoint.runs import states
from hcpdiff.checkpoint.sums import changed
from hcpdiff.checkpoint.tidy import drop_weights, remove_leftovers, set_aside, surplus
from hcpdiff.errors import CheckpointError, ConfigError, FeedError, HCPError, NonFiniteError
from hcpdiff.lora_tensors import LoraTensors
from hcpdiff.loggers import Logger, LoggerGroup
from hcpdiff.train.hooks import LogHook, Periodic
from hcpdiff.train.save import SaveHook, SavePolicy
from hcpdiff.train.signals import StopRequest
from hcpdiff.train.state import restore, training_state


class Lines(Logger):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def say(self, renderable):
        self.lines.append(str(renderable))


class ToyTrainable:
    """The toy's weight as the `down` of one LoRA layer."""

    def __init__(self, weight, stem="unet"):
        self.component, self.groups, self.group_of, self.key = SimpleNamespace(name=stem, file_stem=stem), [0], {"layer": 0}, f"lora_{stem}"
        self.adapters = {"layer": SimpleNamespace(down=weight, up=torch.ones(3, 1))}

    def export(self):
        return {"layer": LoraTensors(self.adapters["layer"].down.detach().reshape(1, 3), self.adapters["layer"].up, 1.0)}


def saver(run, steps=6, written=None, stems=("unet",), bad=(), **policy):
    """(a toy trainer that saves, its log, its trainables)."""
    trainer, weight = toy(steps=steps, bad=bad, max_nonfinite=99)
    log, trainables = Lines(), [ToyTrainable(weight, stem) for stem in stems]
    hook = SaveHook(run, trainables, {"base_version": "sd_v1"}, SavePolicy(**{"save_step": 2, **policy}), {"data": {"one": {}}}, LogHook(log, 10, 4), written)
    trainer.hooks.append(hook)
    return trainer, log.lines, trainables


def train(run, **extra):
    trainer, lines, _ = saver(run, **extra)
    trainer.fit(StopRequest())
    return lines


def weights(run):
    return sorted(path.name for path in (run / "ckpts").iterdir())


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def break_at(monkeypatch, number, part="state.safetensors"):
    """From now on, files whose name holds `part` cannot be written: the error `number` comes with the first bytes. The list that comes back ends it."""
    real, on = open, [True]

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, data):
            self.file.write(bytes(data)[:7])
            raise OSError(number, "No space left on device" if number == errno.ENOSPC else "injected")

    monkeypatch.setattr(atomic, "open", lambda path, mode: Full(real(path, mode)) if on and "x" in mode and part in str(path) else real(path, mode), raising=False)
    return on


def test_a_state_lists_the_checksums_of_its_files_and_of_its_weight_files(tmp_path):
    train(tmp_path, stems=("unet", "text_encoder"))
    folder = tmp_path / "states" / "6"
    sums = dict(reversed(line.split("  ")) for line in (folder / NAME).read_text().splitlines())
    assert set(sums) == {"state.json", "state.safetensors", "../../ckpts/unet-6.safetensors", "../../ckpts/text_encoder-6.safetensors"}
    assert all(digest(folder / name) == value for name, value in sums.items())
    if subprocess.run(["sha256sum", "--version"], capture_output=True).returncode == 0:
        assert subprocess.run(["sha256sum", "--strict", "-c", NAME], cwd=folder, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", NAME])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_state_is_told_and_the_one_before_is_taken(tmp_path, name, damage):
    train(tmp_path)
    path = tmp_path / "states" / "6" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(raw if damage == "flipped" else raw[: len(raw) - 30])
    said = []
    assert load_state(tmp_path, say=said.append)["step"] == 4
    if (name, damage) == (NAME, "gone"):  # without its list a state was never finished
        assert states(tmp_path) == [4] and said == []
        return
    (line,) = said
    assert line.startswith("warning: ") and ("cannot be read" if damage == "gone" else "is damaged") in line and line.endswith(str(tmp_path / "states" / "4"))
    with pytest.raises(CheckpointError, match="train.resume=.* takes the newest state that is whole. There are: .*states/4, .*states/6"):
        load_state(tmp_path, 6)


def test_states_that_are_all_damaged_are_all_named(tmp_path):
    train(tmp_path)
    for step in (4, 6):
        (tmp_path / "states" / str(step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of its 2 states is whole") as caught:
        load_state(tmp_path)
    assert [str(step) in fault for step, fault in zip((6, 4), caught.value.faults)] == [True, True] and "init_lora" in caught.value.faults[-1]


def test_an_older_state_can_be_asked_for_and_one_that_is_not_there_is_named(tmp_path):
    train(tmp_path)
    assert load_state(tmp_path, 4)["step"] == 4
    with pytest.raises(ConfigError, match="there is no such state. There are: .*states/4"):
        load_state(tmp_path, 2)


def test_a_state_of_another_format_is_not_taken_for_damage(tmp_path, monkeypatch):
    train(tmp_path)
    monkeypatch.setattr("hcpdiff.checkpoint.resume.FORMAT", 3)
    with pytest.raises(CheckpointError, match="has format 2, this version reads 3: resume with the version that wrote it"):
        load_state(tmp_path)


def test_a_state_that_may_not_be_read_is_no_damage(tmp_path, monkeypatch):
    train(tmp_path)
    real = open

    def refuse(path, *more, **keys):
        if str(path).endswith("6/state.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *more, **keys)

    monkeypatch.setattr("hcpdiff.checkpoint.sums.open", refuse, raising=False)
    with pytest.raises(CheckpointError, match="Permission denied"):
        load_state(tmp_path)


@pytest.mark.parametrize("last,every,left", [(None, None, [2, 4, 6, 8, 10]), (None, 4, [2, 4, 6, 8, 10]), (1, None, [10]), (2, None, [8, 10]), (1, 4, [4, 8, 10]), (9, None, [2, 4, 6, 8, 10])])
def test_keep_last_and_keep_every_say_which_weight_files_stay(tmp_path, last, every, left):
    train(tmp_path, steps=10, keep_last=last, keep_every=every, keep_states=1)
    assert weights(tmp_path) == sorted(f"unet-{step}.safetensors" for step in left) and states(tmp_path) == [10]
    assert set(map(int, load_state(tmp_path)["weights"])) >= set(left)  # what goes is deleted after the state is there


def test_weight_files_of_the_states_that_are_kept_stay(tmp_path):
    train(tmp_path, steps=10, keep_last=1, keep_states=3)
    assert weights(tmp_path) == sorted(f"unet-{step}.safetensors" for step in (6, 8, 10)) and states(tmp_path) == [6, 8, 10]
    assert surplus([2, 4, 6], 1, None, [2]) == [4]


def test_files_that_the_run_did_not_write_are_never_deleted(tmp_path):
    (tmp_path / "ckpts").mkdir()
    for name in ("unet-1.safetensors", "unet-2-best.safetensors", "notes.txt"):
        (tmp_path / "ckpts" / name).write_text("mine")
    trainer, _, _ = saver(tmp_path, steps=8, keep_last=1, keep_states=1)
    trainer.hooks.append(SimpleNamespace(on_epoch_begin=lambda *a: None, on_end=lambda *a: None,
                                         on_step_end=lambda t: t.state.step == 4 and (tmp_path / "ckpts" / "unet-4.safetensors").write_text("mine now")))
    trainer.fit(StopRequest())
    assert weights(tmp_path) == ["notes.txt", "unet-1.safetensors", "unet-2-best.safetensors", "unet-4.safetensors", "unet-8.safetensors"]
    assert (tmp_path / "ckpts" / "unet-4.safetensors").read_text() == "mine now"


def test_a_state_of_a_stranger_deletes_and_reads_nothing_outside_the_run(tmp_path):
    mine, run = tmp_path / "mine.safetensors", tmp_path / "run"
    mine.write_text("mine")
    assert drop_weights(run, {"../mine.safetensors": digest(mine), str(mine): digest(mine), "ckpts/../../mine.safetensors": digest(mine)}) == [] and mine.is_file()
    train(run, steps=2)
    with open(run / "states" / "2" / NAME, "a", encoding="utf-8") as file:
        file.write(f"{'0' * 64}  ../../../mine.safetensors\n{'0' * 64}  ../../ckpts/../../mine.safetensors\n")
    assert changed(run / "states" / "2") == []


def test_a_resumed_run_deletes_what_the_run_before_it_wrote(tmp_path):
    train(tmp_path, steps=4, keep_last=2, keep_states=1)
    state = load_state(tmp_path)
    trainer, _, trainables = saver(tmp_path, steps=8, keep_last=2, keep_states=1, written=state["weights"])
    restore(trainer, trainables, state, Place)
    trainer.fit(StopRequest())
    assert weights(tmp_path) == ["unet-6.safetensors", "unet-8.safetensors"]


@pytest.mark.parametrize("part", ["state.safetensors", "state.json", "SHA256SUMS", "unet-4"])
def test_a_full_disk_stops_the_run_and_leaves_what_was_saved(tmp_path, monkeypatch, part):
    trainer, _, _ = saver(tmp_path, steps=2)
    trainer.fit(StopRequest())
    before = {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    break_at(monkeypatch, errno.ENOSPC, part)
    trainer.total_steps = 9
    with pytest.raises(CheckpointError, match="step 4 could not be saved") as caught:
        trainer.fit(StopRequest())
    message = str(caught.value)
    assert "No space left on device" in message and part in message and ".tmp" not in message and "newest state is" in message and message.count("states/2") == 1, message
    assert caught.value.exit_code == 2 and states(tmp_path) == [2] and {path: digest(path) for path in before} == before
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")] and load_state(tmp_path)["step"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the limit is set in a fork of this process")
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_true_limit_of_the_system_is_met_with_a_name_and_whole_files(tmp_path, policy):
    """A file may not become larger than 600 bytes (RLIMIT_FSIZE): what a quota or a full disk does, done by the kernel."""
    import resource

    train(tmp_path, steps=2)
    before = {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            trainer, lines, _ = saver(tmp_path, steps=6, on_save_error=policy)
            trainer.state.step = 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            try:
                trainer.fit(StopRequest())
            except CheckpointError as error:
                step = 4 if policy == "stop" else 6
                named = "cannot be written: File too large" in str(error) and str(tmp_path) in str(error) and f"step {step} could not be saved" in str(error)
                code = 0 if named and trainer.state.step == step and len([line for line in lines if "warning" in line]) == (policy == "continue") * 2 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert {path: digest(path) for path in before} == before and load_state(tmp_path)["step"] == 2 and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the rights are given up in a fork of this process")
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_folder_that_cannot_even_be_looked_at_any_more_is_a_failed_save(tmp_path, policy):
    """As after a chmod, or on a network disk whose server has gone: asking what is there fails too."""
    run = tmp_path / "run"
    train(run, steps=2)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            trainer, lines, _ = saver(run, steps=6, on_save_error=policy)
            trainer.state.step = 2
            tmp_path.chmod(0)
            if os.geteuid() == 0:
                os.seteuid(65534)
            try:
                trainer.fit(StopRequest())
            except CheckpointError as error:
                step = 4 if policy == "stop" else 6
                named = f"step {step} could not be saved: {run}" in str(error) and "Permission denied" in str(error) and "cannot be looked at" in str(error)
                code = 0 if named and len([line for line in lines if "warning" in line]) == (policy == "continue") * 2 else 2
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    tmp_path.chmod(0o700)
    assert code == 0 and load_state(run)["step"] == 2


def test_a_state_that_cannot_be_put_in_the_place_of_another_leaves_that_one(tmp_path, monkeypatch):
    save_state(tmp_path, 3, {"step": 3, "first": True}, keep=1)
    real = os.replace

    def refuse(source, target):
        if str(source).endswith(".new.tmp"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr("hcpdiff.checkpoint.resume.os.replace", refuse)
    with pytest.raises(CheckpointError, match="states/3 cannot be written: Input/output error"):
        save_state(tmp_path, 3, {"step": 3}, keep=1)
    assert load_state(tmp_path) == {"step": 3, "first": True} and [path.name for path in (tmp_path / "states").iterdir()] == ["3"]


def test_a_save_that_failed_does_not_count_among_the_newest_that_are_kept(tmp_path, monkeypatch):
    trainer, _, _ = saver(tmp_path, steps=6, on_save_error="continue", keep_last=2, keep_states=1)
    on = break_at(monkeypatch, errno.ENOSPC, "unet-4")
    trainer.fit(StopRequest())
    assert on and weights(tmp_path) == ["unet-2.safetensors", "unet-6.safetensors"]


@pytest.mark.parametrize("before,now", [({"momentum": 0.9, "weight_decay": 0.5}, {}), ({}, {"weight_decay": 0.5}), ({"nesterov": True, "momentum": 0.9}, {"momentum": 0.5})])
def test_the_optimizers_arguments_are_those_of_the_config_that_goes_on(before, now):
    """Also one that stands there no more: then it is what the optimizer takes by itself."""
    trainers = [toy(make=partial(torch.optim.SGD, **arguments)) for arguments in (before, now)]
    (first, weight), (second, other) = trainers
    first.fit(StopRequest())
    asked = {key: value for key, value in second.optimizer.param_groups[0].items() if key != "params"}
    restore(second, [ToyTrainable(other)], training_state(first, [ToyTrainable(weight)]), Place)
    assert {key: value for key, value in second.optimizer.param_groups[0].items() if key != "params"} == asked


def test_what_an_optimizer_has_learnt_is_no_argument():
    from prodigyopt import Prodigy

    (first, weight), (second, other) = toy(make=partial(Prodigy, d0=1e-3)), toy(make=partial(Prodigy, d0=1e-3, weight_decay=0.1))
    first.fit(StopRequest())
    state = training_state(first, [ToyTrainable(weight)])
    restore(second, [ToyTrainable(other)], state, Place)
    group, saved = second.optimizer.param_groups[0], first.optimizer.param_groups[0]
    assert group["weight_decay"] == 0.1 and (group["d"], group["k"]) == (saved["d"], saved["k"]) and saved["k"] == 6


def test_a_run_that_may_goes_on_and_saves_again_when_it_can(tmp_path, monkeypatch):
    trainer, lines, _ = saver(tmp_path, steps=8, on_save_error="continue")
    on = break_at(monkeypatch, errno.ENOSPC)
    trainer.hooks.append(SimpleNamespace(on_epoch_begin=lambda *a: None, on_end=lambda *a: None, on_step_end=lambda t: t.state.step == 5 and on.clear()))
    trainer.fit(StopRequest())
    warnings = [line for line in lines if line.startswith("warning")]
    assert [line[9:15] for line in warnings] == ["step 2", "step 4"] and all("state.safetensors cannot be written: No space left on device" in line for line in warnings)
    assert states(tmp_path) == [6, 8] and trainer.state.step == 8


@pytest.mark.parametrize("steps", [8, 9])
def test_the_last_save_of_a_run_must_succeed_even_if_the_run_may_go_on(tmp_path, monkeypatch, steps):
    trainer, lines, _ = saver(tmp_path, steps=steps, on_save_error="continue")
    break_at(monkeypatch, errno.EIO)
    with pytest.raises(CheckpointError, match=f"step {steps} could not be saved: .*state.safetensors cannot be written.*No state was saved before"):
        trainer.fit(StopRequest())
    assert trainer.state.step == steps


def test_a_stop_that_cannot_save_is_an_error(tmp_path, monkeypatch):
    trainer, _, _ = saver(tmp_path, on_save_error="continue")
    break_at(monkeypatch, errno.ENOSPC)
    stop = StopRequest()
    stop.signal = 15
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        trainer.fit(stop)


def test_a_batch_that_is_missing_after_a_save_saves_nothing_again_and_a_save_that_fails_is_told_beside_it(tmp_path, monkeypatch):
    for missing, saved in ((4, ["2", "4"]), (3, ["2", "3"])):
        trainer, lines, _ = saver(tmp_path / str(missing))
        trainer.feed = Lossy(missing)
        with pytest.raises(FeedError, match="^cat.jpg: the file is gone$"):
            trainer.fit(StopRequest())
        assert sorted(path.name for path in (tmp_path / str(missing) / "states").iterdir()) == saved and sum("saved" in line for line in lines) == 2
    trainer, _, _ = saver(tmp_path / "full", on_save_error="continue", save_step=None)
    trainer.feed = Lossy(3)
    break_at(monkeypatch, errno.ENOSPC)
    with pytest.raises(HCPError) as caught:
        trainer.fit(StopRequest())
    assert caught.value.faults[0] == "cat.jpg: the file is gone" and caught.value.faults[1].startswith("step 3 could not be saved: ") and len(caught.value.faults) == 2


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("bad", [(), (2,)])
@pytest.mark.parametrize("first", ["drawing", "saving"])
def test_a_step_for_which_there_was_no_batch_is_never_due(tmp_path, lag, bad, first):
    """It is known late where the device works ahead."""
    drawn, drawing = [], Periodic(2)
    drawing.act = lambda trainer: drawn.append(trainer.state.step) or True
    trainer, lines, _ = saver(tmp_path, bad=bad)
    trainer.feed, trainer.lag = Lossy(3), lag
    trainer.feed.bad = bad
    trainer.hooks.insert(0 if first == "drawing" else 1, drawing)
    with pytest.raises(FeedError):
        trainer.fit(StopRequest())
    assert drawn == [2] and states(tmp_path) == [2, 3] and not any("is not saved" in line for line in lines), lines


def test_a_folder_that_became_unusable_is_named(tmp_path):
    (tmp_path / "ckpts").write_text("a file")
    with pytest.raises(CheckpointError, match="ckpts is a file, not a folder"):
        train(tmp_path)
    (tmp_path / "ckpts").unlink()
    (tmp_path / "states").write_text("a file")
    with pytest.raises(CheckpointError, match="states.*cannot be written.*No state was saved before"):
        train(tmp_path)


def test_steps_that_change_nothing_push_no_good_state_out(tmp_path):
    lines = train(tmp_path, steps=8, bad={3, 4, 5}, save_step=1, keep_states=2)
    assert weights(tmp_path) == [f"unet-{step}.safetensors" for step in (1, 2, 3, 7, 8)]
    assert [line.split(":")[0] for line in lines if "is not saved" in line] == [f"step {step} is not saved" for step in (4, 5, 6)]


@pytest.mark.parametrize("ending", ["end", "stop", "fault"])
def test_a_due_step_that_changed_nothing_is_saved_all_the_same_where_the_run_ends_with_it(tmp_path, ending):
    trainer, lines, _ = saver(tmp_path, steps=4 if ending == "end" else 8, bad={2, 3}, save_step=2)
    stop = StopRequest()
    if ending == "stop":
        trainer.hooks.insert(0, SimpleNamespace(on_epoch_begin=lambda *a: None, on_stop=lambda t: None,
                                                on_step_end=lambda t: setattr(stop, "signal", 2 if t.state.step == 3 else 0)))
    elif ending == "fault":
        trainer.feed = Lossy(4)
        trainer.feed.bad = {2, 3}
    with pytest.raises(FeedError) if ending == "fault" else nullcontext():
        assert trainer.fit(stop) is (ending == "end")
    assert states(tmp_path) == [2, 4] and weights(tmp_path) == ["unet-2.safetensors", "unet-4.safetensors"]
    assert sum("step 4 is not saved" in line for line in lines) == (ending == "fault")  # of a fault nobody knows yet


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    trainer, _, trainables = saver(tmp_path, on_save_error="continue")
    trainer.hooks.insert(0, SimpleNamespace(on_epoch_begin=lambda *a: None, on_step_end=lambda t: t.state.step == 3 and trainables[0].adapters["layer"].down.data.fill_(float("nan"))))
    with pytest.raises(NonFiniteError, match="step 4 is not saved: 1 layers hold NaN or infinity, such as layer. .*states/2") as caught:
        trainer.fit(StopRequest())
    assert caught.value.exit_code == 3 and states(tmp_path) == [2] and weights(tmp_path) == ["unet-2.safetensors"]


def test_a_weight_that_only_the_file_cannot_hold_names_save_dtype(tmp_path):
    trainer, _, trainables = saver(tmp_path, save_dtype=torch.float16)
    trainables[0].adapters["layer"].up.fill_(1e6)
    with pytest.raises(CheckpointError, match="beyond 65504, the largest of train.save_dtype; set it to fp32"):
        trainer.fit(StopRequest())
    assert not (tmp_path / "ckpts").exists() and states(tmp_path) == []


def test_leftovers_go_and_nothing_else_does(tmp_path):
    train(tmp_path)
    for name in (".cfg.yaml.12.0123abcd.tmp", "ckpts/.unet-9.safetensors.12.0123abcd.tmp", "states/.9.12.new.tmp/state.json", "states/.2.12.old.tmp/state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    for name in ("ckpts/.mine.tmp", "ckpts/a.12.0123abcd.tmp", ".hidden"):
        (tmp_path / name).write_text("mine")
    assert remove_leftovers(tmp_path) == 4 and remove_leftovers(tmp_path) == 0
    assert all((tmp_path / name).is_file() for name in ("ckpts/.mine.tmp", "ckpts/a.12.0123abcd.tmp", ".hidden")) and states(tmp_path) == [4, 6]


def test_what_is_newer_than_the_state_gone_on_from_is_set_aside_whole(tmp_path):
    assert set_aside(tmp_path, 3) is None
    train(tmp_path, steps=8, keep_states=4, stems=("unet", "text_encoder"))
    (tmp_path / "ckpts" / "unet-best.safetensors").write_text("mine")
    before = {path.relative_to(tmp_path): digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    folder, names = set_aside(tmp_path, 4)
    assert folder == tmp_path / "newer-than-4" and names[0] == "states/8" and len(names) == 6
    after = {path.relative_to(tmp_path): digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(before.values()) == sorted(after.values()) and states(tmp_path) == [2, 4] and states(folder) == [6, 8]
    assert weights(tmp_path) == ["text_encoder-2.safetensors", "text_encoder-4.safetensors", "unet-2.safetensors", "unet-4.safetensors", "unet-best.safetensors"]
    train(tmp_path, steps=6)
    assert set_aside(tmp_path, 4)[0] == tmp_path / "newer-than-4-2" and load_state(folder)["step"] == 8


def test_a_state_replaces_one_of_the_same_step_whole(tmp_path):
    save_state(tmp_path, 1, {"step": 1, "x": torch.zeros(2)}, keep=2)
    save_state(tmp_path, 1, {"step": 1, "x": torch.ones(2)}, keep=2)
    assert load_state(tmp_path)["x"].sum() == 2 and [path.name for path in (tmp_path / "states").iterdir()] == ["1"]


def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path):
    class Broken(Lines):
        def say(self, renderable):
            raise OSError(errno.ENOSPC, "No space left on device")

    good, broken = Lines(), Broken()
    group = LoggerGroup([broken, good])
    for number in range(3):
        group.say(f"line {number}")
    assert [line for line in good.lines if line.startswith("line")] == ["line 0", "line 1", "line 2"]
    assert [line for line in good.lines if "warning" in line] == ["warning: Broken cannot write: No space left on device. The run goes on; what it logs there may be incomplete from here on."]
    group.loggers[0].say = lambda line: (_ for _ in ()).throw(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    with pytest.raises(BrokenPipeError):
        group.say("nobody reads")

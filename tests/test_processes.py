"""Whole runs under accelerate: two processes are really two; a launcher that dies, a signal at any time, a second run in the folder."""

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from hcpdiff import device as machine
from hcpdiff import train_ac
from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.errors import ConfigError, Interrupted
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.train import compiled, launcher
from hcpdiff.train.lock import is_held
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.place import RunPlace
from hcpdiff.train.run import Run
from hcpdiff.train.signals import StopRequest
from hcpdiff.train.trainer import Trainer
from hcpdiff.vis import pipeline

CONFIG = """
_base_: [cfgs/train/examples/lora_conventional.yaml]
train: {{train_epochs: null, train_steps: 5, save_step: null, log_step: 1, scheduler: {{name: constant}}}}
model: {{pretrained_model_name_or_path: '{model}'}}
data:
  dataset1:
    batch_size: 2
    source: {{a: {{img_root: images, word_names: {{pt1: thing}}, flip: true}}}}
    bucket: {{target_area: 4096, num_bucket: 2}}
"""


def losses(run: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tblog"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_sd1):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "images").mkdir()
    for i in range(7):
        Image.new("RGB", (100, 60) if i % 3 else (64, 64), (30 * i, 200 - 20 * i, 90)).save(folder / "images" / f"{i}.png")
    (folder / "cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
    return folder


def run(place: Path, name: str, *more: str, launcher=()) -> tuple[Path, str]:
    command = [sys.executable, *launcher, "-m", "hcpdiff.train_ac", "--cfg", "cfg.yaml", f"exp_dir={name}", *more]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "OMP", "RANK", "WORLD", "LOCAL", "MASTER"))}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, encoding="utf-8", timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place / name, done.stdout + done.stderr


TWO = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")  # 0: one that is free


def test_two_processes_of_accelerate_are_really_two_and_one_writes(place):
    both, output = run(place, "two", launcher=TWO)  # what they train: test_groups.py
    assert re.search(r"2 processes", output) and output.count("done: step 5") == 1
    assert losses(both).keys() == {1, 2, 3, 4, 5} and len(list((both / "tblog").iterdir())) == 1


def test_one_process_where_two_were_asked_for_is_refused(place):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "hcpdiff.train_ac", "--cfg", "cfg.yaml", "exp_dir=less"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.returncode == 1 and done.stderr.count("error: 2 processes were asked for, but 1 runs. On a CPU: accelerate launch --multi_gpu") == 1
    assert not (place / "less").exists()


def appears(path: Path, text: str) -> None:
    for _ in range(3000):
        if path.exists() and text in path.read_text(encoding="utf-8"):
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never held {text!r}")


def test_the_death_of_accelerate_saves_the_run_and_a_second_one_was_refused(place):
    words = ["-m", "hcpdiff.train_ac_single", "--cfg", "cfg.yaml"]
    launcher = subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", *words, "exp_dir=orphan", "train.train_steps=3000", "train.cpu_threads=1"], cwd=place,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        appears(place / "orphan" / "train.log", "step 1/3000")
        second = subprocess.run([sys.executable, *words, "train.resume=orphan"], cwd=place, capture_output=True, text=True, encoding="utf-8", timeout=600)
        assert second.returncode == 2 and re.search(r"error: a run is at work in 'orphan' \(process \d+ on ", second.stderr), second.stderr
        launcher.terminate()  # ends the launcher alone
        appears(place / "orphan" / "train.log", "to go on: the same command with train.resume=orphan")
        (step,) = re.findall(r"stopped: step (\d+)", (place / "orphan" / "train.log").read_text(encoding="utf-8"))
        assert (place / "orphan" / "states" / step / "state.json").is_file()
    finally:
        holder = (place / "orphan" / ".lock").read_bytes() if (place / "orphan" / ".lock").exists() else b""
        if is_held(place / "orphan") and holder:
            os.kill(json.loads(holder)["pid"], signal.SIGKILL)
        launcher.kill()
        launcher.wait()


@pytest.mark.parametrize("policy,looks", [("stop", 1), ("continue", 0)])
def test_only_a_run_that_may_not_outlive_its_launcher_looks_for_it(place, monkeypatch, policy, looks):
    monkeypatch.chdir(place)
    seen = []
    for target, name, new in ((launcher, "launcher_command", lambda: ["accelerate", "launch"]), (train_ac, "run", lambda *run: seen.append(len(run[3].looks)) or 0),
                              (sys, "stdout", sys.stdout), (sys, "stderr", sys.stderr)):
        monkeypatch.setattr(target, name, new)
    assert train_ac.train(SimpleNamespace(cfg="cfg.yaml", overrides=[f"train.on_orphan={policy}"], allow_target=[]), None) == 0 and seen == [looks]


def in_this_process(place, monkeypatch, *words):
    monkeypatch.chdir(place)
    with StopRequest() as stop:
        return Run(load("cfg.yaml", [*words, "train.cpu_threads=1"], RunConfig), Parallel(), stop=stop).train()


def test_what_a_run_held_is_freed_as_soon_as_its_error_is_told(monkeypatch):
    """Not first when the collector of cycles comes by: it may be gigabytes on a GPU."""
    held = []

    class Failing:
        def __init__(self, *_):
            self.model = set()
            held.append(weakref.ref(self.model))

        def train(self):
            raise ConfigError("no")

    monkeypatch.setattr("hcpdiff.train.run.Run", Failing)
    loaded = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(on_orphan="stop")))
    gc.disable()
    try:
        with contextlib.suppress(ConfigError):
            train_ac.run(loaded, SimpleNamespace(allow_target=[]), Parallel(), StopRequest(), None)
        assert [ref() for ref in held] == [None]
    finally:
        gc.enable()


def then_a_signal(act):
    def both(*args, **keys):
        os.kill(os.getpid(), signal.SIGTERM)
        return act(*args, **keys)
    return both


def test_a_signal_before_the_first_step_ends_the_run_and_leaves_nothing(place, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "posterior", then_a_signal(StableDiffusion.posterior))
    with pytest.raises(Interrupted, match="stopped by SIGTERM while encoding latents. No run folder was made") as caught:
        in_this_process(place, monkeypatch, "exp_dir=early")
    assert caught.value.exit_code == 143 and not (place / "early").exists()


def test_a_signal_in_the_first_step_ends_the_run_in_its_midst_and_says_that_nothing_is_lost(place, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "denoise", then_a_signal(StableDiffusion.denoise))
    with pytest.raises(Interrupted, match="stopped by SIGTERM while training. Nothing was saved yet: first may be removed.") as caught:
        in_this_process(place, monkeypatch, "exp_dir=first")
    assert caught.value.exit_code == 143 and not list((place / "first" / "ckpts").iterdir())


@pytest.mark.parametrize("quick", [False, True])
def test_a_signal_while_the_first_step_compiles_says_so(place, monkeypatch, quick):
    """Also where the thread that reads signals comes late (`quick`)."""
    def backend(graph, inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    monkeypatch.setattr(machine, "check_compiler", lambda device, key: None)
    if quick:
        monkeypatch.setattr(StopRequest, "_arrived", lambda *_: None)
    with pytest.raises(Interrupted, match="stopped by SIGTERM while compiling. Nothing was saved yet"):
        in_this_process(place, monkeypatch, f"exp_dir=compiling{quick}", "model.compile=true")


def test_a_signal_in_a_step_after_its_blocks_are_compiled_is_one_while_training(place, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(machine, "check_compiler", lambda device, key: None)
    monkeypatch.setattr(Trainer, "backward", lambda *args, backward=Trainer.backward: backward(*args) or os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped by SIGTERM while training. Nothing was saved yet"):
        in_this_process(place, monkeypatch, "exp_dir=compiled", "model.compile=true")


def test_a_signal_while_the_largest_batch_is_tried_says_so(place, monkeypatch):
    def as_a_gpu(run, place_models=Run._place_models):
        place_models(run)
        run.device = torch.device("cuda")  # from here on only `Run` itself looks at it

    monkeypatch.setattr(Run, "_place_models", as_a_gpu)
    monkeypatch.setattr(StableDiffusion, "denoise", then_a_signal(StableDiffusion.denoise))
    with pytest.raises(Interrupted, match="stopped by SIGTERM while trying the largest batch. No run folder was made"):
        in_this_process(place, monkeypatch, "exp_dir=tried", "lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*q_proj$']}]")  # so that prompts are encoded in the pass


@pytest.mark.parametrize("main, said", [(True, "Nothing was saved yet: run may be removed."), (False, "Nothing was saved yet in run.")])
def test_only_the_process_that_saves_says_that_a_folder_may_be_removed(main, said):
    place = RunPlace(SimpleNamespace(timed=(), config=SimpleNamespace(exp_dir="run", train=SimpleNamespace(resume=None))), SimpleNamespace(main=main))
    place.folder = Path("run")
    assert place.how_to_go_on() == said


def test_a_signal_while_previews_are_drawn_ends_the_drawing_and_saves(place, monkeypatch):
    drawn = []
    monkeypatch.setattr(pipeline, "decode", then_a_signal(lambda *args, decode=pipeline.decode: drawn.append(1) or decode(*args)))
    assert in_this_process(place, monkeypatch, "exp_dir=drawing", "preview.prompts=[a, b]", "preview.every=1", "preview.num_inference_steps=2") == 143
    log = (place / "drawing" / "train.log").read_text(encoding="utf-8")
    assert len(drawn) == 1 and "warning: the preview of step 1 could not be drawn: a signal asks to stop" in log
    assert "stopped: step 2" in log and (place / "drawing" / "states" / "2").is_dir()

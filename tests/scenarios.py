"""What the processes of tests/group.py do: a model-free trainer among real processes, with a fault somewhere; and whole runs on a tiny model."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers  # noqa: F401
import torch
from torch import nn

from hcpdiff.adapters.shadow import Shadow
from hcpdiff.errors import CheckpointError, ConfigError, DataError, HCPError, NonFiniteError
from hcpdiff.train import run, signals  # noqa: F401
from hcpdiff.train.conditioning import FrozenText
from hcpdiff.train.previews import PreviewHook
from hcpdiff.train.optim import Gradients, optimizer_groups
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.signals import StopRequest
from hcpdiff.train.trainer import Hook, Trainer
from hcpdiff.trainables.lora import ParamGroup


class Feed:
    """Each rank's number of the step. lost: (ranks, step, error, if not the usual one) whose batch cannot be made."""

    def __init__(self, lost=None):
        self.lost = lost

    def batches(self, start, rank, world, first_index, count):
        for step in range(first_index, first_index + count):
            if self.lost and rank in self.lost[0] and step == self.lost[1]:
                raise (*self.lost, DataError("images/5.png: the file is gone"))[2]
            yield step, [SimpleNamespace(epoch=0, chunk=step + 1)], [SimpleNamespace(value=step * world + rank, prompts=["a"], target_size=torch.tensor([[64, 64]]))]

    def names(self, step, world):
        return [[[(f"{step}.{rank}", 1.0)]] for rank in range(world)]


class Saver(Hook):
    """Rank 0's: writes what a save would."""

    def on_step_end(self, trainer):
        Path("step").write_text(str(trainer.state.step))

    def on_stop(self, trainer):
        Path("saved").write_text(str(trainer.state.step))

    def on_fault(self, trainer):
        time.sleep(0.3)  # the other processes have long been waiting, or have ended
        self.on_stop(trainer)


def member(rank, fault=None, hooks=(), steps=6, before=None, lost=None, lag=None):
    """One process of a run, ended and told as train_ac does it. fault(rank, batch) is called in each micro-batch."""
    with StopRequest() as stop:
        parallel = Parallel()
        parallel.watch(stop)
        try:
            if before is not None:
                before(parallel)
            weight = nn.Parameter(torch.ones(3))
            group = ParamGroup("w", 0.1, (weight,))

            def loss(batch):
                factor = fault(rank, batch) if fault else None
                return ((weight - batch.value) ** 2).sum() * (1.0 if factor is None else factor)

            trainer = Trainer(feed=Feed(lost), loss=loss, gradients=Gradients([group], torch.device("cpu")), optimizer=torch.optim.SGD(optimizer_groups([group], 1.0)),
                              lr_factor=lambda step: 1e-3, parallel=parallel, hooks=[*([Saver()] if parallel.main else []), *(make(parallel) for make in hooks)],
                              total_steps=steps, max_grad_norm=None, max_nonfinite=2, fp16=False, lag=lag)
            trainer.state.positions = [SimpleNamespace(epoch=0, chunk=0)]
            finished = trainer.fit(stop)
            print("ended at", trainer.state.step, flush=True)
            code = 0 if finished else next(code for code in parallel.gather(stop.signal and stop.exit_code) if code)
        except (Exception, KeyboardInterrupt) as error:
            parallel.end(error, stop)
            raise
        parallel.close()
        return code


def at(number, step, act):
    """act() in rank `number` at the step (0-based)."""
    return lambda rank, batch: act() if rank == number and batch.prompts and batch.value // 3 == step else None


def throw(error):
    def act():
        raise error
    return act


def slowly(rank, batch):
    Path(f"alive{rank}").write_text("")
    time.sleep(0.1)


def faulty_config(parallel):
    faults = parallel.faults(["the same key"] + ["only here"] * (parallel.rank == 1))
    raise ConfigError(faults)


class Unsaved(Hook):
    """Rank 0's: the save before the end finds weights that are not finite."""

    def on_fault(self, trainer):
        raise NonFiniteError("step 3 is not saved")


class Broken(Hook):
    """Rank 0's: the save before the end fails as none should."""

    def on_fault(self, trainer):
        raise OSError("the disk is gone")


def no_disk(parallel):
    return Broken() if parallel.main else Hook()


def no_number(parallel):
    return Unsaved() if parallel.main else Hook()


class Bad(Hook):
    """A hook that fails at step 2."""

    def __init__(self, error):
        self.error = error

    def on_step_end(self, trainer):
        if trainer.state.step == 2:
            raise self.error


def saving_fails(parallel):
    return Bad(CheckpointError("ckpts/unet-2.safetensors cannot be written: No space left on device.")) if parallel.main else Hook()


class Picture:
    """A picture that knows who drew it."""

    def __init__(self, number):
        self.number = number

    def save(self, path):
        Path(path).write_text(str(self.number))


def previews(act):
    """A preview of 4 pictures at step 2, of which each process draws its share; act(rank) before each."""
    def make(parallel):
        def draw():
            act(parallel.rank)
            return [Picture(n) for n in range(4)[parallel.rank::parallel.world]]
        return PreviewHook(draw, Path("."), 2, SimpleNamespace(say=lambda line: print(line, flush=True), images=lambda *args: None), parallel)
    return make


def drawn(parallel):
    """Previews of steps 2, 4, 6: a collective in a step for which a process may have no batch."""
    return previews(lambda rank: None)(parallel)


def stop_at_3(rank, batch):
    """A signal comes in the step before the one that is lost."""
    if rank == 0 and batch.value // 2 == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def only(number, act):
    return lambda rank: act() if rank == number else None


def encoding_fails(parallel):
    if parallel.rank == 1:
        raise DataError("images/7.png cannot be read")
    parallel.gather("a share of the latents")


def wait_for(*paths):
    for _ in range(2000):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.01)


def send(numbers, to):
    """Once the steps run: each signal to each of the ranks."""
    def after(folder, pids):
        wait_for(*(folder / f"alive{rank}" for rank in range(len(pids))))
        for number in numbers:
            for rank in to:
                os.kill(pids[rank], number)
            time.sleep(0.2)
    return after


def stuck(rank, batch):
    """Rank 1 never comes; rank 0 waits for it in a call that Python cannot interrupt."""
    signals.PATIENCE = 0.5
    Path(f"alive{rank}").write_text("")
    if rank == 1:
        time.sleep(7)


def twice(folder, pids):
    wait_for(folder / "alive0", folder / "alive1")
    time.sleep(0.5)
    os.kill(pids[0], signal.SIGTERM)
    time.sleep(1.0)
    os.kill(pids[0], signal.SIGTERM)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


weight = nn.Parameter(torch.ones(1))  # what torch imports at the first step is imported before the fork
weight.grad = torch.zeros(1)
torch.optim.SGD([weight], lr=0.1).step()

OUT_OF_MEMORY = throw(torch.OutOfMemoryError("no memory"))

CONFIG = """
train: {{train_steps: 5, save_step: null, log_step: 1, cpu_threads: 1, workers: 0, scheduler: {{name: constant}}}}
model: {{pretrained_model_name_or_path: '{model}'}}
lora_unet:
  - {{lr: 1e-3, rank: 2, layers: ['re:.*attn2$'], dropout: 0.2}}
lora_text_encoder:
  - {{lr: 1e-3, rank: 2, layers: ['re:.*self_attn$'], dropout: 0.2}}
data:
  first:
    batch_size: 2
    cache_latents: none
    source: {{a: {{img_root: '{images}', caption_file: '{images}', word_names: {{pt1: thing}}, tag_shuffle: true, caption_dropout: 0.2, flip: true}}}}
    bucket: {{target_area: 4096, step_size: 32, num_bucket: 2, crop: random}}
  second:
    batch_size: 1
    cache_latents: disk
    cache_dir: cache
    source: {{b: {{img_root: '{images}', repeats: 2}}}}
    bucket: {{sizes: [[64, 64]]}}
"""


def whole(*words, main=None, model="GROUP_MODEL", config=CONFIG):
    """A run of train_ac on the model and images that the environment names (GROUP_MODEL or GROUP_SDXL, GROUP_IMAGES)."""
    def work(rank):
        from hcpdiff import train_ac

        Path("cfg.yaml").write_text(config.format(model=os.environ[model], images=os.environ["GROUP_IMAGES"]), encoding="utf-8")
        args = SimpleNamespace(cfg="cfg.yaml", overrides=["exp_dir=run", *words], allow_target=[])
        return main(args) if main else train_ac.train(args, None)
    return work


def alone(rank):
    """The command for one device, started as two."""
    from hcpdiff import train_ac_single

    return whole("train.train_steps=1", main=train_ac_single.main)(rank)


JOINT = """
train: {{train_steps: 2, save_step: null, cpu_threads: 1, workers: 0, scheduler: {{name: constant}}}}
model: {{pretrained_model_name_or_path: '{model}'}}
lora_unet:
  - {{lr: 1e-2, rank: 2, layers: ['re:.*attn.$', 're:.*conv1$']}}
lora_text_encoder:
  - {{lr: 1e-2, rank: 2, layers: ['re:.*self_attn$']}}
data:
  one:
    source: {{a: {{img_root: '{images}', repeats: 2}}}}
    bucket: {{sizes: [[64, 64]]}}
"""


def noted(*words):
    """A run of two steps; rank 0 keeps in noted.pt what all processes together give to each step, the types of half-precision copies that were multiplied with, and how many
    numbers it summed up with the others at a time."""
    def work(rank):
        gradients, copies, sums, clip, fresh, add = [], [], [], Gradients.clip, Shadow.fresh, torch.distributed.all_reduce
        Gradients.clip = lambda self, *most: gradients.append(self.values.clone()) or clip(self, *most)
        Shadow.fresh = lambda self: copies.append(self.dtype) or fresh(self)
        torch.distributed.all_reduce = lambda tensor, *args, **keys: sums.append(tensor.numel()) or add(tensor, *args, **keys)
        code = whole(*words, config=JOINT)(rank)
        if rank == 0:
            torch.save((gradients, copies, sums), "noted.pt")
        return code
    return work


def crowded(*numbers):
    """A run whose frozen text encoder is asked in the steps and finds no room then on the devices of these ranks; each notes how often."""
    def work(rank):
        def ahead(self, *coming, device=None, real=FrozenText.ahead, **more):
            self.held = 1
            if rank in numbers and self.trainer is not None and device is None:
                with Path(f"crowded{rank}").open("a") as file:
                    file.write(f"{self.trainer.state.step + 1}\n")
                raise torch.OutOfMemoryError("no room")
            return real(self, *coming, device=device, **more)

        FrozenText.ahead = ahead
        return whole("lora_text_encoder=[]")(rank)
    return work


# name: (processes, what each does, what is done to them)
ALL = {
    "well": (3, lambda rank: member(rank, hooks=[previews(lambda rank: None)]), None),
    "config": (3, lambda rank: member(rank, before=faulty_config), None),
    "data": (3, lambda rank: member(rank, at(1, 3, throw(DataError("images/3.png is damaged")))), None),
    "lost_other": (2, lambda rank: member(rank, lost=([1], 3), hooks=[drawn]), None),
    "lost_both": (2, lambda rank: member(rank, lost=([0, 1], 3), hooks=[drawn]), None),
    "lost_lag": (2, lambda rank: member(rank, lost=([1], 3), lag=True, hooks=[drawn]), None),
    "lost_last": (2, lambda rank: member(rank, lost=([0], 5), lag=True, hooks=[drawn]), None),
    "lost_stopped": (2, lambda rank: member(rank, stop_at_3, lost=([1], 3), lag=True, hooks=[drawn]), None),
    "lost_bug": (2, lambda rank: member(rank, lost=([1], 3, ZeroDivisionError("of ours"))), None),
    "lost_full": (2, lambda rank: member(rank, lost=([1], 3), hooks=[no_number]), None),
    "lost_disk": (2, lambda rank: member(rank, lost=([1], 3), hooks=[no_disk]), None),
    "bug": (3, lambda rank: member(rank, at(2, 3, lambda: 1 / 0)), None),
    "memory": (3, lambda rank: member(rank, at(1, 3, OUT_OF_MEMORY)), None),
    "nan": (3, lambda rank: member(rank, lambda rank, batch: float("nan") if rank == 1 and batch.value > 4 else None), None),
    "saving": (3, lambda rank: member(rank, hooks=[saving_fails]), None),
    "killed": (3, lambda rank: member(rank, at(1, 3, kill_self)), None),
    "drawing": (2, lambda rank: member(rank, hooks=[previews(only(1, throw(HCPError("no memory"))))]), None),
    "drawing_bug": (2, lambda rank: member(rank, hooks=[previews(only(1, lambda: 1 / 0))]), None),
    "encoding": (2, lambda rank: member(rank, before=encoding_fails), None),
    "sigterm_one": (3, lambda rank: member(rank, slowly, steps=300), send([signal.SIGTERM], to=[1])),
    "sigint_all": (2, lambda rank: member(rank, slowly, steps=300), send([signal.SIGINT, signal.SIGTERM], to=[0, 1])),
    "one": (1, whole("train.gradient_accumulation_steps=2"), None),
    "parts": (2, whole("train.train_steps=3"), None),
    "resumed": (2, whole("train.resume=../parts/run"), None),
    "sdxl_one": (1, whole("train.gradient_accumulation_steps=2", model="GROUP_SDXL"), None),
    "sdxl_parts": (2, whole("train.train_steps=3", model="GROUP_SDXL"), None),
    "sdxl_resumed": (2, whole("train.resume=../sdxl_parts/run", model="GROUP_SDXL"), None),
    "joint": (1, noted("data.one.batch_size=14"), None),
    "halves": (2, noted("data.one.batch_size=7"), None),
    "joint_bf16": (1, noted("data.one.batch_size=2", "train.gradient_accumulation_steps=2", "mixed_precision=bf16"), None),
    "halves_bf16": (2, noted("data.one.batch_size=2", "mixed_precision=bf16"), None),
    "crowded_first": (2, crowded(0), None),
    "crowded_others": (3, crowded(1, 2), None),
    "alone": (2, alone, None),
    "stuck": (2, lambda rank: member(rank, stuck), twice),
}

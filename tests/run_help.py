"""Whole runs in this process, on a tiny model: made, stopped after a step, resumed, and compared bit for bit."""

import copy
import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.families.base import Models
from hcpdiff.families.place import Place
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.run import Run
from hcpdiff.train.signals import StopRequest
from hcpdiff.train.trainer import Hook


class StopAfter(Hook):
    """Asks the run to stop as a SIGTERM does, or raises (`crash`; 'inside': in the second micro-batch of the step that follows), after a step. A stop is asked
    for before the step, and comes after it."""

    def __init__(self, step: int, crash: bool | str, stop: StopRequest):
        self.step, self.crash, self.stop = step, crash, stop

    def on_epoch_begin(self, trainer, epoch: int) -> None:
        self._ask(trainer.state.step)

    def on_step_end(self, trainer) -> None:
        if self.crash and trainer.state.step == self.step:
            if self.crash != "inside":
                raise Crash
            trainer.loss = self._one_more(trainer.loss)
        self._ask(trainer.state.step)

    def _one_more(self, loss: Callable) -> Callable:
        left = [loss]

        def once(batch):
            if not left:
                raise Crash
            return left.pop()(batch)

        return once

    def _ask(self, done: int) -> None:
        if not self.crash and done == self.step - 1:
            self.stop.signal = signal.SIGTERM


class Crash(BaseException):
    """A run that dies between two saves."""


_loaded: dict[str, Models] = {}


def _load(load: Callable[..., Models], place: Place, *args, seen: Callable, **more) -> Models:
    """What `load` gives, read once, unless the files have changed. Each run has its own copy of the modules, which takes half of the time."""
    files = sorted(place.path.rglob("*")) if place.path.is_dir() else [place.path]
    key = str((place, args, more, [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]))
    if key not in _loaded:
        _loaded[key] = load(place, *args, **more)
    models = _loaded[key]
    models = copy.deepcopy(models, {id(part): part for part in (models.family, *models.tokenizers.values())})
    for part in models.modules:
        seen(part, models)
    return models


class Stoppable(Run):
    """A run that stops itself after a step."""

    def __init__(self, config: str, overrides: list[str], step: int | None, crash: bool | str):
        super().__init__(load(config, overrides, RunConfig), Parallel())
        self.stopper = [StopAfter(step, crash, self.stop)] if step else []

    def _load_model(self) -> None:
        with mock.patch.object(self.base.family, "load", functools.partial(_load, self.base.family.load)):
            super()._load_model()

    def _hooks(self) -> list:
        return [*super()._hooks(), *self.stopper]


def run(config: str, *overrides: str, stop: int | None = None, crash: bool | str = False) -> tuple[Run, str]:
    """(the run, its whole log) of a run in this process; `stop`: the step after which it stops (and saves) or, with `crash`, dies."""
    one = Stoppable(config, list(overrides), stop, crash)
    try:
        code = one.train()
        assert code == (128 + signal.SIGTERM if stop else 0), code
    except Crash:
        assert crash
    return one, (one.folder / "train.log").read_text(encoding="utf-8")


def images(folder: Path, count: int = 5, sizes=((72, 64), (96, 64))) -> None:
    """Noise pictures with captions of four tags."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.effect_noise(sizes[i % len(sizes)], 20 * i + 10).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red, blue, number {i}, green", encoding="utf-8")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tblog"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def age(folder: Path) -> None:
    """Makes TensorBoard's files of a run older by an hour: their names hold seconds and must sort before those of a resume, and runs of users are never so close."""
    for path in sorted((folder / "tblog").iterdir()):  # the oldest first: a process that is killed at it leaves them in their order
        words = path.name.split(".")
        words[3] = f"{int(words[3]) - 3600:010d}"
        path.rename(path.with_name(".".join(words)))


def assert_same_run(whole: Path, parts: Path, step: int) -> None:
    """Weight files, optimizer, place in the data and scalars of two run folders after `step` steps are the same bits."""
    from safetensors.torch import load_file

    names = sorted(path.name for path in (whole / "ckpts").glob(f"*-{step}.safetensors"))
    files = [f"ckpts/{name}" for name in names] + [f"states/{step}/state.safetensors"]
    assert names
    for name in files:
        a, b = load_file(whole / name), load_file(parts / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    trees = [json.loads((folder / "states" / str(step) / "state.json").read_text(encoding="utf-8"))["tree"] for folder in (whole, parts)]
    assert all(trees[0][key] == trees[1][key] for key in ("step", "positions", "skipped", "loss_scale", "optimizer", "layout"))
    curves = [scalars(folder) for folder in (whole, parts)]
    assert curves[0] == curves[1]
    assert all([number for number, _ in values] == list(range(1, step + 1)) for values in curves[0].values())

"""`model.compile`: the blocks that a model repeats, each compiled as a whole, so that blocks of one kind are compiled once.

Compiled are a model's regions (`Family.regions`), in place: modules keep their class, paths and parameter names, and checkpoints know nothing of it. What lies
between them stays as it is, gradient checkpointing included, whose borders are the regions' own. Pictures are drawn without it (`eagerly`): their sizes and
modes would all have to be compiled for a few steps each.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import nn

from .. import device as machine
from ..config.schema import ModelConfig
from ..errors import ConfigError, HCPError
from ..families.base import Models

SPARE = 4  # compilations a shape and region beyond the one that is expected: the first pass of a size that turns out to be 1, a mode that changes
BACKEND = "inductor"
EVERY = 30.0  # seconds between two lines on a compilation that goes on
HEARTBEAT = "hcpdiff-compiling"  # name of the thread


def check_compile(model: ModelConfig, device: torch.device) -> None:
    """ConfigError where `model.compile` is asked for and this machine cannot compile. Tried once on a small function, before anything large is read."""
    if model.compile:
        machine.check_compiler(device, "model.compile")


def compile_regions(models: Models, components: Collection[str], shapes: Collection[tuple], attention: str, backend: str = "") -> str:
    """Has the regions of these components compiled when they are first called; says what.

    shapes: (samples, width, height) that training will meet. One: kernels for just this size. Several: kernels for any size, or each region would be compiled
    for each of them. attention: kernels of another package cannot be looked into, so the graph may break there.
    """
    import torch._dynamo

    regions = {name: models.family.regions(models, name) for name in components}
    kinds = Counter(type(region).__name__ for own in regions.values() for region in own)
    limit = max(8, sum(kinds.values()) * (len(shapes) + SPARE))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, limit)
    for region in (region for own in regions.values() for region in own):
        region.compile(backend=backend or BACKEND, fullgraph=attention != "xformers", dynamic=len(shapes) > 1, **_options(backend or BACKEND))
    sizes = "any size" if len(shapes) > 1 else "one size"
    return f"{', '.join(f'{count} {kind}' for kind, count in kinds.items())}, for {sizes}; compiled when they are first used, which takes a while"


def _options(backend: str) -> dict:
    """Dropout draws what it draws without compiling: a step's seed then means the same in both."""
    return {"options": {"fallback_random": True}} if backend == "inductor" else {}


@contextmanager
def eagerly(compiled: bool) -> Iterator[None]:
    """Nothing is compiled, and nothing that is compiled is used. compiled: whether anything is; else torch's compiler need not be imported."""
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


@contextmanager
def heartbeat(say: Callable[[str], None], every: float = 0.0) -> Iterator["Heartbeat"]:
    """Inside, whatever is compiled for long is told every so many seconds, whenever that is: a step whose size needs kernels of its own compiles them in its turn."""
    from torch._dynamo.callback import callback_handler

    beat = Heartbeat(say, every or EVERY)
    callback_handler.register_start_callback(beat.begin)
    callback_handler.register_end_callback(beat.end)
    try:
        yield beat
    finally:
        for remove, callback in ((callback_handler.remove_start_callback, beat.begin), (callback_handler.remove_end_callback, beat.end)):
            with suppress(ValueError):  # torch._dynamo.reset() has removed it
                remove(callback)
        beat.stop()


class Heartbeat:
    """A thread that is there while blocks are compiled one after another, and gone when none has been for as long as it takes to the next line."""

    def __init__(self, say: Callable[[str], None], every: float):
        self.say, self.every = say, every
        self.turn, self.over = threading.Lock(), threading.Event()
        self.thread: threading.Thread | None = None
        self.began, self.ended = 0.0, 0.0
        self.compiling = False
        self.times: list[list[float]] = []  # when each compilation began and ended

    def begin(self, told: object) -> None:
        with self.turn:
            self.compiling = True
            self.times.append([time.monotonic(), math.inf])
            if self.thread is None:
                self.began = time.monotonic()
                self.thread = threading.Thread(target=self._run, name=HEARTBEAT, daemon=True)
                self.thread.start()

    def end(self, told: object) -> None:
        with self.turn:
            self.compiling, self.ended = False, time.monotonic()
            self.times[-1][1] = self.ended

    def compiled_at(self, moment: float) -> bool:
        """Whether anything was being compiled then (time.monotonic())."""
        return any(began <= moment <= ended for began, ended in self.times)

    def stop(self) -> None:
        """Returns when there is no thread any more."""
        self.over.set()
        thread = self.thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while not self.over.wait(self.every):
            with self.turn:
                now = time.monotonic()
                idle = 0.0 if self.compiling else now - self.ended
                if idle >= self.every:
                    self.thread = None
                    return
            if idle < self.every / 6:  # between two blocks the first of them is used
                self.say(f"still compiling: {now - self.began:.0f} s so far")


def compile_failed(error: RuntimeError) -> HCPError | None:
    """What to say when a compiler gives up in the middle of a step; None for other errors."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    return ConfigError(f"model.compile: a part of the model could not be compiled: {machine.first_line(error)} Set model.compile: false; the run is the same without it.")

"""Prompts -> conditioning: encoded ahead while the text encoder is frozen, encoded in the step while it learns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..data.dataset import TrainData
from ..data.text_cache import TextCache
from ..device import send
from ..errors import ConfigError
from ..families.base import Conditioning, Models, text_components
from .trainer import Hook

BLANK = ""  # what the probe before the first step of a GPU asks for
HELD = 2**31  # bytes of encoded prompts: of one chunk some 9000 of SD1.x in fp32, 6700 of SDXL in half precision


class Encoder:
    """Encodes prompts with the base model's tokenizer and text encoder."""

    def __init__(self, models: Models, repeats: int, clip_skip: int):
        self.models, self.repeats, self.clip_skip = models, repeats, clip_skip

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        family = self.models.family
        return family.encode_text(self.models, family.tokenize(self.models, prompts, self.repeats), self.clip_skip)


class FrozenText(Hook):
    """Conditioning that was encoded ahead and is kept on the CPU: the prompts of the coming steps, as many as `held` bytes hold. Often that is the whole run's, and the text
    encoders can be let go (`whole`); else the steps after them come when the first of these asks, and between such times the encoders wait on the CPU."""

    def __init__(self, encode: Encoder, data: TrainData, device: torch.device, held: int = HELD, share: tuple[int, int] = (0, 1), say: Callable[[str], None] = lambda line: None,
                 less_memory: str = ""):
        """share: (rank, world); the other ranks' prompts are encoded by them. less_memory: what to try where they find no room."""
        self.encode, self.data, self.device, self.held, self.whole = encode, data, device, held, False
        self.share, self.say, self.less_memory = share, say, less_memory
        self.batch = 1 if device.type == "cpu" else 16
        self.cache, self.trainer = TextCache(self._items, self.batch), None

    @torch.no_grad()
    def _items(self, prompts: list[str]) -> list[Conditioning]:
        """Always of as many prompts as a batch holds: a GPU's last bits depend on the number of rows, and so would on where a run was resumed."""
        cond = self.encode(prompts + prompts[-1:] * (self.batch - len(prompts))).to("cpu")
        lost = [prompt for prompt, hidden in zip(prompts, cond.hidden) if not hidden.isfinite().all()]
        if lost:
            raise ConfigError([f"the text encoder gives values that are not finite for {prompt!r}, in {cond.hidden.dtype}. Set mixed_precision: fp32, or use another base model."
                               for prompt in lost])
        return [cond.select(slice(i, i + 1)).clone() for i in range(len(prompts))]

    @contextmanager
    def working(self, device: torch.device | None = None) -> Iterator[None]:
        """The text encoders on the device (or on another one) inside, and on the CPU after."""
        modules = [self.encode.models.modules[component.name] for component in text_components(self.encode.models.family)]
        try:
            for module in modules:
                module.to(device or self.device)
            yield
        finally:
            for module in modules:
                module.to("cpu")

    def ahead(self, positions: Sequence, steps: int, progress: Callable[[int, int], Any] | None = None, device: torch.device | None = None) -> None:
        """Encodes what this rank is asked for in the next `steps` steps from `positions`, as far as it may be held; `whole` says whether that was all."""
        probed = [] if self.device.type == "cpu" else [BLANK]
        with self.working(device):
            first = next(iter(self.data.prompts_ahead(positions, steps, 1, *self.share)[0]), BLANK)  # a rank may have nothing to do
            alone = self.cache.fill([first], keep=True)  # shows how large they are
            prompts, self.whole = self.data.prompts_ahead(positions, steps, self.held // self.cache.items[first].nbytes, *self.share)
            self.cache.fill([*probed, *prompts], progress=progress and (lambda done, total: progress(alone + done, alone + total)))

    def _ahead_in_a_step(self) -> None:
        """As `ahead`, beside all that a step holds. Where the device has no room left the CPU encodes: slow, and other in the last bits as other devices are, but a run
        that has gone on for hours is not lost for the sake of its captions."""
        coming = self.trainer.state.positions, self.trainer.total_steps - self.trainer.state.step
        try:
            return self.ahead(*coming)
        except torch.OutOfMemoryError:  # left before going on: the error holds what was on the device
            pass
        if self.share[0] == 0:
            self._say_no_room(f"{self.device} has")
        else:  # only the first process has a place to say it: it learns of it by the step's sum
            self.trainer.gradients.crowded[self.share[0]] = 1.0
        return self.ahead(*coming, device=torch.device("cpu"))

    def _say_no_room(self, which: str) -> None:
        self.say(f"warning: {which} no room left for the text encoders, which encode the prompts of the coming steps: they do so on the CPU, which takes longer. {self.less_memory}")

    def on_epoch_begin(self, trainer, epoch: int) -> None:
        """Notes who knows where the run stands."""
        self.trainer = trainer

    def on_step_end(self, trainer) -> None:
        """The first process says what the others had no room for, once a step's numbers are known."""
        for ranks in trainer.take_crowded():
            numbers = ", ".join(map(str, ranks))
            self._say_no_room(f"the devices of processes {numbers} have" if len(ranks) > 1 else f"the device of process {numbers} has")

    on_end = on_stop = on_step_end

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        if not all(prompt in self.cache for prompt in prompts):
            self._ahead_in_a_step()
        cond = Conditioning.cat(self.cache.get(list(prompts)))
        return Conditioning(send(cond.hidden, self.device), None if cond.pooled is None else send(cond.pooled, self.device))

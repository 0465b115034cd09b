"""Prompts -> conditioning: encoded ahead once an epoch while the text encoder is frozen, encoded in the step while it learns."""

from collections.abc import Callable, Sequence

import torch

from ..data.text_cache import TextCache
from ..device import send
from ..errors import ConfigError
from ..families.base import Conditioning, Models
from .trainer import Hook


class Encoder:
    """Encodes prompts with the base model's tokenizer and text encoder."""

    def __init__(self, models: Models, repeats: int, clip_skip: int):
        self.models, self.repeats, self.clip_skip = models, repeats, clip_skip

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        family = self.models.family
        return family.encode_text(self.models, family.tokenize(self.models, prompts, self.repeats), self.clip_skip)


class FrozenText(Hook):
    """Conditioning from a cache on the CPU that holds an epoch's distinct prompts; what is not there is encoded when asked for."""

    def __init__(self, encode: Encoder, epoch_prompts: Callable[[Sequence], list[str]], device: torch.device):
        self.encode, self.epoch_prompts = encode, epoch_prompts
        self.device = device
        self.cache = TextCache(self._items, batch_size=1 if device.type == "cpu" else 16)

    @torch.no_grad()
    def _items(self, prompts: list[str]) -> list[Conditioning]:
        cond = self.encode(prompts).to("cpu")
        lost = [prompt for prompt, hidden in zip(prompts, cond.hidden) if not hidden.isfinite().all()]
        if lost:
            raise ConfigError([f"the text encoder gives values that are not finite for {prompt!r}, in {cond.hidden.dtype}. Set mixed_precision: fp32, or use another base model."
                               for prompt in lost])
        return [cond.select(slice(i, i + 1)) for i in range(len(prompts))]

    def on_epoch_begin(self, trainer, epoch: int) -> None:
        """Encodes what the epoch will ask for."""
        self.cache.fill(self.epoch_prompts(trainer.state.positions))

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        cond = Conditioning.cat(self.cache.get(list(prompts)))
        return Conditioning(send(cond.hidden, self.device), None if cond.pooled is None else send(cond.pooled, self.device))

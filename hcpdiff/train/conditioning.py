"""Prompts -> conditioning: encoded ahead once an epoch while the text encoder is frozen, encoded in the step while it learns."""

from collections.abc import Callable, Sequence

import torch

from ..data.text_cache import TextCache
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
        return [cond.select(slice(i, i + 1)) for i in range(len(prompts))]

    def on_epoch_begin(self, trainer, epoch: int) -> None:
        """Encodes what the epoch will ask for."""
        self.cache.fill(self.epoch_prompts(trainer.state.positions))

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning.cat(self.cache.get(list(prompts))).to(self.device)

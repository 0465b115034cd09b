"""What a frozen text encoder makes of prompts, kept by prompt. Knows nothing of what an item is."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class TextCache(Generic[T]):
    """`encode` turns prompts into as many items. Prompts are encoded `batch_size` at a time: 1 makes an item independent of what else was asked for,
    down to the last bit; more is faster on a GPU."""

    def __init__(self, encode: Callable[[list[str]], Sequence[T]], batch_size: int = 1):
        self.encode, self.batch_size = encode, batch_size
        self.items: dict[str, T] = {}

    def fill(self, prompts: Iterable[str], keep: bool = False, progress: Callable[[int, int], Any] | None = None) -> int:
        """Encode those of the prompts that are missing and forget all others (unless keep). How many were encoded comes back."""
        wanted = list(dict.fromkeys(prompts))
        if not keep:
            self.items = {prompt: self.items[prompt] for prompt in wanted if prompt in self.items}
        missing = [prompt for prompt in wanted if prompt not in self.items]
        for start in range(0, len(missing), self.batch_size):
            part = missing[start:start + self.batch_size]
            self.items.update(zip(part, self.encode(part), strict=True))
            if progress is not None:
                progress(start + len(part), len(missing))
        return len(missing)

    def get(self, prompts: Sequence[str]) -> list[T]:
        """Items of prompts, in order; missing ones are encoded now."""
        if any(prompt not in self.items for prompt in prompts):
            self.fill(prompts, keep=True)
        return [self.items[prompt] for prompt in prompts]

    def __contains__(self, prompt: str) -> bool:
        return prompt in self.items

    def __len__(self) -> int:
        return len(self.items)

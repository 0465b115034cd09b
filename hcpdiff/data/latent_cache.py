"""Latents encoded once and kept: in memory, or on disk under keys made of content.

An entry is what one view of one image encodes to: {"mean": (C,h,w), "std": (C,h,w)} of the VAE's posterior in the dtype that `encode` returns, and
{"mask": (h,w) fp32} where the source has loss masks. Images are encoded one by one, so that an entry never depends on what was encoded beside it.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .sample import TrainDataset, load_views, stack_pixels

Entry = dict[str, Tensor]
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # (1,3,H,W) fp32 in [-1,1] -> mean, std (1,C,h,w)
Exchange = Callable[[Any], list[Any]]  # one object of every rank, in rank order (torch.distributed.all_gather_object)
_ROUND = 64  # images that a rank encodes between two exchanges


class MemoryStore:
    """Entries of one dataset by (image, view)."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, int], Entry] = {}

    def get(self, image: int, view: int) -> Entry:
        """One entry; KeyError if it was never filled in."""
        return self.entries[image, view]

    def fill(self, data: TrainDataset, encode: Encode, factor: int, rank: int, world: int, exchange: Exchange | None, tick: Callable[[int], None]) -> None:
        """Encode what is missing. With `exchange`, each rank encodes its share and gets the others'; without, each encodes everything."""
        images = [image for image in range(len(data)) if (image, 0) not in self.entries]
        shares = [images[number::world] for number in range(world)] if exchange else [images]
        mine = shares[rank if exchange else 0]
        faults: list[str] = []
        for start in range(0, max(len(share) for share in shares), _ROUND):
            made = {}
            for image, views in encoded(data, mine[start:start + _ROUND], encode, factor, faults):
                made.update({(image, number): entry for number, entry in enumerate(views)})
                tick(1)
            for part, part_faults in exchange((made, faults)) if exchange else [(made, faults)]:
                self.entries.update(part)
                faults = list(dict.fromkeys(faults + part_faults))
        raise_damaged(faults)


def raise_damaged(faults: list[str]) -> None:
    """One error about all images that could not be encoded."""
    if faults:
        raise DataError([f"{len(faults)} images cannot be read. Repair or remove them, or set skip_bad_images: true:\n" + "\n".join(f"  {fault}" for fault in sorted(faults))])


def encoded(data: TrainDataset, images: Sequence[int], encode: Encode, factor: int, faults: list[str]) -> Iterator[tuple[int, list[Entry]]]:
    """(image, an entry per view) in order; decoding runs ahead in threads. Images that cannot be read become faults."""
    for image, loaded in in_threads(lambda image: _load(data, image, factor), images):
        if isinstance(loaded, DataError):
            faults += loaded.faults
            continue
        yield image, [make_entry(data, image, rgb, mask, encode) for rgb, mask in loaded]


def _load(data: TrainDataset, image: int, factor: int) -> list[tuple[np.ndarray, np.ndarray | None]] | DataError:
    try:
        return load_views(data, image, data.views(image), factor)
    except DataError as error:
        return error


def make_entry(data: TrainDataset, image: int, rgb: np.ndarray, mask: np.ndarray | None, encode: Encode) -> Entry:
    """Encode one view -> its entry on the CPU. Non-finite latents are an error that names the image."""
    mean, std = (part[0].detach().to("cpu", copy=True).contiguous() for part in encode(stack_pixels([rgb])))
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise DataError(f"{data.name}/{data.image_id(image)}: the VAE's latents are not finite; run it in fp32 (mixed_precision: fp32) or use another VAE")
    return {"mean": mean, "std": std} if mask is None else {"mean": mean, "std": std, "mask": torch.from_numpy(mask)}


def in_threads(work: Callable[[int], Any], items: Sequence[int], most: int | None = None) -> Iterator[tuple[int, Any]]:
    """(item, work(item)) in order, a few made ahead."""
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > (most or 2 * threads):
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()

"""The order of training as a pure function of (seed, epoch, data): which images make up which step, and with which weight.

World size and loader workers play no part in an epoch's order: an epoch of a dataset is a fixed list of chunks (micro-batches of one
bucket), and a step takes the next `micro_per_step` = processes x accumulation of them from every dataset.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..randomness import generator


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One image at one place of the training. `weight` is such that the step's loss is the sum over its samples of weight x loss."""

    dataset: int
    image: int
    occurrence: int
    epoch: int
    weight: float


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one dataset and one size (width, height) that go through the model together."""

    dataset: int
    size: tuple[int, int]
    samples: tuple[SampleRef, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: the micro-batches of all ranks."""

    index: int
    micro: tuple[MicroBatch, ...]

    def of_rank(self, rank: int, world: int) -> list[MicroBatch]:
        """What this rank does of the step; per dataset every world-th micro-batch. May be empty at an epoch's end."""
        datasets = sorted({micro.dataset for micro in self.micro})
        return [micro for number in datasets for micro in [m for m in self.micro if m.dataset == number][rank::world]]


@dataclass(frozen=True, slots=True)
class Position:
    """How far a dataset is: chunks of that epoch already used."""

    epoch: int
    chunk: int


@dataclass(frozen=True)
class DatasetPlan:
    """What the plan must know of a dataset. `buckets`: size -> image numbers (int array); `repeats`: per image number."""

    name: str
    batch_size: int
    loss_weight: float
    buckets: Sequence[tuple[tuple[int, int], np.ndarray]]
    repeats: np.ndarray


class _Epoch:
    """The chunks of one dataset's epoch; a chunk is cut out when asked for."""

    def __init__(self, pools: list[tuple[np.ndarray, np.ndarray]], batch_size: int, rng: np.random.Generator):
        self.order = [rng.permutation(len(images)) for images, _ in pools]
        starts = [(bucket, start) for bucket, (images, _) in enumerate(pools) for start in range(0, len(images), batch_size)]
        self.chunks = np.asarray(starts, dtype=np.int64).reshape(-1, 2)[rng.permutation(len(starts))]

    def __len__(self) -> int:
        return len(self.chunks)


class Plan:
    """The whole training's order. `micro_per_step`: micro-batches of each dataset in one step, over all processes."""

    def __init__(self, datasets: Sequence[DatasetPlan], micro_per_step: int, seed: int):
        self.datasets, self.micro_per_step, self.seed = list(datasets), micro_per_step, seed
        self._pools = [[_occurrences(images, data.repeats) for _, images in data.buckets] for data in self.datasets]
        self._epoch = functools.lru_cache(maxsize=2 * len(self.datasets) + 1)(self._make_epoch)

    def _make_epoch(self, dataset: int, epoch: int) -> _Epoch:
        data = self.datasets[dataset]
        return _Epoch(self._pools[dataset], data.batch_size, generator(self.seed, "plan", data.name, epoch))

    def samples_per_epoch(self, dataset: int = 0) -> int:
        """Samples (images x repeats) in an epoch of a dataset."""
        return sum(len(images) for images, _ in self._pools[dataset])

    def chunks_per_epoch(self, dataset: int = 0) -> int:
        """Micro-batches in an epoch of a dataset; the same in every epoch."""
        size = self.datasets[dataset].batch_size
        return sum(-(-len(images) // size) for images, _ in self._pools[dataset])

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch of the first dataset."""
        return -(-self.chunks_per_epoch(0) // self.micro_per_step)

    def shapes(self) -> set[tuple[int, int, int]]:
        """(samples, width, height) of every micro-batch that there can be: full ones, and what is left of a bucket."""
        found = set()
        for data, pools in zip(self.datasets, self._pools):
            for (size, _), (images, _) in zip(data.buckets, pools):
                counts = {min(len(images), data.batch_size), len(images) % data.batch_size}
                found |= {(count, *size) for count in counts if count}
        return found

    def start_of(self, epoch: int) -> list[Position]:
        """Where every dataset is when an epoch of the first one begins, in a run with this micro_per_step from the start."""
        used = epoch * self.steps_per_epoch * self.micro_per_step
        others = [Position(*divmod(used, self.chunks_per_epoch(number))) for number in range(1, len(self.datasets))]
        return [Position(epoch, 0), *others]

    def steps(self, start: Sequence[Position] | None = None, first_index: int = 0) -> Iterator[tuple[Step, list[Position]]]:
        """Steps without end from `start` (default: the beginning), each with the positions after it."""
        positions, index = list(start or self.start_of(0)), first_index
        while True:
            step, positions = self.step(positions, index)
            yield step, positions
            index += 1

    def epoch_steps(self, start: Sequence[Position]) -> Iterator[tuple[Step, list[Position]]]:
        """Steps from `start` to the end of the first dataset's epoch that `start` lies in."""
        first = self._normal(0, start[0])
        for step, after in self.steps([first, *start[1:]]):
            yield step, after
            if after[0].epoch > first.epoch:
                return

    def step(self, positions: Sequence[Position], index: int) -> tuple[Step, list[Position]]:
        """The step that begins at `positions`, and the positions after it."""
        micro, after = [], []
        for number, position in enumerate(positions):
            taken, position = self._take(number, self._normal(number, position))
            count = sum(len(part[2]) for part in taken)
            weight = self.datasets[number].loss_weight / count
            micro += [self._micro(number, *part, weight) for part in taken]
            after.append(position)
        return Step(index, tuple(micro)), after

    def _normal(self, dataset: int, position: Position) -> Position:
        """An epoch's end is the next one's beginning."""
        return position if position.chunk < self.chunks_per_epoch(dataset) else Position(position.epoch + 1, 0)

    def _take(self, dataset: int, position: Position) -> tuple[list[tuple[int, int, np.ndarray]], Position]:
        """The next chunks as (epoch, bucket, places in its pool); the first dataset stops at its epoch's end, the others run on."""
        taken, size = [], self.datasets[dataset].batch_size
        while len(taken) < self.micro_per_step:
            epoch = self._epoch(dataset, position.epoch)
            bucket, start = (int(value) for value in epoch.chunks[position.chunk])
            taken.append((position.epoch, bucket, epoch.order[bucket][start:start + size]))
            position = Position(position.epoch, position.chunk + 1)
            if position.chunk == len(epoch):
                position = Position(position.epoch + 1, 0)
                if dataset == 0:
                    break
        return taken, position

    def _micro(self, dataset: int, epoch: int, bucket: int, places: np.ndarray, weight: float) -> MicroBatch:
        images, occurrences = self._pools[dataset][bucket]
        refs = (SampleRef(dataset, int(images[place]), int(occurrences[place]), epoch, weight) for place in places)
        return MicroBatch(dataset, self.datasets[dataset].buckets[bucket][0], tuple(refs))


def _occurrences(images: np.ndarray, repeats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(image, occurrence) of every sample that an epoch holds of these images."""
    times = np.asarray(repeats, dtype=np.int64)[images]
    first = np.repeat(np.cumsum(times) - times, times)
    return np.repeat(np.asarray(images, dtype=np.int64), times), np.arange(times.sum()) - first

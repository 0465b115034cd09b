"""All training data of a run: indexed, checked, bucketed, planned; then cached and served as batches."""

from collections.abc import Callable, Generator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..threads import usable_cores
from . import report as reports
from .bucket import Buckets, fixed_buckets, ratio_buckets
from .encoding import Encode, Entry
from .latent_cache import DiskStore, Exchange, MemoryStore, decoded_before
from .loader import StepBatches, step_batches
from .plan import DatasetPlan, MicroBatch, Plan, Position, Step
from .sample import Batch, BatchMaker, TrainDataset, to_unit
from .source import Source, read_source

_MOST_LOOKED_AT = 200_000  # samples whose prompts are made before the first step, some seconds
_MOST_SAMPLES = 20_000_000  # of an epoch; some 100 bytes each


def build_train_data(data: Mapping[str, Any], *, seed: int, micro_per_step: int, vae_factor: int = 8, latent_channels: int = 4, step_default: int | None = None,
                     workers: int | str = "auto", token_count: Callable[[str], int] | None = None, token_limit: int = 75) -> "TrainData":
    """The data of a run, from `cfg.data` (name -> DatasetConfig).

    micro_per_step: processes x gradient accumulation. vae_factor: pixels per latent cell and side. step_default: multiple of bucket sides, in pixels,
    where the config leaves step_size null (None: 8 x vae_factor). token_count: tokens of a prompt without begin and end marks; more than token_limit
    (75 x tokenizer_repeats) are reported. Raises one DataError with all faults.
    """
    faults: list[str] = []
    datasets, notices = [], []
    for name, config in data.items():
        made = _index(name, config, vae_factor, step_default or 8 * vae_factor, faults, notices)
        datasets += [made] if made else []
    if not data:
        faults.append("data: there is no dataset; add one, e.g. data.dataset1")
    if faults:
        raise DataError(faults)
    maker = BatchMaker(datasets, seed, vae_factor, latent_channels)
    plan = Plan([_plan_part(one) for one in datasets], micro_per_step, seed)
    return TrainData(maker, plan, workers, notices, token_count, token_limit)


def cache_mode(value: bool | str) -> str:
    """memory, disk or none, from what cache_latents says."""
    return {True: "memory", False: "none"}.get(value, value)


def _index(name: str, config: Any, factor: int, step_default: int, faults: list[str], notices: list[str]) -> TrainDataset | None:
    where = f"data.{name}"
    if not config.source:
        faults.append(f"{where}.source: there is no source; add one, e.g. {where}.source.data_source1.img_root")
    sources, before = [], len(faults)
    mode = cache_mode(config.cache_latents)
    known_good = decoded_before(config.cache_dir) if mode == "disk" else (lambda path: False)
    for key, source in config.source.items():
        verify = mode == "none" or source.skip_bad_images  # cached images are all decoded while caching, before the first step
        sources.append(read_source(key, source, f"{where}.source.{key}", faults, verify, known_good))
    step = _step_size(config.bucket, where, factor, step_default, faults)
    if len(faults) > before or not sources:
        return None
    sizes = np.concatenate([source.sizes for source in sources])
    repeats = _repeats(sources)
    if repeats.sum() > _MOST_SAMPLES:
        faults.append(f"{where}: images x repeats are {repeats.sum()} samples in an epoch; at most {_MOST_SAMPLES} can be planned. Lower repeats and train more epochs.")
        return None
    buckets = _buckets(config.bucket, sizes, repeats, step)
    firsts = np.cumsum([0, *(len(source.keys) for source in sources)])[:-1]
    crop = config.bucket
    positions = (0.5,) if crop.crop == "center" or crop.crop_variants == 1 else tuple(np.linspace(0, 1, crop.crop_variants).tolist())
    made = TrainDataset(name, sources, firsts, sizes, buckets.sizes, buckets.assigned, positions, config.batch_size, config.loss_weight, mode, config.cache_dir)
    if buckets.too_small:
        lines = "\n".join("  {}: {} x {}".format(made.image_id(image), *made.size_of(image)) for image in buckets.too_small)
        faults.append(f"{where}.bucket.no_upscale: {len(buckets.too_small)} images are smaller than the smallest size; remove them or allow upscaling:\n{lines}")
        return None
    notices += [f"{where}.bucket: {notice}" for notice in buckets.notices]
    return made


def _step_size(bucket: Any, where: str, factor: int, default: int, faults: list[str]) -> int:
    """Multiple of bucket sides, checked against the VAE and the target area or the given sizes."""
    step = bucket.step_size or (factor if bucket.sizes else default)
    if step % factor:
        faults.append(f"{where}.bucket.step_size = {step} must be a multiple of {factor}, the VAE's factor")
    elif bucket.sizes is None and bucket.target_area < step * step:
        faults.append(f"{where}.bucket.target_area = {bucket.target_area:g} is less than one square of step_size ({step} x {step} = {step * step} pixels)")
    for number, size in enumerate(bucket.sizes or []):
        if len(size) != 2 or any(side < step or side % step for side in size):
            faults.append(f"{where}.bucket.sizes[{number}] = {list(size)} must be [width, height] in multiples of {step}")
    if bucket.sizes is not None and not bucket.sizes:
        faults.append(f"{where}.bucket.sizes is empty; give at least one [width, height] or null")
    return step


def _buckets(bucket: Any, sizes: np.ndarray, repeats: np.ndarray, step: int) -> Buckets:
    if bucket.sizes:
        return fixed_buckets(sizes, bucket.sizes, bucket.no_upscale)
    return ratio_buckets(sizes, repeats, float(bucket.target_area), bucket.num_bucket, step, bucket.no_upscale)


def _repeats(sources: Sequence[Source]) -> np.ndarray:
    return np.concatenate([np.full(len(source.keys), source.repeats, dtype=np.int64) for source in sources])


def _plan_part(data: TrainDataset) -> DatasetPlan:
    members = Buckets(data.bucket_sizes, data.assigned).members()
    return DatasetPlan(data.name, data.batch_size, data.loss_weight, members, _repeats(data.sources))


class TrainData:
    """Everything the trainer asks of the data. Built by `build_train_data`."""

    def __init__(self, maker: BatchMaker, plan: Plan, workers: int | str, notices: list[str], token_count: Callable[[str], int] | None, token_limit: int):
        self.maker, self.plan, self.datasets, self.notices = maker, plan, maker.datasets, notices
        self.token_count, self.token_limit = token_count, token_limit
        self.workers = self._worker_count(workers)
        self._stores: dict[int, Any] = {}

    def _worker_count(self, workers: int | str) -> int:
        if all(data.cache != "none" for data in self.datasets):
            return 0  # a thread is enough to draw noise
        return min(4, max(1, usable_cores() - 1)) if workers == "auto" else int(workers)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, which is the first dataset's."""
        return self.plan.steps_per_epoch

    @property
    def images(self) -> int:
        """Images of all datasets, each counted once."""
        return sum(len(data) for data in self.datasets)

    @property
    def all_cached(self) -> bool:
        """Whether no dataset needs the VAE once caching is done."""
        return all(data.cache != "none" for data in self.datasets)

    def main_size(self) -> tuple[int, int]:
        """(width, height) of the first dataset's bucket with the most images; of several the one nearest to square, then the largest, then the widest."""
        def rank(bucket: tuple[tuple[int, int], np.ndarray]) -> tuple:
            (width, height), images = bucket
            return len(images), Fraction(min(width, height), max(width, height)), width * height, width

        first = self.datasets[0]
        return max(Buckets(first.bucket_sizes, first.assigned).members(), key=rank)[0]

    def largest_batch(self) -> tuple[int, int, int]:
        """(samples, width, height) of the batch with most pixels, for a probe step."""
        found = []
        for data in self.datasets:
            repeats = _repeats(data.sources)
            found += [(min(data.batch_size, int(repeats[images].sum())), *size) for size, images in Buckets(data.bucket_sizes, data.assigned).members()]
        return max(found, key=lambda shape: shape[0] * shape[1] * shape[2])

    def prompts_ahead(self, start: Sequence[Position], steps: int, most: int, rank: int = 0, world: int = 1) -> tuple[list[str], bool]:
        """(distinct prompts of this rank's part of the coming steps from `start`, in order of use; whether these are all that it is asked for in the next `steps` steps).

        No step is begun after `most` prompts, or many samples, were looked at. Where an image has one prompt only, two epochs show all that there are.
        """
        shown = 2 * max(-(-self.plan.chunks_per_epoch(number) // self.plan.micro_per_step) for number in range(len(self.datasets)))
        if steps > shown * world and not any(source.prompter.draws for data in self.datasets for source in data.sources):
            found, whole = self._prompts(start, shown, most, 0, 1)  # in so many steps nearly every image comes to every rank
            if whole or world == 1:
                return found, whole
        return self._prompts(start, steps, most, rank, world)

    def _prompts(self, start: Sequence[Position], steps: int, most: int, rank: int, world: int) -> tuple[list[str], bool]:
        found: dict[str, None] = {}
        looked = 0
        for number, (step, _) in enumerate(self.plan.steps(start)):
            if number == steps or number and (len(found) >= most or looked >= _MOST_LOOKED_AT):
                return list(found), number == steps
            samples = [ref for micro in step.of_rank(rank, world) for ref in micro.samples]
            found.update(dict.fromkeys(map(self.maker.prompt, samples)))
            looked += len(samples)

    def cache_latents(self, encode: Encode, vae_id: str, rank: int = 0, world: int = 1, exchange: Exchange | None = None,
                      progress: Callable[[int, int], Any] | None = None) -> int:
        """Encode every view of every image of the datasets that cache latents; how many images this process has encoded.

        encode: pixels (1,3,H,W) fp32 in [-1,1] on the CPU -> mean, std (1,C,h,w), any device. vae_id: changes with whatever changes the result (weights, dtype).
        exchange: gathers one object from every rank (all_gather_object); every rank must then call this. progress(done, total) counts this rank's images.
        All images that cannot be read are in one DataError, on every rank.
        """
        total = sum(len(data) for data in self.datasets if data.cache != "none")
        total = -(-total // world) if exchange else total
        done = 0

        def tick(images: int) -> None:
            nonlocal done
            done += images
            if progress is not None:
                progress(done, total)

        for number, data in enumerate(self.datasets):
            if data.cache == "memory":
                store = self._stores.get(number)
                if store is None or store.vae_id != vae_id:
                    store = self._stores[number] = MemoryStore(data, vae_id, self.maker.vae_factor)
                store.fill(encode, rank, world, exchange, tick)
            elif data.cache == "disk":
                store = self._stores[number] = DiskStore(data.cache_dir, data, vae_id, self.maker.vae_factor, self.maker.latent_channels)
                store.fill(encode, rank, world, exchange, tick)
        return sum(store.encoded for store in self._stores.values())

    def _attach(self, batch: Batch, micro: MicroBatch) -> Batch:
        """Complete a batch in the main process: pixels as numbers, or the cached latents (and masks)."""
        if self.datasets[micro.dataset].cache == "none":
            batch.pixels = to_unit(batch.pixels)
            return batch
        if micro.dataset not in self._stores:
            raise RuntimeError("cache_latents must be called before batches")
        store = self._stores[micro.dataset]
        entries: list[Entry] = [store.get(ref.image, self.maker.view(ref)[0]) for ref in micro.samples]
        batch.latent_mean = torch.stack([entry["mean"] for entry in entries])
        batch.latent_std = torch.stack([entry["std"] for entry in entries])
        if any("mask" in entry for entry in entries):
            plain = torch.ones(batch.latent_mean.shape[-2:])
            batch.mask = torch.stack([entry.get("mask", plain) for entry in entries])[:, None]
        return batch

    def batches(self, start: Sequence[Position] | None = None, rank: int = 0, world: int = 1, first_index: int = 0, count: int | None = None) -> Generator[StepBatches, None, None]:
        """(step, positions after it, this rank's batches) from `start` (default: the beginning), `count` steps or without end.

        Loader processes (spawn) are used only where images are decoded; a thread makes batches ahead else. Close the iterator to stop either.
        """
        if self.plan.micro_per_step % world:
            raise ValueError(f"micro_per_step = {self.plan.micro_per_step} is no multiple of the {world} processes")
        steps = self.plan.steps(start, first_index)
        if count is not None:
            steps = (pair for _, pair in zip(range(count), steps))
        return step_batches(steps, self.maker, self._attach, rank, world, self.workers)

    def names(self, step: Step, world: int) -> list[list[list[tuple[str, float]]]]:
        """(id, weight) of each sample of a step, by rank and micro-batch."""
        return [[[(f"{self.datasets[ref.dataset].name}/{self.datasets[ref.dataset].image_id(ref.image)}", ref.weight) for ref in micro.samples]
                 for micro in step.of_rank(rank, world)] for rank in range(world)]

    def report(self, console: Any) -> None:
        """Print what was found: sources, buckets, first prompts, prompts that are too long, notices."""
        reports.print_report(self, console)

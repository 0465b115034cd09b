"""Samples of the plan turned into batches: pixels or latents, prompts, and every random draw that a training step needs."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, ImageMemoryError
from ..randomness import generator, position_key
from . import image as pixels
from .files import shown
from .image import View
from .plan import MicroBatch, SampleRef
from .source import Source, no_memory, reason


@dataclass
class Batch:
    """One micro-batch, all tensors on the CPU. B samples of one size (W, H); h = H / vae factor, w = W / vae factor; C latent channels.

    Either `pixels` or `latent_mean` and `latent_std` are there. `weights` hold the loss weight of the dataset over the samples of the whole
    step, so a step's loss is the plain sum of weight x loss over all its samples on all ranks.
    """

    ids: tuple[str, ...]
    prompts: list[str]
    pixels: Tensor | None  # (B,3,H,W) fp32 in [-1,1]; uint8 on its way out of a worker, which is a quarter of the bytes
    latent_mean: Tensor | None  # (B,C,h,w) as encoded
    latent_std: Tensor | None  # (B,C,h,w)
    vae_noise: Tensor  # (B,C,h,w) fp32 N(0,1), draws the latent from the posterior
    noise: Tensor  # (B,C,h,w) fp32 N(0,1), the diffusion noise
    offset_noise: Tensor  # (B,C,1,1) fp32 N(0,1)
    u: Tensor  # (B,) float64 in [0,1), becomes the timestep
    weights: Tensor  # (B,) fp32
    mask: Tensor | None  # (B,1,h,w) fp32 in [0,1]
    original_size: Tensor  # (B,2) int64: height, width of the file's image
    crop_top_left: Tensor  # (B,2) int64: top, left in the resized image
    target_size: Tensor  # (B,2) int64: H, W
    module_seed: int  # for dropout inside modules


@dataclass(frozen=True)
class TrainDataset:
    """One dataset, indexed: its sources' images in one numbering, and the size each is trained at."""

    name: str
    sources: list[Source]
    firsts: np.ndarray  # number of each source's first image
    sizes: np.ndarray  # (n, 2): width, height of the images
    bucket_sizes: list[tuple[int, int]]
    assigned: np.ndarray  # (n,): number of each image's bucket
    positions: tuple[float, ...]  # crop positions to draw from
    batch_size: int
    loss_weight: float
    cache: str  # memory, disk or none
    cache_dir: str

    def __len__(self) -> int:
        return len(self.sizes)

    def source_of(self, image: int) -> tuple[Source, int]:
        """(source, number in it) of an image."""
        number = int(np.searchsorted(self.firsts, image, side="right")) - 1
        return self.sources[number], image - int(self.firsts[number])

    def image_id(self, image: int) -> str:
        """Name of an image within the dataset: source/path below img_root."""
        source, number = self.source_of(image)
        return f"{source.name}/{shown(source.keys[number])}"

    def size_of(self, image: int) -> tuple[int, int]:
        """(width, height) of an image, upright."""
        return int(self.sizes[image, 0]), int(self.sizes[image, 1])

    def views(self, image: int) -> list[View]:
        """The distinct ways in which training may see an image; what a cache holds of it."""
        width, height = self.bucket_sizes[self.assigned[image]]
        positions = self.positions if pixels.has_slack(self.size_of(image), (width, height)) else (0.5,)
        flips = (False, True) if self.source_of(image)[0].flip else (False,)
        return [View(width, height, position, flip) for position in positions for flip in flips]


class BatchMaker:
    """Makes batches; may be sent to a loader worker. Every draw depends on its position only."""

    def __init__(self, datasets: Sequence[TrainDataset], seed: int, vae_factor: int, latent_channels: int):
        self.datasets, self.seed = list(datasets), seed
        self.vae_factor, self.latent_channels = vae_factor, latent_channels

    def _place(self, ref: SampleRef) -> tuple[str, str, int, int]:
        data = self.datasets[ref.dataset]
        return data.name, data.image_id(ref.image), ref.epoch, ref.occurrence

    def prompt(self, ref: SampleRef) -> str:
        """The prompt of a sample."""
        source, number = self.datasets[ref.dataset].source_of(ref.image)
        rng = generator(self.seed, "prompt", *self._place(ref)) if source.prompter.draws else None
        return source.prompter.prompt(source.captions.texts[number], rng)

    def view(self, ref: SampleRef) -> tuple[int, View]:
        """(number, view): which of the image's views the sample takes."""
        views = self.datasets[ref.dataset].views(ref.image)
        number = int(generator(self.seed, "view", *self._place(ref)).integers(len(views))) if len(views) > 1 else 0
        return number, views[number]

    def make(self, micro: MicroBatch) -> Batch:
        """The batch; pixels are loaded where the dataset's latents are not cached, else latents are left for the store to fill in."""
        data, refs = self.datasets[micro.dataset], micro.samples
        views = [self.view(ref)[1] for ref in refs]
        images, masks = self._load(data, refs, views) if data.cache == "none" else (None, None)
        sizes = [data.size_of(ref.image) for ref in refs]
        draws = [self._noise(ref, micro.size) for ref in refs]
        vae_noise, noise, offset, u = (list(column) for column in zip(*draws))
        return Batch(
            ids=tuple(f"{data.name}/{data.image_id(ref.image)}" for ref in refs),
            prompts=[self.prompt(ref) for ref in refs],
            pixels=images, latent_mean=None, latent_std=None,
            vae_noise=torch.stack(vae_noise), noise=torch.stack(noise), offset_noise=torch.stack(offset), u=torch.tensor(u, dtype=torch.float64),
            weights=torch.tensor([ref.weight for ref in refs], dtype=torch.float32), mask=masks,
            original_size=torch.tensor([(height, width) for width, height in sizes]),
            crop_top_left=torch.tensor([pixels.crop_offset(size, view) for size, view in zip(sizes, views)]),
            target_size=torch.tensor([(micro.size[1], micro.size[0])] * len(refs)),
            module_seed=position_key(self.seed, "modules", *self._place(refs[0])) % 2**63)

    def _noise(self, ref: SampleRef, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, float]:
        place = self._place(ref)
        shape = (self.latent_channels, size[1] // self.vae_factor, size[0] // self.vae_factor)
        rng = generator(self.seed, "noise", *place)
        noise, offset = rng.standard_normal(shape, dtype=np.float32), rng.standard_normal((shape[0], 1, 1), dtype=np.float32)
        vae_noise = generator(self.seed, "vae", *place).standard_normal(shape, dtype=np.float32)
        u = float(generator(self.seed, "timestep", *place).random())
        return torch.from_numpy(vae_noise), torch.from_numpy(noise), torch.from_numpy(offset), u

    def _load(self, data: TrainDataset, refs: Sequence[SampleRef], views: Sequence[View]) -> tuple[Tensor, Tensor | None]:
        loaded, faults = [], []
        for ref, view in zip(refs, views):
            try:
                loaded.append(load_views(data, ref.image, [view], self.vae_factor)[0])
            except DataError as error:
                faults += error.faults
        if faults:
            raise DataError(faults)
        return torch.from_numpy(np.stack([pair[0] for pair in loaded])).permute(0, 3, 1, 2), stack_masks([pair[1] for pair in loaded], loaded[0][0].shape, self.vae_factor)


def load_views(data: TrainDataset, image: int, views: Sequence[View], factor: int, file: object = None,
               mask_file: object = None) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(uint8 (H,W,3), mask float32 (h,w) or None) per view of one image; DataError names the file. `file`, `mask_file`: opened ones to use instead."""
    try:
        return _views(data, image, views, factor, file, mask_file)
    except MemoryError as error:
        source, number = data.source_of(image)
        workers = ", or lower train.workers, each of which reads images" if data.cache == "none" and multiprocessing.parent_process() else ""
        raise ImageMemoryError(no_memory(source.path(number), workers)) from error


def _views(data: TrainDataset, image: int, views: Sequence[View], factor: int, file: object, mask_file: object) -> list[tuple[np.ndarray, np.ndarray | None]]:
    source, number = data.source_of(image)
    path = source.path(number)
    try:
        whole = pixels.decode(file or path, source.bg_color)
        mask = None
        if whole.size == data.size_of(image) and source.masks is not None:
            path = source.masks[number]
            mask = pixels.decode_mask(mask_file or path)
    except pixels.READ_FAULTS as error:
        raise DataError(f"{shown(path)}: {reason(error, path)}") from error
    if whole.size != data.size_of(image):
        was = "{} x {}".format(*data.size_of(image))
        raise DataError(f"{shown(path)}: was changed after the start: {whole.width} x {whole.height} now, {was} then. Put it back as it was, or start again.")
    return [(pixels.fit(whole, view), None if mask is None else pixels.fit_mask(mask, whole.size, view, factor)) for view in views]


def stack_pixels(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 (H,W,3) each -> (B,3,H,W) fp32 in [-1,1]."""
    return to_unit(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


def to_unit(images: Tensor) -> Tensor:
    """uint8 (B,3,H,W) -> fp32 in [-1,1], contiguous."""
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def stack_masks(masks: Sequence[np.ndarray | None], shape: Sequence[int], factor: int) -> Tensor | None:
    """(h,w) each -> (B,1,h,w); None where no sample has one, ones for those that have none beside others that do. `shape`: (H, W, ...)."""
    if all(mask is None for mask in masks):
        return None
    plain = np.ones((shape[0] // factor, shape[1] // factor), dtype=np.float32)
    return torch.from_numpy(np.stack([plain if mask is None else mask for mask in masks]))[:, None]

"""Pictures, folders and settings for the tests of the data."""

import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hcpdiff.config.schema import BucketConfig, DatasetConfig, SourceConfig
from hcpdiff.data.dataset import TrainData, build_train_data
from hcpdiff.data.sample import load_views, stack_pixels


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture without symmetry (noise would not survive resizing)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 20,000 x 20,000 pixels."""
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    head = (20000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def folder_of(root: Path, names: dict[str, tuple[int, int]] | int, captions: bool = False) -> Path:
    """A folder with pictures: name -> (width, height), or so many of three shapes."""
    if isinstance(names, int):
        names = {f"{n:02}.png": [(96, 64), (64, 96), (80, 80)][n % 3] for n in range(names)}
    for seed, (name, size) in enumerate(names.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(*size, seed).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"caption of {path.stem}, tag a, tag b", encoding="utf-8")
    return root


def source(root: Path, **extra) -> SourceConfig:
    """One source's settings."""
    return SourceConfig(img_root=str(root), **extra)


def dataset(*sources: SourceConfig, area: int = 4096, step: int | None = 16, buckets: int = 3, bucket: dict | None = None, **extra) -> DatasetConfig:
    """One dataset's settings, small sizes."""
    settings = BucketConfig(**{"target_area": area, "step_size": step, "num_bucket": buckets, **(bucket or {})})
    extra.setdefault("cache_latents", "none")
    extra.setdefault("batch_size", 2)
    return DatasetConfig(source={f"s{n}": one for n, one in enumerate(sources)}, bucket=settings, **extra)


def build(*datasets: DatasetConfig, seed: int = 7, micro_per_step: int = 1, workers: int = 0, **extra) -> TrainData:
    """TrainData of d0, d1, ..."""
    return build_train_data({f"d{n}": one for n, one in enumerate(datasets)}, seed=seed, micro_per_step=micro_per_step, workers=workers, **extra)


class Encoder:
    """A stand-in VAE that counts its calls: the mean latent shows the pixels (and the strength) it was made from."""

    def __init__(self, strength: float = 1.0):
        self.calls, self.strength = 0, strength

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        mean = torch.cat([small, small[:, :1]], dim=1) * self.strength
        return mean, torch.full_like(mean, 0.5)


def epoch(data: TrainData, **extra) -> list:
    """(step, after, batches) of the first epoch."""
    iterator = data.batches(count=data.steps_per_epoch, **extra)
    return list(iterator)


def cached(root, cache, mode="disk", bucket=None, area=4096, **extra):
    """One dataset of one folder with a latent cache."""
    return dataset(source(root, **extra), cache_latents=mode, cache_dir=str(cache), bucket=bucket, area=area)


def means(data):
    """id -> mean latent of the first epoch's samples."""
    return {name: mean for _, _, batches in epoch(data) for batch in batches for name, mean in zip(batch.ids, batch.latent_mean)}


def right(data, strength=1.0):
    """Whether batches get, and the cache holds of every view, the latents of the files as they are now."""
    one, served = data.datasets[0], means(data)
    for image in range(len(one)):
        views = one.views(image)
        fresh = [Encoder(strength)(stack_pixels([rgb]))[0][0] for rgb, _ in load_views(one, image, views, 8)]
        if not all(torch.equal(data._stores[0].get(image, number)["mean"], latent) for number, latent in enumerate(fresh)):
            return False
        if not any(torch.equal(served[f"d0/{one.image_id(image)}"], latent) for latent in fresh):
            return False
    return True


def filled(root, cache, encode=None, vae="v", **extra):
    """(TrainData with its cache filled, calls of the encoder that took)."""
    encode = encode or Encoder()
    data = build(cached(root, cache, **extra))
    data.cache_latents(encode, vae)
    return data, encode.calls

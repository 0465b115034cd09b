"""Pictures, folders and settings for the tests of the data."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hcpdiff.config.schema import BucketConfig, DatasetConfig, SourceConfig
from hcpdiff.data.dataset import TrainData, build_train_data


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture without symmetry (noise would not survive resizing)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


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

"""What to say where memory is short: the keys that still can lower the need, each with its value of now and one to try."""

import math
from collections.abc import Callable

from ..config.schema import RunConfig

SIDE = 64  # pixels; a suggested size is the area of a square with a side that is a multiple of this


def less_memory(cfg: RunConfig, phase: str = "training") -> str:
    """Sentences for an out-of-memory message, in the order in which to try; what is set already is not among them. phase: what the run was doing, since
    only images are large while latents are encoded, and only weights while the model is read. The order is that of the guide's "Less memory"."""
    weights = (_precision, _quantize)
    steps = (_checkpointing, _batch_size, _cache, *weights, _sizes)
    parts: dict[str, tuple[Callable[[RunConfig], str], ...]] = {"encoding latents": (_precision, _sizes), "encoding prompts": (_precision,),
                                                                 "loading the model": weights, "reading the model": weights}
    ways = [way for make in parts.get(phase, steps) if (way := make(cfg))]
    listed = "To try, in this order: " + "; ".join(ways) + "." if ways else "No key is left that would lower the need here."
    resumed = " In a resumed run batch sizes, image sizes and model.quantize need train.resume_force=true, since they make another run." if ways and cfg.train.resume else ""
    return f"Close other programs that use the device. {listed}{resumed}"


def _checkpointing(cfg: RunConfig) -> str:
    return "" if cfg.model.gradient_checkpointing else "model.gradient_checkpointing: true"


def _batch_size(cfg: RunConfig) -> str:
    """Smaller batches; with more of them a step where that keeps the images of a step."""
    sizes, steps = {name: data.batch_size for name, data in cfg.data.items()}, cfg.train.gradient_accumulation_steps
    common = math.gcd(*sizes.values())
    factor = next((number for number in range(2, common + 1) if common % number == 0), None)
    lower = {name: size // (factor or 2) for name, size in sizes.items() if size > 1}
    told = ", ".join(f"data.{name}.batch_size {sizes[name]} -> {size}" for name, size in lower.items())
    return told + (f" with train.gradient_accumulation_steps {steps} -> {steps * factor}" if factor else "")


def _cache(cfg: RunConfig) -> str:
    """Without a cache the VAE stays on the device."""
    return ", ".join(f"data.{name}.cache_latents none -> memory" for name, data in cfg.data.items() if data.cache_latents in ("none", False))


def _precision(cfg: RunConfig) -> str:
    return f"mixed_precision {cfg.mixed_precision} -> auto" if cfg.mixed_precision in ("fp32", "no") else ""


def _quantize(cfg: RunConfig) -> str:
    return {None: "model.quantize null -> int8", "int8": "model.quantize int8 -> nf4 (larger errors)"}.get(cfg.model.quantize, "")


def _sizes(cfg: RunConfig) -> str:
    ways = []
    for name, data in cfg.data.items():
        side = int(math.sqrt(data.bucket.target_area) * 3 / 4) // SIDE * SIDE
        if data.bucket.sizes is not None:
            ways.append(f"data.{name}.bucket.sizes: smaller ones")
        elif side:
            ways.append(f"data.{name}.bucket.target_area {data.bucket.target_area:.0f} -> {side * side} ({side}x{side})")
    return ", ".join(ways)

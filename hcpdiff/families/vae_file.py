"""Another VAE from a single file: a VAE alone (in LDM's or diffusers' names), or a whole model's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from . import file_configs, file_kind
from .file_kind import SD1
from .weight_file import WeightFile, open_weights

if TYPE_CHECKING:
    from torch import dtype as Dtype
    from torch import nn

    from .place import Place
    from .read_parts import Reader


def open_vae(source: str, base: Place, key: str) -> tuple[WeightFile, dict[str, str], str, dict[str, Any]]:
    """(file, name in the VAE -> name in the file, style, config). A file cannot say how its latents are scaled: that is as the base model's own VAE has it."""
    path = Path(source)
    weights = open_weights(path)
    layout = file_kind.vae_layout(weights.shapes)
    if layout is None:
        raise ConfigError(f"{key} = {source!r} holds no VAE: none of its {len(weights.shapes)} tensors is the encoder's first convolution, in LDM's or diffusers' names.")
    prefix, style = layout
    names = {name.removeprefix(prefix): name for name in weights.shapes if name.startswith(prefix) and not file_kind.idle(name) and not _idle(name)}
    config = base.config("vae") | _own(style, {name: weights.shapes[full] for name, full in names.items()}, f"{key} = {source!r}")
    return weights, names, style, config


def _own(style: str, shapes: file_kind.Shapes, where: str) -> dict[str, Any]:
    try:
        derived = file_configs.derive(SD1, "vae", style, shapes)
    except ConfigError as error:
        raise ConfigError([f"{where}: {fault}" for fault in error.faults]) from error
    return {name: derived[name] for name in ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "latent_channels")}


def _idle(name: str) -> bool:
    """What a VAE's own training leaves in its file."""
    return name.startswith(("loss.", "model_ema.")) or name in ("global_step", "logvar")


def vae_outline(kind: type, source: str, base: Place, dtype: Dtype, key: str) -> tuple[nn.Module, Reader]:
    """The VAE as `Place.outline` gives it; ConfigError where a weight is missing, left over or of another shape."""
    from .read_parts import Reader, outline

    weights, names, style, config = open_vae(source, base, key)
    module, reader = outline(kind, config, style, weights, names, dtype, f"{key}: {source}")

    def read(*args) -> None:
        reader.read(*args)
        weights.release()

    weights.release()  # of a .ckpt; shapes stay
    return module, Reader(read, reader.file)

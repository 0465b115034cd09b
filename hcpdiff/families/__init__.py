"""Model families, each in a file of its own, and the one question that chooses among them. Importing this needs no torch."""

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, HCPError
from .place import Place, open_place
from .source import MODEL_KEY, offline_faults

if TYPE_CHECKING:
    from .base import Family

# class in model_index.json -> module and class here, imported when needed
FAMILIES = {"StableDiffusionPipeline": "sd.StableDiffusion", "StableDiffusionXLPipeline": "sdxl.StableDiffusionXL"}


def detect(folder: Path | Place, key: str = MODEL_KEY) -> "Family":
    """The family of a base model, from its model_index.json, or from the names in a single file."""
    module, name = FAMILIES[_pipeline(open_place(folder), key)].split(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)()


def _pipeline(place: Place, key: str) -> str:
    pipeline = place.pipeline(key)
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise ConfigError(f"{key} = {str(place.path)!r} is a {str(pipeline)[:80]}; supported: {', '.join(FAMILIES)} (Stable Diffusion 1.x, 2.x and XL).")
    return pipeline


def quick_faults(source: str, key: str = MODEL_KEY, without: Collection[str] = (), configs: str | None = None, prediction: str | None = None) -> list[str]:
    """What is wrong with a local base model as far as it shows without torch: its kind, and what is missing. [] for a hub id (see `not_to_be_had`).

    without: parts that are replaced, and so need not be there. configs, prediction: as for `open_place`.
    """
    path = Path(source)
    try:
        if path.is_dir() or path.is_file() and path.suffix.lower() == ".safetensors":  # a .ckpt shows nothing without torch
            place = open_place(path, configs, prediction, key)
            _pipeline(place, key)
            place.check([part for part in place.parts() if part not in without], key)
    except HCPError as error:
        return error.faults
    return []


def not_to_be_had(source: str | None, vae: str | None, revision: str | None = None, keys: tuple[str, str] = (MODEL_KEY, "model.vae")) -> list[str]:
    """Of a base model and a VAE from elsewhere, hub ids that cannot be had; `keys` name them."""
    return (offline_faults(source, keys[0], revision) if source else []) + (offline_faults(vae, keys[1], files=("config.json", "vae/config.json")) if vae else [])

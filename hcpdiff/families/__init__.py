"""Model families, each in a file of its own, and the one question that chooses among them. Importing this needs no torch."""

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .source import MODEL_KEY, check_complete, parts_of, read_index

if TYPE_CHECKING:
    from .base import Family

FAMILIES = {"StableDiffusionPipeline": "sd.StableDiffusion"}  # class in model_index.json -> module and class here, imported when needed


def detect(folder: Path, key: str = MODEL_KEY) -> "Family":
    """The family of a diffusers folder, from its model_index.json."""
    module, name = FAMILIES[_pipeline(folder, key)].split(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)()


def _pipeline(folder: Path, key: str) -> str:
    pipeline = read_index(folder, key).get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise ConfigError(f"{key} = {str(folder)!r} is a {str(pipeline)[:80]}; supported: {', '.join(FAMILIES)} (Stable Diffusion 1.x and 2.x).")
    return pipeline


def quick_faults(source: str, key: str = MODEL_KEY, without: Collection[str] = ()) -> list[str]:
    """What is wrong with a base model's local folder as far as it shows without torch: its kind, and files that are missing. [] for a hub id.

    without: parts that are replaced, and so need not be there.
    """
    folder = Path(source).expanduser()
    try:
        if folder.is_dir():
            _pipeline(folder, key)
            check_complete(folder, [part for part in parts_of(folder) if part not in without], key)
    except ConfigError as error:
        return error.faults
    return []

"""Model families, each in a file of its own, and the one question that chooses among them."""

from pathlib import Path

from ..errors import ConfigError
from .base import Family
from .sd import StableDiffusion
from .source import MODEL_KEY, read_index

FAMILIES: dict[str, type] = {StableDiffusion.pipeline: StableDiffusion}


def detect(folder: Path, key: str = MODEL_KEY) -> Family:
    """The family of a diffusers folder, from its model_index.json."""
    pipeline = read_index(folder, key).get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise ConfigError(f"{key} = {str(folder)!r} is a {str(pipeline)[:80]}; supported: {', '.join(FAMILIES)} (Stable Diffusion 1.x and 2.x).")
    return FAMILIES[pipeline]()

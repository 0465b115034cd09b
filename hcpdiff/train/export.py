"""The file for webui that a save also writes (`train.export`): UNet and text encoders in one, checked like the converter's, with the training's metadata."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from .. import device as machine
from ..checkpoint.convert import to_webui
from ..checkpoint.export import write_webui
from ..checkpoint.metadata import META_CONVERTER
from ..checkpoint.tidy import WEBUI
from ..config.schema import ExportConfig
from ..errors import CheckpointError, ConfigError
from ..families import webui
from ..families.webui import WebuiFamily
from ..lora_tensors import LoraTensors
from ..trainables.lora import LoraTrainable

COVER, THUMBNAIL = 512, 256  # longest sides; the model spec advises 256 for its thumbnail
MAKER = "train"  # the mark of these files: the converter replaces what it made itself without being asked, and a training's file is not that
_PREVIEW = re.compile(r"([0-9]+)-0\.png")


def check_export(config: ExportConfig, version: str, trainables: Sequence[LoraTrainable]) -> None:
    """ConfigError where webui has no name for what is trained, or another kind of layer under it: a run must not find that out at its first save."""
    if not config.webui:
        return
    family = _family(version)
    layers = {t.component.name: t.export() for t in trainables}
    foreign = [f"{component} {path}" for component, named in layers.items() for path in named if family.webui_base(component, path) is None]
    if foreign:
        raise ConfigError(f"train.export: webui has no name for {len(foreign)} of the layers that are trained, such as {foreign[0]}. Leave them out (exclude of the LoRA groups), or "
                          f"turn train.export off.")
    try:
        to_webui(layers, family)
    except CheckpointError as error:
        raise ConfigError([f"train.export: {fault}" for fault in error.faults]) from error


def _family(version: str) -> WebuiFamily:
    family = webui.by_version(version)
    if family is None:
        raise ConfigError(f"train.export: webui has no LoRA files for a base model of the kind {version!r}.")
    return family


class WebuiExport:
    """Writes the webui file of a step. `facts`: header entries that are true of the whole run; `steps_per_epoch` tells those that a step adds."""

    def __init__(self, run: Path, config: ExportConfig, version: str, dtype: torch.dtype, facts: Mapping[str, str], steps_per_epoch: int):
        self.run, self.config, self.version, self.family = run, config, version, _family(version)
        self.dtype = machine.DTYPES[config.save_dtype] if config.save_dtype else dtype
        self.facts, self.steps_per_epoch = facts, steps_per_epoch
        self.notices: list[str] = []

    def write(self, step: int, layers: Mapping[str, Mapping[str, LoraTensors]]) -> tuple[str, str]:
        """Writes the file of `step`; its path below the run folder and its SHA-256 come back. CheckpointError where it cannot be, or would not be right."""
        name = f"{self.config.name or self.run.absolute().name}-{step}"
        epoch = -(-step // self.steps_per_epoch)
        extra = {"ss_steps": str(step), "ss_epoch": str(epoch), META_CONVERTER: MAKER, **self._cover(step), **self.config.metadata}
        lora = write_webui(self.run / WEBUI / f"{name}.safetensors", layers, self.family, self.version, name=name, kept=self.facts, dtype=self.dtype, extra=extra)
        return f"{WEBUI}/{name}.safetensors", lora.sha256

    def _cover(self, step: int) -> dict[str, str]:
        """The first picture of the newest preview that is not of a later step, for webui and for readers of the model spec."""
        folder = self.run / "previews"
        found = [int(match[1]) for path in folder.iterdir() if (match := _PREVIEW.fullmatch(path.name))] if self.config.cover and folder.is_dir() else []
        newest = max((number for number in found if number <= step), default=None)
        if newest is None:
            return {}
        try:
            with Image.open(folder / f"{newest}-0.png") as image:
                picture = image.convert("RGB")
        except OSError as error:  # a picture is no reason to lose a save
            self.notices.append(f"warning: {folder / f'{newest}-0.png'} cannot be read ({error}): the file for webui has no cover.")
            return {}
        return {"ssmd_cover_images": json.dumps([_jpeg(picture, COVER)]), "modelspec.thumbnail": f"data:image/jpeg;base64,{_jpeg(picture, THUMBNAIL)}"}

    def take_notices(self) -> list[str]:
        """What is to be said, once."""
        notices, self.notices = self.notices, []
        return notices


def _jpeg(picture: Image.Image, side: int) -> str:
    """Base64 of a JPEG whose longer side is at most `side`."""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode("ascii")

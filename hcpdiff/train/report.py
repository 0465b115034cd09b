"""The start of a run in tables: versions and machine, what is trained, how long."""

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from .. import __version__
from .. import device as machine
from ..config.schema import RunConfig
from ..data.dataset import TrainData
from ..families.base import denoiser_of
from ..loggers import Logger
from .base import BaseModel
from .parallel import Parallel

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


def versions(optimizer: str = "torch") -> dict[str, str]:
    """Version of hcpdiff, Python and the packages whose change may change a run; `optimizer` is its `_target_`."""
    found = {"hcpdiff": __version__, "python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a package may have another name than what it is imported by
        found.setdefault(optimizer.split(".")[0], importlib.metadata.version(optimizer.split(".")[0]))
    return found


def run_facts(cfg: RunConfig, base: BaseModel, parallel: Parallel, precision: str, length: str) -> dict[str, object]:
    """What the first table of a run says. precision: of the frozen weights, and the attention kernel; length: how many steps."""
    train, world = cfg.train, parallel.world
    batch = sum(data.batch_size for data in cfg.data.values())
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in versions(train.optimizer["_target_"]).items()),
        "device": f"{machine.describe(parallel.device)}; {world} process{'es' if world > 1 else ''}",
        "precision": precision, "base model": f"{cfg.model.pretrained_model_name_or_path} ({base.family.base_version(base.models)}, predicts {base.prediction}){_kept(base)}", "seed": cfg.seed,
        "images per step": f"{batch * world * train.gradient_accumulation_steps} (batch {batch}, processes {world}, accumulation {train.gradient_accumulation_steps})",
        "length": length, "optimizer": f"{train.optimizer['_target_']}, {train.lr_scheduler['_target_'] if train.lr_scheduler else train.scheduler.name}",
    }


def memory_facts(cfg: RunConfig, data: TrainData) -> dict[str, str]:
    """What decides how much memory a run takes, and what it does beside its steps: one row each."""
    places: dict[str, list[str]] = {}
    for one in data.datasets:
        places.setdefault(f"in {one.cache_dir}" if one.cache == "disk" else "in memory" if one.cache == "memory" else "not kept", []).append(one.name)
    latents = ", ".join(place if len(places) == 1 and place != "not kept" else f"of {', '.join(names)} {place}" for place, names in places.items())
    if "not kept" in places:
        latents += f": images are decoded and encoded in each step" + (f", by {data.workers} loader process{'es' if data.workers != 1 else ''}" if data.workers else "")
    save, preview = cfg.train.save_step, cfg.preview
    saves = f"saved every {save} steps and at the end" if save else "saved at the end"
    previews = f"{len(preview.prompts)} preview{'s' if len(preview.prompts) != 1 else ''} every {preview.every} steps and at the end" if preview.prompts else "no previews"
    return {"memory": f"gradient checkpointing {'on' if cfg.model.gradient_checkpointing else 'off'}; latents {latents}", "beside the steps": f"{saves}; {previews}"}


def _kept(base: BaseModel) -> str:
    """In how few bits the frozen weights are kept, and what that takes."""
    if not base.quantization:
        return ""
    part = denoiser_of(base.family).name
    kept, dense = (size / 2**20 for size in base.quantization.bytes(base.models.modules[part]))
    return f", {part} kept as {base.config.quantize}: {kept:.0f} MiB instead of {dense:.0f}"


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """A two-column table."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))  # brackets in a path or pattern are no markup
    return table


def layers_table(trainables: Sequence) -> Table:
    """What each pattern of each LoRA group matched."""
    table = Table(title="LoRA layers", title_justify="left")
    for column, justify in (("group", "left"), ("pattern", "left"), ("layers", "right"), ("rank", "right"), ("alpha", "right"), ("lr", "right"), ("parameters", "right")):
        table.add_column(column, justify=justify)
    for trainable in trainables:
        for group, pattern, layers, rank, alpha, lr, parameters in trainable.rows():
            table.add_row(*map(Text, (group, pattern, str(layers), rank, alpha, f"{lr:g}", parameters)))
    return table


class Printer:
    """The loggers in the place of a rich console."""

    def __init__(self, log: Logger):
        self.log = log

    def print(self, renderable: object, **style) -> None:
        """One table or line."""
        self.log.say(renderable)

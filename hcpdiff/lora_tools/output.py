"""Reading the LoRA that a tool works on, and writing its result: a file in webui's form, read back and compared before it appears."""

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..checkpoint.convert import DTYPES, Found, Layers, distance, find_family, join
from ..checkpoint.export import payload_hash, replaceable, write_webui
from ..checkpoint.format import META_PREFIX, LoraFile, load_lora
from ..checkpoint.metadata import META_CONVERTER
from ..checkpoint.paths import SUFFIX
from ..checkpoint.spellings import WEBUI_LDM
from ..errors import CheckpointError
from ..lora_tensors import LoraTensors
from .algebra import norm, stored_in

META_MADE_FROM = META_PREFIX + "made_from"  # JSON: what a tool put together


@dataclass(frozen=True)
class Loaded:
    """A LoRA as the user named it: one file, or the parts of a step."""

    name: str
    files: list[tuple[Path, LoraFile]]
    layers: dict[str, dict[str, LoraTensors]]
    metadata: dict[str, str] = field(default_factory=dict)

    def family(self, told: str | None) -> Found:
        """Which Stable Diffusion it is for; `told` is the user's word."""
        return find_family(self.layers, self.metadata, told, any(WEBUI_LDM in file.spelling for _, file in self.files))


def said(args: argparse.Namespace) -> dict[str, str]:
    """The entries of --metadata."""
    return dict(entry.split("=", 1) for entry in args.metadata)


def console() -> Console:
    """Where the tools print: no markup, since names come from files."""
    return Console(soft_wrap=True, highlight=False, markup=False)


def load_all(sources: Sequence[tuple[str, list[Path]]], out: Console) -> list[Loaded]:
    """Reads every LoRA and says what each is. CheckpointError with the faults of all of them."""
    found, faults = [], []
    for name, paths in sources:
        files = []
        for path in paths:
            try:
                files.append((path, load_lora(path)))
            except CheckpointError as error:
                faults += error.faults
        metadata = {key: value for _, file in reversed(files) for key, value in file.metadata.items()}
        found.append(Loaded(name, files, join(files), metadata))
    if faults:
        raise CheckpointError(faults)
    for path, file in (pair for lora in found for pair in lora.files):
        out.print(f"{path}: {file.spelling} spelling, {', '.join(f'{component} {len(named)} layers' for component, named in file.layers.items())}")
        for notice in file.notices:
            out.print(f"{path}: {notice}")
    return found


def target(args: argparse.Namespace, read: Iterable[Path], tool: str) -> Path:
    """The file that --dump_path names. CheckpointError where writing it would take something from the user: a source, or a file that is not `tool`'s."""
    path = Path(args.dump_path)
    if path.is_dir() or args.dump_path.endswith(("/", "\\")):
        if not args.name:
            raise CheckpointError(f"--dump_path {path} is a folder: name the file, or say --name NAME.")
        path /= args.name + SUFFIX
    path = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    if path.resolve() in {source.resolve() for source in read}:
        raise CheckpointError(f"{path} is a file that is read; choose another --dump_path.")
    if not args.overwrite and not replaceable(path, tool):
        raise CheckpointError(f"{path} exists and was not made by this command; --overwrite replaces it.")
    return path


def narrow(layers: Layers, like: Iterable[LoraTensors]) -> torch.dtype | None:
    """The type of the sources' factors where all of them have one and `layers` have no digits beyond it; else None, which keeps float32."""
    dtypes = {factor.dtype for lora in like for factor in (lora.down, lora.up)}
    only = dtypes.pop() if len(dtypes) == 1 else None
    fits = only is not None and all(stored_in(lora, only) for named in layers.values() for lora in named.values())
    return only if fits else None


def write(path: Path, layers: Layers, found: Found, args: argparse.Namespace, *, tool: str, dtype: torch.dtype | None, kept: Mapping[str, str],
          made_from: object) -> dict[str, dict[str, LoraTensors]]:
    """Writes webui's file and returns its layers as they are read from it. --save_dtype goes before `dtype`."""
    extra = {META_MADE_FROM: json.dumps(made_from, ensure_ascii=False), META_CONVERTER: tool, **said(args)}
    write_webui(path, layers, found.family, found.version, name=args.name or path.stem, kept=kept,
                dtype=DTYPES.get(args.save_dtype, dtype), extra=extra)
    return load_lora(path).layers


def say_written(out: Console, path: Path, layers: Layers) -> None:
    """The last line of a tool: the file, its size, its check."""
    count = sum(map(len, layers.values()))
    out.print(f"wrote {path} ({path.stat().st_size / 2**20:.2f} MiB), checked by reading it back: {count} layers; AutoV3 {payload_hash(path)[:12]}")


@dataclass(frozen=True)
class Loss:
    """What a layer lost: the norm of its change, the norm of what the LoRA differs from that, the LoRA's rank, and the rank before (0: it was dense)."""

    size: float
    lost: float
    rank: int
    rank_before: int = 0

    @property
    def share(self) -> float:
        """The residual: what was lost, as a share of the change."""
        return self.lost / self.size if self.size else 0.0


def losses(before: Layers, after: Layers) -> dict[str, dict[str, Loss]]:
    """What each layer of `before` lost on the way to `after`, from the factors alone."""
    return {component: {path: _loss(lora, after.get(component, {}).get(path)) for path, lora in named.items()} for component, named in before.items()}


def _loss(before: LoraTensors, after: LoraTensors | None) -> Loss:
    size = norm(before)
    if after is None:
        return Loss(size, size, 0, before.rank)
    return Loss(size, distance(before, after) * size if size else 0.0, after.rank, before.rank)


def say_losses(out: Console, lost: Mapping[str, Mapping[str, Loss]]) -> None:
    """A row per part: layers, ranks before and after, the residual of all its layers as one; and the layer that lost most."""
    was_lora = any(loss.rank_before for layers in lost.values() for loss in layers.values())
    table = Table("part", "layers", *(["rank before"] if was_lora else []), "rank", "residual")
    worst = (0.0, "")
    for component, layers in lost.items():
        worst = max(worst, *((loss.share, f"{component} {path}") for path, loss in layers.items()))
        ranks = [[loss.rank_before for loss in layers.values()], [loss.rank for loss in layers.values()]]
        table.add_row(component, str(len(layers)), *map(span, ranks if was_lora else ranks[1:]), percent(together(list(layers.values()))))
    out.print(table)
    if percent(worst[0]) != "0":
        out.print(f"residual: the norm of what differs over the norm of the change; the largest of a layer is {percent(worst[0])}, {worst[1]}")


def together(lost: Sequence[Loss]) -> float:
    """The residual of several layers as one."""
    size = math.hypot(*(loss.size for loss in lost))
    return math.hypot(*(loss.lost for loss in lost)) / size if size else 0.0


def span(values: Sequence[float]) -> str:
    """`4` or `4 … 64`."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} … {high:.4g}"


def percent(share: float) -> str:
    """A share as a reader compares it: 0 where nothing but float64's own rounding differs, else three digits."""
    return "0" if share < 1e-12 else f"{100 * share:.3g} %"

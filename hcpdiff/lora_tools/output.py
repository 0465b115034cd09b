"""Reading the LoRA that a tool works on, and writing its result: a file in webui's form, read back and compared before it appears."""

import argparse
import json
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
    extra = {META_MADE_FROM: json.dumps(made_from, ensure_ascii=False), META_CONVERTER: tool, **dict(entry.split("=", 1) for entry in args.metadata)}
    write_webui(path, layers, found.family, found.version or found.family.version, name=args.name or path.stem, kept=kept,
                dtype=DTYPES.get(args.save_dtype, dtype), extra=extra)
    return load_lora(path).layers


def say_written(out: Console, path: Path, layers: Layers) -> None:
    """The last line of a tool: the file, its size, its check."""
    count = sum(map(len, layers.values()))
    out.print(f"wrote {path} ({path.stat().st_size / 2**20:.2f} MiB), checked by reading it back: {count} layers; AutoV3 {payload_hash(path)[:12]}")


def residuals(before: Layers, after: Layers) -> dict[str, dict[str, float]]:
    """By how much each layer's delta differs from what it was, as a share of its size (Frobenius); 1 where a layer is gone."""
    gone = LoraTensors(torch.zeros(0), torch.zeros(0), 0.0)
    return {component: {path: _residual(lora, after.get(component, {}).get(path, gone)) for path, lora in named.items()} for component, named in before.items()}


def _residual(before: LoraTensors, after: LoraTensors) -> float:
    return 1.0 if after.down.numel() == 0 else distance(before, after)


def say_residual(out: Console, before: Layers, after: Layers) -> None:
    """A row per part: layers, ranks before and after, the share of the part's whole change that was lost; and the layer that lost most."""
    table = Table("part", "layers", "rank before", "rank after", "residual")
    worst = (0.0, "")
    for component, shares in residuals(before, after).items():
        sizes = {path: norm(lora) for path, lora in before[component].items()}
        worst = max(worst, *((share, f"{component} {path}") for path, share in shares.items() if sizes[path]))
        table.add_row(component, str(len(shares)), span([lora.rank for lora in before[component].values()]),
                      span([lora.rank for lora in after.get(component, {}).values()]), percent(together(shares, sizes)))
    out.print(table)
    if percent(worst[0]) != "0":
        out.print(f"residual: the norm of what differs over the norm of the change; the largest of a layer is {percent(worst[0])}, {worst[1]}")


def together(shares: Mapping[str, float], sizes: Mapping[str, float]) -> float:
    """The residual of all layers as one: the norm of the differences over the norm of the deltas."""
    whole = sum(size**2 for size in sizes.values())
    return (sum((shares[path] * size) ** 2 for path, size in sizes.items() if size) / whole) ** 0.5 if whole else 0.0


def span(values: Sequence[float]) -> str:
    """`4` or `4 … 64`."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} … {high:.4g}"


def percent(share: float) -> str:
    """A share as a reader compares it: 0 where nothing but float64's own rounding differs, else three digits."""
    return "0" if share < 1e-12 else f"{100 * share:.3g} %"

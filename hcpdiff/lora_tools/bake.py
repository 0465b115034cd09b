"""LoRA added to the weights of a base model, in float32, with one rounding back to the type of each weight."""

import argparse
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..checkpoint.format import COMPONENTS
from ..checkpoint.metadata import HASHES, META_CONVERTER
from ..checkpoint.paths import SUFFIX
from ..errors import CheckpointError
from ..families.weight_file import WeightFile
from ..lora_tensors import LoraTensors
from . import output
from .base_model import BaseModel, Spot, misfits, open_model
from .merge import TOOL, Weighted, check_shapes, made_from, terms, weighted
from .output import META_MADE_FROM
from .rewrite import rewrite

RECORD = "lora_merge.json"  # in a merged folder: what went into it, and the sign that the folder is the command's own
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")
_NOTED = 0.05  # a share of the change lost by rounding from which on the user is told what else can be done
Terms = list[tuple[LoraTensors, float]]


@dataclass
class Tally:
    """Of one component: weights that were changed, squared norms of the change, of the weights, and of what rounding lost of the change."""

    layers: int = 0
    change: float = 0.0
    weights: float = 0.0
    lost: float = 0.0
    dtypes: set[str] = field(default_factory=set)


def run(args: argparse.Namespace, sources: list, lines: list[str]) -> int:
    """Adds the LoRA of `sources` to args.base_model and writes the result to args.dump_path; 0."""
    out = output.console()
    model = open_model(args.base_model, "--base_model")
    entries = weighted(output.load_all(sources, out), args.alpha, args.alpha_TE)
    for line in [*lines, *model.notices]:
        out.print(line)
    plan, left_out = _plan(model, entries)
    read = [path for _, paths in sources for path in paths]
    path = _target(args, model, read)
    _check_room(model, path)
    tallies: dict[str, Tally] = {}
    if model.single:
        notices = _bake_file(model.single, path, plan, args, entries, tallies)
    else:
        notices = _bake_folder(model, path, plan, entries, tallies)
    for notice in left_out + notices:
        out.print(notice)
    _say(out, tallies)
    out.print(f"wrote {path}, checked by reading it back: {sum(map(len, plan.values()))} tensors are changed, every other byte of the weights is as in {model.path.name}")
    return 0


Plan = dict[Path, dict[str, list[tuple[str, Spot, Terms]]]]  # file -> key -> what is added where in it


def _plan(model: BaseModel, entries: Sequence[Weighted]) -> tuple[Plan, list[str]]:
    """Which tensors of which files change by what; lines on what has no effect. CheckpointError where the LoRA do not fit the model."""
    faults = [f"{entry.lora.name}: {fault}" for entry in entries for fault in misfits(model, entry.lora.layers, entry.lora.metadata)]
    if faults:
        raise CheckpointError(faults)
    gathered: dict[str, dict[str, Terms]] = {}
    for component, path, lora, weight in terms(entries):
        if weight * lora.scale != 0:
            gathered.setdefault(component, {}).setdefault(path, []).append((lora, weight))
    if not gathered:
        raise CheckpointError("nothing would change: every weight or every alpha is 0.")
    check_shapes(gathered)
    plan: Plan = {}
    for component, named in gathered.items():
        for path, parts in named.items():
            for spot in model.spots(component, path):
                plan.setdefault(spot.file.path, {}).setdefault(spot.place.name, []).append((component, spot, parts))
    ema = any(key.startswith("model_ema.") for file in model.files for key in file.header.entries)
    return plan, ["the averaged (EMA) copy of the weights in the file stays as it is; programs draw with the other one"] if ema else []


def baked(tensor: Tensor, changes: Sequence[tuple[str, Spot, Terms]], tallies: dict[str, Tally]) -> Tensor:
    """The tensor under a key with all changes added in float32 (float64 where it is stored so), in its own type."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32) if tensor.dtype.itemsize > 1 else torch.float32)
    exact = wide.clone()
    for component, spot, parts in changes:
        spot.cut(exact).add_(sum(weight * lora.delta(exact.dtype) for lora, weight in parts).reshape(spot.shape))
    rounded = exact.to(tensor.dtype)
    if not bool(torch.isfinite(rounded.float()).all()):
        raise CheckpointError(f"{changes[0][1].place.name} would hold values that {str(tensor.dtype).removeprefix('torch.')} cannot (or it holds inf or nan already): "
                              f"lower the weights, or take a base model in a wider type.")
    for component, spot, _ in changes:
        tally = tallies.setdefault(component, Tally())
        tally.layers += 1
        tally.dtypes.add(str(tensor.dtype).removeprefix("torch."))
        before, after = spot.cut(wide), spot.cut(exact)
        tally.change += float((after - before).double().square().sum())
        tally.weights += float(before.double().square().sum())
        tally.lost += float((spot.cut(rounded).to(after.dtype) - after).double().square().sum())
    return rounded


def _changes(file: WeightFile, plan: Plan, tallies: dict[str, Tally]) -> dict:
    return {key: lambda tensor, parts=parts: baked(tensor, parts, tallies) for key, parts in plan.get(file.path, {}).items()}


def _bake_file(file: WeightFile, path: Path, plan: Plan, args: argparse.Namespace, entries: Sequence[Weighted], tallies: dict[str, Tally]) -> list[str]:
    """Writes a single file; its metadata stays but for hashes, which would be false, and what the user says."""
    old = file.header.metadata
    false = sorted(key for key in old if key.startswith(HASHES))
    said = output.said(args) | ({"modelspec.title": args.name} if args.name else {})
    own = {META_CONVERTER: TOOL, META_MADE_FROM: json.dumps(made_from(entries), ensure_ascii=False)}
    rewrite(file, path, _changes(file, plan, tallies), {key: value for key, value in old.items() if key not in false} | own | said)
    return [f"metadata left out, since it would be false: {', '.join(false)}"] if false else []


def _bake_folder(model: BaseModel, path: Path, plan: Plan, entries: Sequence[Weighted], tallies: dict[str, Tally]) -> list[str]:
    """Writes a folder under a temporary name, and renames it when it is whole; lines on what was not copied."""
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    rewritten = {file.path: file for file in model.files if file.path in plan}
    changed = {file.parent for file in rewritten}
    stale = []
    try:
        for source in _files(model.path):
            copy = temporary / source.relative_to(model.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source in rewritten:
                rewrite(rewritten[source], copy, _changes(rewritten[source], plan, tallies))
            elif _is_stale(source, model.path, changed):
                stale.append(source.relative_to(model.path).as_posix())
            else:
                shutil.copyfile(source, copy)
        (temporary / RECORD).write_text(json.dumps(made_from(entries), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        _put(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [f"not copied, since it would hold the weights without the LoRA: {', '.join(stale)}"] if stale else []


def _files(folder: Path) -> list[Path]:
    """The model's files; hidden ones (.git, a hub client's notes) are no part of it."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _is_stale(path: Path, folder: Path, changed: set[Path]) -> bool:
    """Other copies of the weights: pickles beside those that change, and single files beside the folders."""
    return path.suffix in _PICKLES and path.parent in changed or path.parent == folder and path.suffix in (*_PICKLES, SUFFIX) or path == folder / RECORD


def _put(temporary: Path, path: Path) -> None:
    """Renames the finished folder; an older one of the command's own goes only when the new one is in its place."""
    old = temporary.with_name(temporary.name.removesuffix(".tmp") + ".old.tmp")
    if path.is_dir():
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        if old.is_dir():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _target(args: argparse.Namespace, model: BaseModel, read: Sequence[Path]) -> Path:
    """Where the result goes. CheckpointError where that would take something from the user."""
    if model.single:
        return output.target(args, [*read, model.path], TOOL)
    path, source = Path(args.dump_path), model.path.resolve()
    if path.suffix == SUFFIX or path.is_file():
        raise CheckpointError(f"--dump_path {path}: the base model is a folder, and so will be the result; name a folder.")
    if source in (path.resolve(), *path.resolve().parents) or path.resolve() in source.parents:
        raise CheckpointError(f"--dump_path {path} and the base model {model.path} lie in each other; choose another folder.")
    if any(path.resolve() in lora.resolve().parents for lora in read):
        raise CheckpointError(f"--dump_path {path} holds a LoRA that is read; choose another folder.")
    if path.is_dir() and any(path.iterdir()) and not (path / RECORD).is_file():
        raise CheckpointError(f"{path} is not empty and was not made by this command; choose another folder (folders of others are never replaced).")
    return path


def _check_room(model: BaseModel, path: Path) -> None:
    """CheckpointError where the disk has no room, before gigabytes are written."""
    size = sum(file.stat().st_size for file in ([model.path] if model.single else _files(model.path)))
    place = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < size:
        raise CheckpointError(f"{path} cannot be written: about {size / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free in {place}.")


def _say(out: Console, tallies: Mapping[str, Tally]) -> None:
    """A row per component: weights changed, their type, how large the change is beside them, and how much of it the type's rounding takes."""
    table = Table("part", "layers", "dtype", "change / weights", "lost by rounding")
    lost = {component: math.sqrt(tally.lost / tally.change) if tally.change else 0.0 for component, tally in tallies.items()}
    for component, tally in sorted(tallies.items(), key=lambda item: COMPONENTS.index(item[0])):
        size = math.sqrt(tally.change / tally.weights) if tally.weights else math.inf
        table.add_row(component, str(tally.layers), ", ".join(sorted(tally.dtypes)), output.percent(size), output.percent(lost[component]))
    out.print(table)
    if max(lost.values()) > _NOTED:
        out.print("warning: the base model's type is too coarse for so small a change. The LoRA beside the weights (lora_path of the visualizer, webui's <lora:…>) "
                  "has its whole effect; so has a merge into a base model in fp32.")

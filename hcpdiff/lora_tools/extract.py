"""The difference of two models as a LoRA: the best of its rank for every layer, and what no LoRA can hold."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..checkpoint.convert import DTYPES, Found, Layers, cast, find_family, with_word
from ..checkpoint.format import COMPONENTS, META_BASE_MODEL, META_BASE_VERSION
from ..checkpoint.metadata import META_PREDICTION
from ..errors import CheckpointError, collect
from ..families import webui
from ..families.ldm_names import PREFIXES
from ..families.weight_file import WeightFile
from ..families.webui import TEXT
from ..lora_tensors import LoraTensors
from . import output
from .algebra import Limit, nearest
from .base_model import FLOATS, BaseModel, Spot, open_model
from .output import Loss

TOOL = "lora_extract"


@dataclass(frozen=True)
class Pair:
    """One layer in both models."""

    component: str
    path: str
    base: Spot
    tuned: Spot


def run(args: argparse.Namespace) -> int:
    """Extracts as `args` say; 0."""
    out = output.console()
    base, tuned = _open(args)
    path = output.target(args, [file.path for model in (base, tuned) for file in model.files], TOOL)
    pairs = paired(base, tuned, args.parts or COMPONENTS)
    limits = {False: Limit(args.rank, args.energy), True: Limit(args.rank if args.conv_rank is None else args.conv_rank, args.energy)}
    device = _device(args.device)
    layers: dict[str, dict[str, LoraTensors]] = {}
    lost: dict[str, dict[str, Loss]] = {}
    for pair in track(pairs, "extracting", console=out, transient=True, disable=not out.is_terminal):
        found = extracted(pair, limits[len(pair.base.shape) == 4 and pair.base.shape[2:] != (1, 1)], _dtype(args, pair), device)
        if found is not None:
            lora, loss = found
            lost.setdefault(pair.component, {})[pair.path] = loss
            if lora is not None:
                layers.setdefault(pair.component, {})[pair.path] = lora
    if not layers:
        raise CheckpointError(f"{args.base_model} and {args.tuned_model} do not differ in any layer that a LoRA can change.")
    _say(out, pairs, lost)
    for line in others(base, tuned, args.parts or COMPONENTS, lost):
        out.print(line)
    metadata, doubts = _metadata(base, tuned, args)
    for line in doubts:
        out.print(line)
    found = with_word(_family(layers, metadata, args.family, base), output.said(args))
    out.print(f"family: {found}")
    made = {"base": base.path.name, "tuned": tuned.path.name, "rank": args.rank, "conv_rank": args.conv_rank, "energy": args.energy}
    written = output.write(path, layers, found, args, tool=TOOL, dtype=None, kept=metadata, made_from=made)
    output.say_written(out, path, written)
    return 0


def _open(args: argparse.Namespace) -> tuple[BaseModel, BaseModel]:
    models, faults = [], []
    for option in ("base_model", "tuned_model"):
        collect(faults, lambda: models.append(open_model(getattr(args, option), f"--{option}")))
    if faults:
        raise CheckpointError(faults)
    return models[0], models[1]


def paired(base: BaseModel, tuned: BaseModel, parts) -> list[Pair]:
    """Every layer that both have. CheckpointError where the models are not of one architecture, or have none of the parts in common."""
    old, new = ({(component, path): spot for component, path, spot in model.layers() if component in parts} for model in (base, tuned))
    common = {component for component, _ in old} & {component for component, _ in new}
    single = [key for key in old.keys() ^ new.keys() if key[0] in common and not _unused(key, base if key in old else tuned)]
    unlike = [key for key in old.keys() & new.keys() if not _alike(old[key], new[key])]
    faults = [f"{len(keys)} layers {what}, such as {' '.join(min(keys))}." for keys, what in ((single, "are in one of the models only"), (unlike, "have different shapes")) if keys]
    if faults:
        raise CheckpointError([f"{base.path.name} and {tuned.path.name} are not of one architecture:", *faults])
    if not common:
        raise CheckpointError(f"{base.path.name} and {tuned.path.name} have none of {', '.join(parts)} in common.")
    scaled = [key for key in old.keys() & new.keys() if {old[key].dtype, new[key].dtype} - set(FLOATS)]
    if scaled:
        raise CheckpointError(f"{len(scaled)} layers are stored as integers (quantized), such as {' '.join(min(scaled))}; a model in fp16, bf16 or fp32 is needed.")
    return [Pair(*key, old[key], new[key]) for key in old if key in new]


def _unused(key: tuple[str, str], owner: BaseModel) -> bool:
    """Whether a layer is the last one of SD2's text encoder in a single file: no program uses it, and folders do not have it."""
    return owner.single is not None and key[0] == TEXT and key[1].startswith("text_model.encoder.layers.23.")


def _alike(one: Spot, two: Spot) -> bool:
    """Whether two weights have one shape; a 1x1 convolution and a matrix do."""
    return one.shape[:2] == two.shape[:2] and (one.shape[2:] == two.shape[2:] or {one.shape[2:], two.shape[2:]} == {(), (1, 1)})


def extracted(pair: Pair, limit: Limit, dtype: torch.dtype, device: torch.device) -> tuple[LoraTensors | None, Loss] | None:
    """The layer's LoRA in the type that it is stored in, and what it lost. None: the layer did not change; no LoRA where `limit` has a rank of 0."""
    old, new = pair.base.read(), pair.tuned.read()
    new = new.reshape(old.shape)
    if _unchanged(old, new):
        return None
    delta = new.to(device, torch.float64) - old.to(device, torch.float64)
    size = float(delta.norm())
    if not math.isfinite(size):
        raise CheckpointError(f"{pair.component} {pair.path} holds inf or nan in one of the models.")
    if limit.rank == 0:
        return None, Loss(size, size, 0)
    lora = nearest(delta, limit)
    lora = cast(LoraTensors(lora.down.cpu(), lora.up.cpu(), lora.alpha), dtype)
    return lora, Loss(size, float((lora.delta(torch.float64) - delta.cpu()).norm()), lora.rank)


def _unchanged(old: Tensor, new: Tensor) -> bool:
    """Whether the values are the same, or would be if both models were stored in the coarser of their types."""
    return torch.equal(old, new) or torch.equal(old.to(new.dtype), new) or torch.equal(new.to(old.dtype), old)


def others(base: BaseModel, tuned: BaseModel, parts, lost: dict[str, dict[str, Loss]]) -> list[str]:
    """What is said of weights that a LoRA cannot hold: biases, norms, embeddings."""
    if (base.single is None) != (tuned.single is None):
        return ["biases, norms and embeddings were not compared, since one model is a folder and the other a file"]
    change, count = 0.0, 0
    for old, new, name in _rest(base, tuned, parts):
        before, after = (file.tensor(name) for file in (old, new))
        if before.shape == after.shape and before.is_floating_point() and not _unchanged(before, after):
            change, count = math.hypot(change, float((after.double() - before.double()).norm())), count + 1
    if not count:
        return []
    whole = math.hypot(change, *(loss.size for layers in lost.values() for loss in layers.values()))
    return [f"not in the LoRA: {count} biases, norms and embeddings that differ too, which no LoRA holds: {output.percent(change / whole)} of the whole change (norm)"]


def _rest(base: BaseModel, tuned: BaseModel, parts) -> Iterator[tuple[WeightFile, WeightFile, str]]:
    """(file, file, name) of the parts' tensors that are no layer's weight, and are in both models."""
    layers = {(spot.file.path, spot.place.name) for _, _, spot in base.layers()}
    prefixes = tuple(prefix for part in parts for prefix, _ in PREFIXES[part])
    for part in parts if base.single is None else ("",):
        olds, news = ([model.single] if model.single else model.parts.get(part, []) for model in (base, tuned))
        where = {name: file for file in reversed(news) for name in file.header.entries}
        seen: set[str] = set()
        for file in olds:
            for name in file.header.entries:
                if name in where and name not in seen and (file.path, name) not in layers and (base.single is None or name.startswith(prefixes)):
                    seen.add(name)
                    yield file, where[name], name


def _dtype(args: argparse.Namespace, pair: Pair) -> torch.dtype:
    """--save_dtype; without it fp16 where the models have no more digits, else fp32."""
    wide = {pair.base.dtype, pair.tuned.dtype} & {"F32", "F64"}
    return DTYPES[args.save_dtype or ("fp32" if wide else "fp16")]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise CheckpointError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def _metadata(base: BaseModel, tuned: BaseModel, args: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """What is known of the base model: its name, its version as webui calls it, what it predicts; and what is said of doubts."""
    found, lines = {META_BASE_MODEL: base.path.stem if base.single else base.path.name}, []
    prediction = base.prediction or tuned.prediction
    if prediction:
        found[META_PREDICTION] = prediction
    if base.prediction and tuned.prediction not in (None, base.prediction):
        lines.append(f"warning: {base.path.name} predicts {base.prediction}, {tuned.path.name} {tuned.prediction}; the LoRA is marked as one for {base.prediction}")
    family = base.family
    if family == "sd2" and not prediction and "modelspec.prediction_type" not in output.said(args):
        lines.append("warning: nothing tells whether these models predict epsilon or v, so the LoRA does not say it; --metadata modelspec.prediction_type=v (or epsilon) does")
    if family:
        version = {"v_prediction": "sd_v2_v", "epsilon": "sd_v2"}.get(prediction) if family == "sd2" else webui.BY_NAME[family].version
        found |= {META_BASE_VERSION: version} if version else webui.BY_NAME[family].extra
    return found, lines


def _family(layers: Layers, metadata: dict[str, str], told: str | None, base: BaseModel) -> Found:
    found = find_family(layers, metadata, told)
    return replace(found, how=f"as {base.path.name} is") if told is None and found.family.name == base.family else found


def _say(out: Console, pairs: list[Pair], lost: dict[str, dict[str, Loss]]) -> None:
    same = len(pairs) - sum(map(len, lost.values()))
    output.say_losses(out, lost)
    if same:
        out.print(f"{same} of {len(pairs)} layers are the same in both models, and are not in the LoRA")
    left = sum(loss.rank == 0 for layers in lost.values() for loss in layers.values())
    if left:
        out.print(f"{left} convolutions are left out (--conv_rank 0)")

"""Tensors of a LoRA file in any spelling -> LoraTensors by component and module path, or every fault there is."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..lora_tensors import LoraTensors
from .spellings import ALPHA, ANCESTOR, DOWN, MID, PEFT, UP, Key, NotLora, read_key

SCALE_ONE = "hcpdiff.scale_one"  # in the header of a file whose factors hold every scale
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredLora(LoraTensors):
    """LoraTensors of a file, with alpha also as the tensor that the file held (None where it had to be worked out)."""

    alpha_tensor: Tensor | None = None


Parts = dict[str, tuple[str, Tensor, str]]  # part -> (the file's key, tensor, the key's spelling)


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], component: str | None, path: Path) -> tuple[dict, str, list[str]]:
    """Layers by component, the spelling, and notices. CheckpointError with all faults; `component` is what the metadata says."""
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.")
    places, spellings, notices, faults = _sort_keys(tensors, component, path)
    scales = _peft_scales(metadata, path, notices) if PEFT in spellings else {}
    layers: dict[str, dict[str, LoraTensors]] = {}
    wrong: dict[str, list[str]] = {}
    for (name, layer), parts in places.items():
        try:
            layers.setdefault(name, {})[layer] = _layer(parts, _scale_of(scales, name, layer))
        except _Fault as fault:
            wrong.setdefault(fault.what, []).append(fault.where)
    faults += [f"{path}: {what}: {_some(where)}." for what, where in wrong.items()]
    if faults:
        raise CheckpointError(faults)
    if scales == {} and PEFT in spellings and SCALE_ONE not in metadata and not any(ALPHA in parts for parts in places.values()):
        notices.append("the file has no alpha and no PEFT config beside it: scale 1 is taken for every layer")
    return layers, "+".join(spellings), notices


class _Fault(ValueError):
    def __init__(self, what: str, where: str):
        super().__init__(what)
        self.what, self.where = what, where


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _sort_keys(tensors: Mapping[str, Tensor], component: str | None, path: Path):
    """(component, layer) -> parts; the spellings met, in order; notices; faults about keys."""
    places: dict[tuple[str, str], Parts] = {}
    spellings, unknown, faults = [], {}, []
    keys: dict[str, Key] = {}
    for name in tensors:
        try:
            keys[name] = read_key(name, component)
        except NotLora as why:
            unknown.setdefault(str(why), []).append(name)
    notices = _drop_ema(keys)
    for name, key in keys.items():
        parts = places.setdefault((key.component, key.path), {})
        if key.part in parts:
            faults.append(f"{path}: {parts[key.part][0]!r} and {name!r} are the same part of {key.component} {key.path}.")
        parts[key.part] = (name, tensors[name], key.spelling)
        if key.spelling not in spellings:
            spellings.append(key.spelling)
    faults += [f"{path}: {len(names)} of {len(tensors)} keys cannot be read ({why}): {_some(names)}." for why, names in unknown.items()]
    return places, spellings, notices, faults


def _drop_ema(keys: dict[str, Key]) -> list[str]:
    """The ancestor's files may hold averaged copies (`lora_ema:`) beside the weights: those are left out where both are there."""
    groups = {key.group for key in keys.values()}
    averaged = [name for name, key in keys.items() if key.group.endswith("_ema") and key.group.removesuffix("_ema") in groups]
    for name in averaged:
        del keys[name]
    return [f"{len(averaged)} tensors of averaged (EMA) copies are left out"] if averaged else []


def _layer(parts: Parts, scale: float | None) -> StoredLora:
    for part, other in ((DOWN, UP), (UP, DOWN)):
        if part not in parts:
            have = parts.get(other) or parts.get(ALPHA) or parts[MID]
            raise _Fault(f"half a pair, the {part} factor is missing", have[0])
    for key, tensor, _ in parts.values():
        _check_values(key, tensor)
    down, up = _matched(*parts[DOWN][:2], *parts[UP][:2])
    if MID in parts:
        down = _fold(down, *parts[MID][:2])
    return _with_alpha(down, up, parts.get(ALPHA), scale)


def _check_values(key: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        raise _Fault("an empty tensor", key)
    if tensor.dtype not in FLOATS:
        raise _Fault(f"stored as {str(tensor.dtype).removeprefix('torch.')}, where float32, float16, bfloat16 or float64 is wanted", key)
    if not bool(torch.isfinite(tensor).all()):
        raise _Fault("values that are not finite (inf or nan)", key)


def _matched(down_key: str, down: Tensor, up_key: str, up: Tensor) -> tuple[Tensor, Tensor]:
    """down (r, in) with up (out, r), or down (r, in, kh, kw) with up (out, r, 1, 1)."""
    if down.dim() not in (2, 4) or up.dim() not in (2, 4) or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
        raise _Fault(f"shapes that do not fit each other, down {tuple(down.shape)} and up {tuple(up.shape)}", down_key)
    if down.dim() == 4 and up.dim() == 2:
        up = up[..., None, None]
    if down.dim() == 2 and up.dim() == 4:
        up = up[..., 0, 0]
    return down, up


def _fold(down: Tensor, mid_key: str, mid: Tensor) -> Tensor:
    """LoCon's Tucker form, up @ mid (r, r, kh, kw) @ down (r, in): mid and down become one factor (r, in, kh, kw), in float32."""
    rank = down.shape[0]
    if mid.dim() != 4 or mid.shape[:2] != (rank, rank) or math.prod(down.shape[2:]) != 1:
        raise _Fault(f"shapes that do not fit each other, mid {tuple(mid.shape)} and down {tuple(down.shape)}", mid_key)
    return torch.einsum("rshw,si->rihw", mid.double(), down.flatten(1).double()).float().contiguous()


def _with_alpha(down: Tensor, up: Tensor, stored: tuple[str, Tensor, str] | None, scale: float | None) -> StoredLora:
    rank = down.shape[0]
    if stored is None:
        return StoredLora(down, up, rank * (1.0 if scale is None else scale))
    key, alpha, spelling = stored
    if alpha.numel() != 1:
        raise _Fault(f"alpha is not one number but of shape {tuple(alpha.shape)}", key)
    if spelling == ANCESTOR:  # it stored alpha / rank
        return StoredLora(down, up, float(alpha) * rank)
    return StoredLora(down, up, float(alpha), alpha)


def _peft_scales(metadata: Mapping[str, str], path: Path, notices: list[str]) -> dict:
    """PEFT's config, which alone holds alpha: from the header (diffusers) or from `adapter_config.json` beside the file (PEFT)."""
    beside = path.with_name("adapter_config.json")
    source, raw = "the header's lora_adapter_metadata", metadata.get("lora_adapter_metadata", "").encode()
    if not raw and path.name.startswith("adapter_model") and beside.is_file():
        source, raw = str(beside), beside.read_bytes()
    if not raw:
        return {}
    try:
        config = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {source} is not JSON ({str(error)[:100]}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: {source} is not a map.")
    if config.get("use_dora"):
        raise CheckpointError(f"{path}: {source} says use_dora: DoRA's magnitude has no place in a LoRA (up, down, alpha).")
    notices.append(f"alpha is taken from {source}")
    return config


def _scale_of(config: Mapping, component: str, layer: str) -> float | None:
    """alpha / r (alpha / sqrt r with rslora) of a layer in a PEFT config, whose keys may begin with the component; None without one."""
    own = {key.removeprefix(f"{component}."): value for key, value in config.items() if key.startswith(f"{component}.")} or config
    alpha, rank = _pattern(own, "alpha_pattern", layer, own.get("lora_alpha")), _pattern(own, "rank_pattern", layer, own.get("r"))
    if alpha is None or rank is None:
        return None
    if not all(type(value) in (int, float) and value < 1e9 for value in (alpha, rank)) or alpha < 0 or rank <= 0:
        raise _Fault(f"the PEFT config's lora_alpha = {str(alpha)[:40]} and r = {str(rank)[:40]} are not two positive numbers", layer)
    return alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _pattern(config: Mapping, name: str, layer: str, default):
    """The entry of `rank_pattern` or `alpha_pattern` for a layer. PEFT reads its keys as regular expressions for a path or its end; the
    names that diffusers and PEFT write are plain ones, and a downloaded file gets no regular expression run here.
    """
    patterns = config.get(name)
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if any(char in plain for char in "*+?()[]{}|\\^$"):
            raise _Fault(f"the PEFT config's {name} has {pattern[:80]!r}, only plain layer names are read", layer)
        if layer.endswith(f".{plain}") or plain in (layer, layer.removeprefix("text_model.")):
            return value
    return default

"""What a LoRA file is: spelling, family, layers, ranks, strengths, sizes of the deltas, metadata, and whatever is wrong with it."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..checkpoint.convert import Layers, find_family
from ..checkpoint.export import payload_hash
from ..checkpoint.format import LoraFile, load_lora
from ..checkpoint.io import read_tensor
from ..checkpoint.metadata import HASH
from ..checkpoint.safetensors_header import Header, read_header
from ..checkpoint.spellings import DOWN, WEBUI_LDM, NotLora, read_key
from ..errors import CheckpointError
from .algebra import norm
from .base_model import BaseModel, misfits
from .programs import remarks


@dataclass(frozen=True)
class Layer:
    """One layer: its kind (Linear, 1x1, 3x3), rank, alpha, and the Frobenius norm of its delta (None where it was not worked out)."""

    component: str
    path: str
    kind: str
    rank: int
    alpha: float | None
    norm: float | None


@dataclass
class Info:
    """Everything that is said of a file. `faults` is why it cannot be used; `warnings` what a user should know."""

    path: str
    bytes: int
    tensors: int
    dtypes: dict[str, int]
    spelling: str = ""
    family: str = ""
    version: str = ""
    family_from: str = ""
    layers: list[Layer] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    fits: bool | None = None

    def as_json(self) -> str:
        """All of it, for programs."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=2)


def look(path: Path, model: BaseModel | None = None) -> Info:
    """Reads the file and tells what there is to tell, also of one that is damaged inside. CheckpointError where it is no safetensors file."""
    header = read_header(path)
    info = Info(str(path), path.stat().st_size, len(header.entries), dict(Counter(entry.dtype for entry in header.entries.values())), metadata=header.metadata)
    info.hashes = _hashes(path, header, info.warnings)
    try:
        file = load_lora(path)
    except CheckpointError as error:
        info.faults += error.faults + _not_finite(path, header)
        info.layers = _from_header(header)
        return info
    info.spelling, info.warnings = file.spelling, info.warnings + list(file.notices)
    info.layers = [_layer(component, layer, lora) for component, named in file.layers.items() for layer, lora in named.items()]
    _say_family(info, file, header)
    info.warnings += _effects(info.layers)
    if model is not None:
        _say_fit(info, model, file.layers)
    return info


def _layer(component: str, path: str, lora) -> Layer:
    kind = {(): "Linear", (1, 1): "1x1"}.get(kernel := tuple(lora.down.shape[2:]), "x".join(map(str, kernel)))
    return Layer(component, path, kind, lora.rank, lora.alpha, norm(lora))


def _hashes(path: Path, header: Header, warnings: list[str]) -> dict[str, str]:
    """AutoV2 and AutoV3, as webui and civitai name a file; a stated hash that is not the true one goes into `warnings`."""
    with open(path, "rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    payload = payload_hash(path)
    stated = header.metadata.get(HASH)
    if stated is not None and stated != payload:
        warnings.append(f"{HASH} in the metadata is {stated[:12]}…, the bytes give {payload[:12]}…: the file was changed after it was made, or the hash was copied")
    return {"sha256": whole, "AutoV2": whole[:10], "AutoV3": payload[:12]}


def _not_finite(path: Path, header: Header) -> list[str]:
    """How many values are not numbers, where that is the trouble."""
    counts = {}
    for name, entry in header.entries.items():
        tensor = read_tensor(path, header, name)
        bad = int((~torch.isfinite(tensor.float())).sum()) if tensor.dtype.is_floating_point else 0
        if bad:
            counts[name] = bad
    if not counts:
        return []
    return [f"{sum(counts.values())} values in {len(counts)} of {len(header.entries)} tensors are inf or nan, most in {max(counts, key=counts.get)!r}."]


def _from_header(header: Header) -> list[Layer]:
    """Layers as far as names and shapes show them."""
    found = []
    for name, entry in header.entries.items():
        try:
            key = read_key(name)
        except NotLora:
            continue
        if key.part == DOWN and len(entry.shape) in (2, 4):
            kind = {(): "Linear", (1, 1): "1x1"}.get(entry.shape[2:], "x".join(map(str, entry.shape[2:])))
            found.append(Layer(key.component, key.path, kind, entry.shape[0], None, None))
    return found


def _say_family(info: Info, file: LoraFile, header: Header) -> None:
    try:
        found = find_family(file.layers, file.metadata, ldm_names=WEBUI_LDM in file.spelling)
    except CheckpointError as error:
        info.warnings += error.faults
        return
    info.family, info.version, info.family_from = found.family.title, "" if found.open else found.version or "", found.how
    info.warnings += remarks(file, header.entries, found)


def _effects(layers: list[Layer]) -> list[str]:
    """Layers that change nothing."""
    idle = [layer for layer in layers if layer.norm == 0]
    if not idle:
        return []
    if len(idle) == len(layers):
        return ["this LoRA changes nothing, all its deltas are zero (was it saved before the first step?)"]
    counts = Counter(layer.component for layer in idle)
    return [f"{len(idle)} of {len(layers)} layers change nothing ({', '.join(f'{component} {count}' for component, count in counts.items())}), such as {idle[0].path}"]


def _say_fit(info: Info, model: BaseModel, layers: Layers) -> None:
    faults = misfits(model, layers, info.metadata)
    info.fits = not faults
    info.faults += [f"it does not fit {model.path.name}: {fault}" for fault in faults]


def groups(info: Info) -> Mapping[str, list[Layer]]:
    """The layers by component."""
    found: dict[str, list[Layer]] = {}
    for layer in info.layers:
        found.setdefault(layer.component, []).append(layer)
    return found

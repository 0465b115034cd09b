"""LoRA between our files and webui's: pure functions of tensors, and the proof that nothing changed on the way."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..families import webui
from ..families.webui import WebuiFamily
from ..lora_tensors import LoraTensors
from .format import COMPONENTS, META_BASE_VERSION, LoraFile, alpha_tensor
from .lora_parse import StoredLora
from .metadata import META_PREDICTION

Layers = Mapping[str, Mapping[str, LoraTensors]]  # component -> module path -> tensors
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# relative error of a delta whose factors were rounded to this dtype: two factors, unit roundoff each, and some room
_TOLERANCE = {torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Found:
    """The family that a LoRA is for, its base model's version as webui names it (None where nothing tells which of several), and how that is known.
    open: other families are possible too."""

    family: WebuiFamily
    version: str | None
    how: str
    open: bool = False

    def __str__(self) -> str:
        return f"{self.family.title}{f' ({self.version})' if self.version else ''}, {self.how}"


@dataclass(frozen=True)
class WebuiLora:
    """A webui file's tensors by key; the layers in them; attention layers that were added with no effect, since webui wants all four; once it is
    written, the file's SHA-256."""

    tensors: dict[str, Tensor]
    layers: dict[str, dict[str, LoraTensors]]
    completed: list[str] = field(default_factory=list)
    sha256: str = ""


def find_family(layers: Layers, metadata: Mapping[str, str], told: str | None = None, ldm_names: bool = False) -> Found:
    """Which Stable Diffusion the layers belong to. `told` is the user's word ('sd1', 'sd2', 'sdxl'); what contradicts the layers is a CheckpointError."""
    shapes = {component: {path: tuple(t.down.shape) for path, t in named.items()} for component, named in layers.items()}
    fitting = [family for family in webui.FAMILIES if not _foreign(layers, family)]
    if not fitting:
        raise CheckpointError(_no_family(layers))
    by_width = [family for family in fitting if webui.fits_released(family, shapes)]
    said = metadata.get(META_BASE_VERSION) or metadata.get("ss_base_model_version")
    if told:
        family = webui.BY_NAME[told]
        if family not in fitting or (by_width and family not in by_width):
            other = (by_width or fitting)[0]
            raise CheckpointError(f"{family.title} was asked for, but names and widths of these layers are those of {other.title}.")
        return Found(family, _version(family, metadata), "as told")
    named = webui.by_version(said or ("sd_v2" if metadata.get("ss_v2") == "True" else None))  # the latter is all that a file says whose version is not known
    if named in fitting and (named in by_width or not by_width):
        return Found(named, _version(named, metadata), "from the file's metadata")
    narrowed = by_width or [f for f in fitting if webui.fits_projections(f, shapes)] or fitting
    narrowed = [f for f in narrowed if f.ldm_names] or narrowed if ldm_names else narrowed
    family = narrowed[0]
    if len(narrowed) > 1:
        return Found(family, family.version, f"not settled by names or widths ({', '.join(f.name for f in narrowed)} are possible); --family says it", open=True)
    return Found(family, _version(family, metadata), "from its layers' widths" if by_width else "from its layers' names")


def _version(family: WebuiFamily, metadata: Mapping[str, str]) -> str | None:
    """Which of the family's versions the metadata names, by itself or by what the base model predicts; else the only one; else None."""
    said = metadata.get(META_BASE_VERSION) or metadata.get("ss_base_model_version")
    if said in family.versions:
        return said
    predicts = (metadata.get(META_PREDICTION) or metadata.get("modelspec.prediction_type", "")).replace("_prediction", "")
    fitting = [version for version, architecture in family.versions.items() if architecture == metadata.get("modelspec.architecture") or webui.PREDICTIONS.get(version) == predicts]
    return fitting[0] if len(fitting) == 1 else family.version


def with_word(found: Found, said: Mapping[str, str]) -> Found:
    """With the version that entries of the user's for the result's header tell, where nothing else does."""
    return found if found.version else replace(found, version=_version(found.family, said))


def other_family(layers: Layers, metadata: Mapping[str, str], version: str | None, ldm_names: bool = False) -> str:
    """For a LoRA that does not fit a base model of this version (`sd_v1` ...): that it is for another family, where the file settles that; else ''."""
    own = webui.by_version(version)
    if own is None:
        return ""
    try:
        found = find_family(layers, metadata, ldm_names=ldm_names)
    except CheckpointError:  # of no family that is known: the layers that do not fit say more
        return ""
    if found.open or found.family is own:
        return ""
    return f"this LoRA is for {found.family.title} ({found.how}), the model is {own.title}. Take a LoRA for {own.title}, or a model of the LoRA's kind."


def _foreign(layers: Layers, family: WebuiFamily) -> list[str]:
    return [f"{component} {path}" for component, named in layers.items() for path in named if family.webui_base(component, path) is None]


def _no_family(layers: Layers) -> str:
    closest = min(webui.FAMILIES, key=lambda family: len(_foreign(layers, family)))
    foreign, total = _foreign(layers, closest), sum(map(len, layers.values()))
    return (f"{len(foreign)} of {total} layers have names that {closest.title}, the nearest family, does not have: {', '.join(foreign[:3])}"
            f"{' …' if len(foreign) > 3 else ''}. webui would pass over them.")


def to_webui(layers: Layers, family: WebuiFamily, dtype: torch.dtype | None = None) -> WebuiLora:
    """The tensors of a webui file. alpha / rank is each layer's effective scale; factors keep their dtype unless `dtype` is given (float64, which
    webui does not expect, becomes float32).

    1x1 convolutions are written 4-D (diffusers needs it). Where webui uses a text encoder's attention only with q, k, v and out_proj all
    there (open_clip's encoders), missing ones are added with zero effect.
    """
    tensors, written, completed = {}, {}, []
    for component, named in layers.items():
        named, added = _complete(named) if component in family.fused else (named, [])
        completed += [f"{component} {path}" for path in added]
        for path, lora in named.items():
            lora = shaped(cast(lora, storable(lora, dtype)), family, component, path)
            base = family.webui_base(component, path)
            tensors.update({f"{base}.lora_down.weight": lora.down, f"{base}.lora_up.weight": lora.up, f"{base}.alpha": alpha_tensor(lora)})
            written.setdefault(component, {})[path] = lora
    return WebuiLora(tensors, written, completed)


def storable(lora: LoraTensors, dtype: torch.dtype | None = None) -> torch.dtype | None:
    """The type in which other programs' files hold a layer: `dtype` where one is asked for; float32 for float64, which they do not expect; the wider of two,
    since some multiply the factors as they are; else None, as it is."""
    wider = torch.promote_types(lora.down.dtype, lora.up.dtype)
    if dtype or wider == torch.float64:
        return dtype or torch.float32
    return None if lora.down.dtype == lora.up.dtype else wider


def cast(lora: LoraTensors, dtype: torch.dtype | None) -> LoraTensors:
    """Factors (and alpha, where it stays exact) in `dtype`; None changes nothing."""
    if dtype is None or lora.down.dtype == lora.up.dtype == dtype:
        return lora
    alpha = torch.tensor(lora.alpha, dtype=dtype)
    down, up = _balanced(lora) if dtype == torch.float16 else (lora.down, lora.up)
    for factor in (down, up):
        if not bool(torch.isfinite(factor.to(dtype)).all()):
            raise CheckpointError(f"a factor holds {float(factor.abs().max()):.3g}, more than {dtype} can hold; store it in bf16 or fp32.")
    return StoredLora(down.to(dtype), up.to(dtype), lora.alpha, alpha if float(alpha) == lora.alpha else None)


def exponent(factor: Tensor) -> int:
    """e of the largest magnitude, m x 2^e with 0.5 <= m < 1; 0 where all is zero."""
    return math.frexp(float(factor.abs().max()))[1]


def _balanced(lora: LoraTensors) -> tuple[Tensor, Tensor]:
    """The factors as they are, or, where fp16 (6e-5 to 65504 with all its digits) would lose one's numbers, with a power of two moved from one to
    the other: `up` is tiny after the first steps of a training."""
    sizes = exponent(lora.down), exponent(lora.up)
    if all(-6 <= size <= 15 for size in sizes):
        return lora.down, lora.up
    share = (sizes[1] - sizes[0]) // 2
    return lora.down.double() * 2.0**share, lora.up.double() * 2.0**-share


def _complete(named: Mapping[str, LoraTensors]) -> tuple[dict[str, LoraTensors], list[str]]:
    layers, added = dict(named), []
    for parent in dict.fromkeys(path.rsplit(".", 1)[0] for path in named if path.endswith(_ATTENTION)):
        present = next(named[f"{parent}.{name}"] for name in _ATTENTION if f"{parent}.{name}" in named)
        for name in _ATTENTION:
            if f"{parent}.{name}" not in layers:
                width = present.down.shape[1]
                layers[f"{parent}.{name}"] = LoraTensors(present.down.new_zeros(1, width), present.up.new_zeros(width, 1), 1.0)
                added.append(f"{parent}.{name}")
    return layers, added


def shaped(lora: LoraTensors, family: WebuiFamily, component: str, path: str) -> LoraTensors:
    """Factors in the number of dimensions that the layer has; CheckpointError where the kernel is another."""
    kind = family.kind(component, path)
    kernel = tuple(lora.down.shape[2:])
    if kind == "conv1" and kernel == ():
        return replace(lora, down=lora.down[..., None, None], up=lora.up[..., None, None])
    if kind == "linear" and kernel == (1, 1):
        return replace(lora, down=lora.down[..., 0, 0], up=lora.up[..., 0, 0])
    if kernel not in {"linear": [()], "conv1": [(1, 1)], "conv3": [(3, 3)]}[kind]:
        raise CheckpointError(f"{component} {path}: factors with a kernel of {kernel or 'no size'} do not fit this layer ({kind}).")
    return lora


def faults_of(layers: Layers, before: Layers, dtype: torch.dtype | None = None) -> list[str]:
    """What differs between two sets of LoRA: layers missing or added (with an effect), and weight deltas that are not equal. Empty: all is well."""
    faults = []
    for component in {**before, **layers}:
        old, new = before.get(component, {}), layers.get(component, {})
        faults += [f"{component} {path} is missing" for path in old if path not in new]
        faults += [f"{component} {path} was added with an effect" for path in new if path not in old and float(new[path].up.abs().max()) != 0]
        for path in old:
            if path in new and not same_delta(old[path], new[path], dtype):
                faults.append(f"{component} {path}: its weight delta changed by {distance(old[path], new[path]):.2e} of its size")
    return faults


def same_delta(a: LoraTensors, b: LoraTensors, dtype: torch.dtype | None = None) -> bool:
    """Whether two LoRA change a weight alike: bit for bit with the same scale, or (when stored in `dtype`) within its rounding."""
    if a.down.numel() == b.down.numel() and torch.equal(a.down.flatten(), b.down.flatten()) and torch.equal(a.up.flatten(), b.up.flatten()):
        return math.isclose(a.scale, b.scale, rel_tol=1e-6)
    return distance(a, b) <= _TOLERANCE.get(dtype, 1e-6)


def distance(a: LoraTensors, b: LoraTensors) -> float:
    """||delta a - delta b|| / ||delta a|| (Frobenius), from the factors alone, so that no dense delta is built."""
    if a.down.flatten(1).shape[1] != b.down.flatten(1).shape[1] or a.up.shape[0] != b.up.shape[0]:
        return math.inf
    (up_a, down_a), (up_b, down_b) = _factors(a), _factors(b)
    if _near(up_a, up_b) and _near(down_a, down_b):  # rounded: b - a = (up_b - up_a) down_b + up_a (down_b - down_a), in which nothing cancels
        change = _fast_norm(torch.cat([up_b - up_a, up_a], 1), torch.cat([down_b, down_b - down_a], 0))
        size = _fast_norm(up_a, down_a)
    else:
        change = _norm(torch.cat([up_a, -up_b], 1), torch.cat([down_a, down_b], 0))
        size = _norm(up_a, down_a)
    return change / size if size else (0.0 if change == 0 else math.inf)


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= 0.1 * float(a.norm())


def _factors(lora: LoraTensors) -> tuple[Tensor, Tensor]:
    return lora.up.flatten(1).double() * lora.scale, lora.down.flatten(1).double()


def _norm(up: Tensor, down: Tensor) -> float:
    """||up @ down|| = ||R_up @ R_down^T||."""
    return float((torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.t(), mode="r").R.t()).norm())


def _fast_norm(up: Tensor, down: Tensor) -> float:
    """The same from Gram matrices, several times faster; its relative error is the root of double precision's where columns cancel."""
    return math.sqrt(max(0.0, float(((up.t() @ up) * (down @ down.t())).sum())))


def join(files: Iterable[tuple[Path, LoraFile]]) -> dict[str, dict[str, LoraTensors]]:
    """The layers of several files as one; CheckpointError where two files hold the same layer."""
    layers: dict[str, dict[str, LoraTensors]] = {}
    owner: dict[tuple[str, str], Path] = {}
    clashes: dict[tuple[Path, Path], list[str]] = {}
    for path, file in files:
        for component, named in file.layers.items():
            for layer, lora in named.items():
                first = owner.setdefault((component, layer), path)
                if layer in layers.setdefault(component, {}):
                    clashes.setdefault((first, path), []).append(f"{component} {layer}")
                layers[component][layer] = lora
    if clashes:
        raise CheckpointError([f"{a} and {b} both hold {len(names)} layers ({names[0]} …): each part is given once." for (a, b), names in clashes.items()])
    return {component: layers[component] for component in COMPONENTS if component in layers}

"""LoRA as diffusers and PEFT store them: `lora_A` and `lora_B`, with alpha outside of the tensors."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..families.unet_names import installed_path
from ..families.webui import WebuiFamily
from ..lora_tensors import LoraTensors
from .convert import Layers, cast, exponent, shaped, storable

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class DiffusersLora:
    """A diffusers file's tensors by key; layers whose scale could not be laid into their stored type exactly and that are float32 for it."""

    tensors: dict[str, Tensor]
    widened: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PeftLora:
    """One component's PEFT adapter: tensors by key, and what `adapter_config.json` says of them."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def to_diffusers(layers: Layers, family: WebuiFamily, dtype: torch.dtype | None = None) -> DiffusersLora:
    """The file of `save_lora_weights`: `unet.<path>.lora_A.weight` ...; every layer's scale is laid into its factors.

    Such a file holds no alpha: diffusers takes rank for it, unless the header has a PEFT config, which releases before 0.34 ignore and which
    has to name the text encoder's modules as the reader's transformers does. With the scale in the factors there is nothing left to be read wrong.
    """
    tensors: dict[str, Tensor] = {}
    widened = []
    for component, named in layers.items():
        for path, lora in named.items():
            lora = shaped(lora, family, component, path)
            plain = with_scale_one(lora)
            widened += [f"{component} {path}"] if dtype is None and plain.up.element_size() > lora.up.element_size() else []
            tensors.update(_pair(f"{component}.{path}", cast(plain, storable(plain, dtype))))
    return DiffusersLora(tensors, widened)


def to_peft(named: Mapping[str, LoraTensors], family: WebuiFamily, component: str, dtype: torch.dtype | None = None) -> PeftLora:
    """PEFT's adapter of one component: `base_model.model.<path>.lora_A.weight`, with ranks and alphas in the config; factors stay as they are.

    Paths are those of transformers 5, whose CLIPTextModel has no `text_model.`; PEFT would pass over other names.
    """
    layers = {}
    for path, lora in named.items():
        lora = shaped(lora, family, component, path)
        lora = lora if lora.alpha > 0 else with_scale_one(lora)  # PEFT asks for a positive alpha
        layers[installed_path(component, path)] = cast(lora, storable(lora, dtype))
    tensors = {key: tensor for path, lora in layers.items() for key, tensor in _pair(f"base_model.model.{path}", lora).items()}
    return PeftLora(tensors, _config({path: (lora.rank, lora.alpha) for path, lora in layers.items()}))


def _pair(base: str, lora: LoraTensors) -> dict[str, Tensor]:
    return {f"{base}.lora_A.weight": lora.down, f"{base}.lora_B.weight": lora.up}


def with_scale_one(lora: LoraTensors) -> LoraTensors:
    """The same delta with alpha = rank. A scale that is a power of two goes into the factors' exponents, which changes no digit in any type that has
    room for them; else both factors become float32 and `up` carries the scale, rounded once."""
    rank, mantissa, power = float(lora.rank), *math.frexp(lora.scale)
    if lora.scale == 1:
        return LoraTensors(lora.down, lora.up, rank)
    if abs(mantissa) == 0.5:
        share = (power - 1 + exponent(lora.up) - exponent(lora.down)) // 2  # both factors end up of one size, as far from the ends of fp16 as can be
        down, up = _times(lora.down, 2.0**share), _times(lora.up, math.copysign(2.0 ** (power - 1 - share), mantissa))
        if down is not None and up is not None:
            return LoraTensors(down, up, rank)
    return LoraTensors(lora.down.float(), (lora.up.double() * lora.scale).float(), rank)


def _times(factor: Tensor, power: float) -> Tensor | None:
    """factor x power of two in the factor's type; None where numbers left its range, or so many became too small for their digits that fp32 would show it."""
    product = factor * power
    lost = float((product.double() / power - factor.double()).norm())
    return product if lost <= 2.0**-22 * float(factor.double().norm()) else None  # infinity and NaN are not, either


def _config(sizes: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """PEFT's config of an adapter; `sizes`: module path -> (rank, alpha). What most layers have stands once, the rest by full path."""
    rank = Counter(rank for rank, _ in sizes.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in sizes.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "bias": "none", "lora_dropout": 0.0,
        "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False, "use_dora": False, "target_modules": sorted(sizes), "r": rank, "lora_alpha": _number(alpha),
        "rank_pattern": {path: own for path, (own, _) in sizes.items() if own != rank},
        "alpha_pattern": {path: _number(own) for path, (_, own) in sizes.items() if own != alpha},
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value

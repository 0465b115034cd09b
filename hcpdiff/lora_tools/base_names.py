"""Under which keys base models keep the weight of a layer: diffusers' folders, and single files in the layout of the original programs. No torch.

Single files: the UNet by its LDM names; CLIP-L as transformers names it; OpenCLIP (SD2, and SDXL's second encoder) by open_clip's own names, with q, k
and v in one tensor and the projection turned.
"""

from collections.abc import Iterator
from dataclasses import replace

from ..families.ldm_names import OPEN_CLIP, Source, sources
from ..families.unet_names import ANY, clip_modules, unet_modules
from ..families.webui import TEXT, TEXT_2, UNET

_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_CLIP_PREFIXES = {TEXT: ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_encoder.", ""),
                  TEXT_2: ("conditioner.embedders.1.transformer.", "text_encoder_2.")}
_OPEN_CLIP_PREFIXES = {TEXT: "cond_stage_model.model.", TEXT_2: "conditioner.embedders.1.model."}
CLIP_DEPTH = 32  # layers of OpenCLIP-G, the deepest encoder of any Stable Diffusion


def in_folder(path: str) -> list[Source]:
    """Where a part's own file of a diffusers folder may have a layer's weight; text encoders with and without `text_model.`."""
    return [Source(f"{name}.weight") for name in dict.fromkeys((path, path.removeprefix("text_model.")))]


def in_single_file(component: str, path: str) -> list[Source]:
    """Where a single file may have it."""
    if component == UNET:
        return [Source(f"{prefix}{name}.weight") for prefix in _UNET_PREFIXES for name in _ldm(path)] + [Source(f"{prefix}{path}.weight") for prefix in ("", "unet.")]
    found = [replace(place, name=prefix + place.name) for prefix in _CLIP_PREFIXES[component] for place in in_folder(path)]
    weight = f"{path}.weight"
    return found + [replace(place, name=_OPEN_CLIP_PREFIXES[component] + place.name) for place in sources(OPEN_CLIP, [weight], {})[weight]]


def known_layers() -> Iterator[tuple[str, str]]:
    """(component, path) of every Linear and convolution that a Stable Diffusion of any kind may have."""
    yield from ((UNET, path) for path, module in unet_modules(ANY).items() if module.kind != "norm")
    for component in (TEXT, TEXT_2):
        yield from ((component, path) for path in clip_modules(CLIP_DEPTH))
    yield TEXT_2, "text_projection"


def _ldm(path: str) -> list[str]:
    module = unet_modules(ANY).get(path)
    if module is None:
        return []
    # an upsampler's number depends on whether its block has attention
    return [module.ldm, module.ldm.replace(".2.conv", ".1.conv")] if ".upsamplers." in path else [module.ldm]

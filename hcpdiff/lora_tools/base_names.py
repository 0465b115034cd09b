"""Under which keys base models keep the weight of a layer: diffusers' folders, and single files in the layout of the original programs. No torch.

Single files: the UNet by its LDM names; CLIP-L as transformers names it; OpenCLIP (SD2, and SDXL's second encoder) by open_clip's own names, with q, k
and v in one tensor and the projection turned.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..families.ldm_names import LDM_UNET, PREFIXES, PREFIXES_ALONE, Source, sources
from ..families.unet_names import ANY, clip_modules, unet_modules
from ..families.webui import TEXT, TEXT_2, UNET

CLIP_DEPTH = 32  # layers of OpenCLIP-G, the deepest encoder of any Stable Diffusion


def in_folder(path: str) -> list[Source]:
    """Where a part's own file of a diffusers folder may have a layer's weight; text encoders with and without `text_model.`."""
    return [Source(f"{name}.weight") for name in dict.fromkeys((path, path.removeprefix("text_model.")))]


def in_single_file(component: str, path: str) -> list[Source]:
    """Where a single file may have it."""
    rows = (*PREFIXES[component], *PREFIXES_ALONE[component])
    return [replace(place, name=prefix + place.name) for prefix, style in rows for place in _named(style, path)]


def _named(style: str, path: str) -> Iterable[Source]:
    if style == LDM_UNET:
        return [Source(f"{name}.weight") for name in _ldm(path)]
    weight = f"{path}.weight"
    return sources(style, [weight], {})[weight]


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

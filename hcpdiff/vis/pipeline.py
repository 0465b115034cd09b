"""A diffusers pipeline around the family's models, and the two steps of drawing with it: latents, pictures.

The trainer's previews and the visualizer share this; it loads nothing and copies no weights.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.field import not_multiple
from ..config.infer_schema import OWNED
from ..errors import ConfigError
from ..families.base import Conditioning, Models
from ..families.clip_unet import latent_affine

BLACK = -1 + 2 / 255  # in [-1, 1]; a picture that nowhere exceeds it is black


WATCHERS = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")  # parts of a pipeline that do not draw


@dataclass(frozen=True)
class Drawn:
    """PIL images of a batch; `redecoded`: the VAE's first result was black or not finite, and they come from a second pass in fp32."""

    images: list
    redecoded: bool = False


def pipeline_class(models_or_family) -> type:
    """diffusers' pipeline class of a family."""
    import diffusers

    return getattr(diffusers, getattr(models_or_family, "family", models_or_family).pipeline)


def part_names(kind: type) -> list[str]:
    """The parts that a pipeline cannot do without: scheduler, unet, vae, text encoders, tokenizers."""
    return [p.name for p in inspect.signature(kind.__init__).parameters.values() if p.default is p.empty and p.name not in ("self", *WATCHERS)]


def defaults(kind: type) -> dict:
    """The pipeline's own values of the arguments that have one."""
    return {p.name: p.default for p in inspect.signature(kind.__call__).parameters.values() if p.default is not p.empty}


def check_arguments(kind: type, args: Mapping) -> list[str]:
    """Faults of infer_args that the pipeline's signature shows."""
    import difflib

    known = [name for name, p in inspect.signature(kind.__call__).parameters.items() if name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD and name not in OWNED]
    faults = []
    for name in args:
        if name not in known and name not in OWNED:
            near = difflib.get_close_matches(name, known, n=1)
            faults.append(f"infer_args.{name} is no argument of {kind.__name__}. {f'Did you mean {near[0]}?' if near else 'It takes: ' + ', '.join(known)}")
    return faults


def assemble(models: Models, scheduler):
    """The family's pipeline over the modules as they are (adapters, hooks and all), without text encoders: it is given encoded prompts."""
    kind = pipeline_class(models)
    parts = {"scheduler": scheduler, "unet": models.unet, "vae": models.vae, "requires_safety_checker": False, "add_watermarker": False}
    takes = [p for p in inspect.signature(kind.__init__).parameters.values() if p.name != "self"]
    return kind(**{p.name: parts.get(p.name) for p in takes if p.name in parts or p.default is p.empty or p.default is None})


def check_vae(models: Models) -> None:
    """Refuses a VAE whose latents are not those of the denoiser."""
    vae, unet = models.vae.config, models.unet.config
    if vae.latent_channels != unet.in_channels:
        raise ConfigError(f"the VAE has {vae.latent_channels} latent channels, the UNet takes {unet.in_channels}: they do not belong together"
                          f"{' (an inpainting or instruct model is not drawn with yet)' if unet.in_channels in (8, 9) else ''}.")


def size_of(pipe, width: int | None, height: int | None, key: str = "infer_args.") -> tuple[int, int]:
    """(width, height), the model's own where they are null; sides that the VAE cannot make raise ConfigError."""
    factor, own = pipe.vae_scale_factor, pipe.unet.config.sample_size
    own_height, own_width = own if isinstance(own, (list, tuple)) else (own, own)
    size = {"width": int(width or own_width * factor), "height": int(height or own_height * factor)}
    faults = [f"{key}{name} = {value}; it {fault}." for name, value in size.items() if (fault := not_multiple(value, factor))]
    if faults:
        raise ConfigError(faults)
    return size["width"], size["height"]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per picture, so that its draws depend on its seed alone and are the same on every device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def sample(pipe, positive: Conditioning, negative: Conditioning, seeds: Sequence[int], width: int, height: int, args: Mapping) -> Tensor:
    """Latents (B,C,h,w) of a batch, finite or ConfigError. positive, negative: (B,T,D) on the device; seeds: one per picture."""
    draws = generators(seeds)
    shape = (1, pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    noise = torch.cat([torch.randn(shape, generator=g, dtype=torch.float32) for g in draws])  # drawn in fp32, whatever the compute dtype
    prompts = {"prompt_embeds": positive.hidden, "negative_prompt_embeds": negative.hidden}
    if positive.pooled is not None:
        prompts |= {"pooled_prompt_embeds": positive.pooled, "negative_pooled_prompt_embeds": negative.pooled}
    dtype = pipe.unet.dtype  # diffusers walks through all modules for it
    fixed = {"latents": noise.to(dtype), "generator": draws, "width": width, "height": height, "output_type": "latent", "return_dict": False}
    try:
        latents = pipe(**prompts, **fixed, **args)[0]
    except ValueError as error:  # what samplers and pipelines raise for arguments that do not go together
        raise ConfigError(f"the sampler {type(pipe.scheduler).__name__} cannot be run with these infer_args and new_components: {error}") from error
    lost = [seed for seed, latent in zip(seeds, latents) if not latent.isfinite().all()]
    if lost:
        raise ConfigError(f"the UNet gave values that are not finite (seed {', '.join(map(str, lost))}) in {dtype}: use dtype=bf16 or dtype=fp32.")
    return latents


@torch.no_grad()
def decode(pipe, latents: Tensor) -> Drawn:
    """Latents (B,C,h,w) -> PIL images. What comes out of a half-precision VAE black or not finite is decoded again in fp32."""
    pixels = vae_decode(pipe.vae, latents)
    broken = [n for n, picture in enumerate(pixels) if not picture.isfinite().all() or picture.max() <= BLACK]
    redecoded = False
    if broken and (dtype := pipe.vae.dtype) != torch.float32:
        cast(pipe.vae, torch.float32)
        try:
            pixels[broken] = vae_decode(pipe.vae, latents[broken])
        finally:
            cast(pipe.vae, dtype)
        redecoded = True
    return Drawn(pipe.image_processor.postprocess(pixels, output_type="pil", do_denormalize=[True] * len(pixels)), redecoded)


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """The module in another dtype, in place; past diffusers' own `to`, which warns of an empty list of modules at every call."""
    torch.nn.Module.to(module, dtype=dtype)


def vae_decode(vae, latents: Tensor) -> Tensor:
    """Scaled latents (B,C,h,w) -> pixels (B,3,H,W), about [-1,1], fp32."""
    dtype = vae.dtype
    shift, scale = (torch.as_tensor(value, dtype=dtype, device=latents.device) for value in latent_affine(vae.config))
    z = latents.to(dtype) / scale + shift
    return vae.decode(z, return_dict=False)[0].float()


@contextmanager
def evaluating(modules: Sequence[torch.nn.Module]):
    """Modules in eval mode inside, each sub-module's own mode restored after."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training

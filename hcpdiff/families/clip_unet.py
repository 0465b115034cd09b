"""What Stable Diffusion 1.x, 2.x and XL have in common: CLIP text encoders, a UNet on the latents of an AutoencoderKL, a schedule as DDPM has it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..device import send
from ..errors import ConfigError, collect
from . import clip_text
from .base import DENOISER, Component, Models, Tokens, component_of, text_components
from .place import Place, check_vae, open_place, vae_outline
from .read_parts import CPU, Reader
from .single_file import keys_for
from .source import MODEL_KEY
from .unet_names import text_path

MOST_TIMESTEPS = 1_000_000  # published models have 1000


class ClipUnet:
    """A family of such models; a subclass says its parts, encodes text, calls its UNet and names its versions."""

    name: ClassVar[str]
    pipeline: ClassVar[str]  # diffusers' class, as model_index.json names it
    components: ClassVar[tuple[Component, ...]]
    blocks: ClassVar[frozenset[str]] = frozenset({"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"})  # classes, of UNet and text encoders
    text_kinds: ClassVar[Mapping[str, str]]  # text encoder -> its class in transformers
    dense: ClassVar[tuple[str, ...]] = ("conv_in", "conv_out")

    @property
    def parts(self) -> tuple[str, ...]:
        """What a whole model has of weights."""
        return (*(component.name for component in self.components), "vae")

    def load(self, folder: Path | Place, name: str, parts: Sequence[str] | None = None, dtype: torch.dtype = torch.float32,
             vae: str | None = None, variant: str | None = None, key: str = MODEL_KEY, outlines: Sequence[str] = (),
             seen: Callable[[str, Models], None] | None = None) -> Models:
        """Reads the named parts (None: all) and the tokenizers, frozen and in eval mode, on the CPU in `dtype` (the VAE in fp32); of `outlines` all but the values."""
        place, parts = open_place(folder), self.parts if parts is None else parts
        self.check(place, parts, vae, key)
        models = Models(self, place.path, name, {}, self._tokenizers(place, key), place.config("scheduler"))
        for part in sorted(parts, key=lambda part: part != "vae"):  # what is done with it may go on beside the others
            module, models.unread[part] = self._outline(place, part, dtype, vae, variant, key)
            models.modules[part] = module.requires_grad_(False).eval()
            if part not in outlines:
                models.read(part, CPU)
            if seen:
                seen(part, models)
        if "vae" in models.modules:  # what latents need of the VAE outlives it
            models.extra["latent_shift"], models.extra["latent_scale"] = latent_affine(models.vae.config)
            self._check_channels(models, key)
        models.extra.update(self._extras(place))
        return models

    def _extras(self, place: Place) -> dict:
        """What else is to be known of a base model."""
        return {}

    def check(self, folder: Path | Place, parts: Sequence[str] | None = None, vae: str | None = None, key: str = MODEL_KEY) -> None:
        """ConfigError that names everything of the parts, the tokenizers and the scheduler that is not there or cannot be used."""
        place = open_place(folder)
        needed = [part for part in (self.parts if parts is None else parts) if not (part == "vae" and vae)]
        faults: list[str] = []
        collect(faults, lambda: place.check([*needed, *self._tokenizer_names(), "scheduler"], key), lambda: self._check_numbers(place),
                lambda: vae and check_vae(vae, place, keys_for(key).vae))
        if faults:
            raise ConfigError(faults)

    def _check_numbers(self, place: Place) -> None:
        """The noise schedule can be made and the VAE's geometry read, where their configs are there."""
        if place.has_config("scheduler"):
            _schedule(place.config("scheduler"), place.where("scheduler"))
        if place.has_config("vae"):
            self.latent_geometry(place)

    def _check_channels(self, models: Models, key: str) -> None:
        """A UNet that takes in more than the VAE's latents (inpainting, instructions) is of another kind, and cannot be trained as one of these."""
        unet = models.modules.get("unet")
        if unet is not None and unet.config.in_channels != models.vae.config.latent_channels:
            raise ConfigError(f"{key}: the UNet takes {unet.config.in_channels} channels, the VAE's latents have {models.vae.config.latent_channels}: they do not belong "
                              f"together{' (an inpainting or instruct model is neither trained nor drawn with yet)' if unet.config.in_channels in (8, 9) else ''}.")

    def _tokenizer_names(self) -> list[str]:
        return [tokenizer_of(component.name) for component in text_components(self)]

    def _tokenizers(self, place: Place, key: str) -> dict:
        from transformers import CLIPTokenizer

        return {name: place.tokenizer(CLIPTokenizer, name, key) for name in self._tokenizer_names()}

    def _outline(self, place: Place, part: str, dtype: torch.dtype, vae: str | None, variant: str | None, key: str) -> tuple[torch.nn.Module, Reader]:
        if part == "vae" and vae:
            return vae_outline(self._kind(part), vae, place, torch.float32, keys_for(key).vae)
        return place.outline(self._kind(part), part, torch.float32 if part == "vae" else dtype, variant, key)

    def _kind(self, part: str) -> type:
        """The class of a part."""
        import diffusers
        import transformers

        kinds = {"vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel}
        return kinds.get(part) or getattr(transformers, self.text_kinds[part])

    def latent_geometry(self, folder: Path | Place) -> tuple[int, int]:
        """(pixels per latent cell and side, latent channels) from the VAE's config; 8 and 4 for every published model."""
        place = open_place(folder)
        path, config = place.where("vae"), place.config("vae")
        blocks, channels = config.get("block_out_channels"), config.get("latent_channels")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= 8 or type(channels) is not int or not 1 <= channels <= 1024:
            raise ConfigError(f"{path} is not the config of a VAE: block_out_channels = {str(blocks)[:60]}, latent_channels = {str(channels)[:60]}.")
        return 2 ** (len(blocks) - 1), channels

    def own_area(self, folder: Path | Place) -> int:
        """Pixels of the pictures that a base model was made for, from its UNet's config; 0 where it does not say."""
        place = open_place(folder)
        size = place.config("unet").get("sample_size")
        sides = size if isinstance(size, (list, tuple)) else [size, size]
        factor = self.latent_geometry(place)[0]
        return sides[0] * sides[1] * factor**2 if len(sides) == 2 and all(type(side) is int for side in sides) else 0

    def aliases(self, component: str, path: str) -> tuple[str, ...]:
        """Text-encoder modules are known with and without `text_model.`, and where there are several, by the encoder's short name before it; the path '' is the whole part."""
        own = component_of(self, component)
        if own.role == DENOISER or not path:
            return (path,) if path else (own.alias,) if own.alias else ()
        names = (path.removeprefix("text_model."), "text_model." + path.removeprefix("text_model."))
        return (*names, *(f"{own.alias}.{name}" for name in names)) if own.alias else names

    def file_path(self, component: str, path: str) -> str:
        """A module path as files spell it: text encoders with `text_model.`."""
        return path if component_of(self, component).role == DENOISER else text_path(path)

    def posterior(self, models: Models, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B,3,H,W) in [-1,1] -> mean, std (B,C,H/8,W/8) of the VAE's posterior, unscaled."""
        distribution = models.vae.encode(pixels).latent_dist
        return distribution.mean, distribution.std

    def scale_latent(self, models: Models, z: Tensor) -> Tensor:
        """(z - shift) * scale, as the VAE's config says."""
        shift, scale = (_beside(z, models.extra, name) for name in ("latent_shift", "latent_scale"))
        return (z - shift) * scale

    def tokenize(self, models: Models, prompts: Sequence[str], repeats: int) -> Tokens:
        """Prompts -> ids of `repeats` chunks each, for every text encoder."""
        rows = [clip_text.tokenize(tokenizer, prompts, repeats) for tokenizer in models.tokenizers.values()]
        return Tokens(tuple(ids for ids, _ in rows), tuple(map(max, zip(*(cut for _, cut in rows)))))

    def count_tokens(self, models: Models, prompt: str) -> int:
        """Tokens of a prompt, without BOS and EOS."""
        return len(clip_text.token_ids(models.tokenizer, prompt))

    def most_clip_skip(self, models: Models) -> int:
        """The largest clip_skip: at least one layer is left in each text encoder."""
        return min(clip_text.layers_of(models.modules[component.name]) for component in text_components(self)) - 1

    def text_layers_read(self, models: Models, component: str, clip_skip: int = 0) -> int:
        """All but those that clip_skip leaves out."""
        return clip_text.layers_of(models.modules[component]) - clip_skip

    def alphas_cumprod(self, models: Models) -> Tensor:
        """(T,) float32, zero terminal SNR included where the config asks for it."""
        return _schedule(models.scheduler_config, models.folder / "scheduler").alphas_cumprod

    def vae_dtype(self, vae: torch.nn.Module, dtype: torch.dtype) -> torch.dtype:
        """`dtype`: what comes out of it black or not finite is decoded again in fp32."""
        return dtype

    def checkpointing(self, models: Models, component: str) -> None:
        """Turns gradient checkpointing on for the UNet or a text encoder."""
        module = models.modules[component]
        if component_of(self, component).role == DENOISER:
            module.enable_gradient_checkpointing()
        else:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def regions(self, models: Models, component: str) -> list[torch.nn.Module]:
        """Transformer blocks and resnets of the UNet, layers of a text encoder."""
        return [module for module in models.modules[component].modules() if type(module).__name__ in self.blocks]


def import_kinds() -> None:
    """Imports the classes of a model's parts, which both libraries put off until one is asked for."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    del AutoencoderKL, DDPMScheduler, UNet2DConditionModel, CLIPTextModel, CLIPTokenizer


def tokenizer_of(text_encoder: str) -> str:
    """text_encoder_2 -> tokenizer_2."""
    return text_encoder.replace("text_encoder", "tokenizer")


def _beside(like: Tensor, numbers: dict, name: str) -> float | Tensor:
    """A number as it is; one for each channel as a tensor beside `like`, which it is once for all: a copy in every step would wait for the device."""
    value = numbers[name]
    if isinstance(value, list) or isinstance(value, Tensor) and (value.dtype, value.device) != (like.dtype, like.device):
        value = numbers[name] = send(torch.as_tensor(value, dtype=like.dtype), like.device)
    return value


def latent_affine(config: Mapping) -> tuple[float | list, float | list]:
    """(shift, scale) of a VAE's config, numbers or (C,1,1) lists: the denoiser works on (z - shift) * scale."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, config["scaling_factor"]
    return [[[value]] for value in mean], [[[config["scaling_factor"] / value]] for value in std]


def _schedule(config: Mapping, place: Path | str):
    """The noise schedule that a scheduler's config describes, as DDPM; ConfigError names `place` where there is none."""
    from diffusers import DDPMScheduler

    steps, kind = config.get("num_train_timesteps", 1000), str(config.get("_class_name", ""))
    if kind.startswith(("EDM", "FlowMatch")):
        raise ConfigError(f"{place}: {kind[:60]} is the schedule of another kind of model (EDM, flow matching), which cannot be trained yet.")
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        raise ConfigError(f"{place}: num_train_timesteps = {str(steps)[:60]} must be a whole number from 1 to {MOST_TIMESTEPS}.")
    try:
        return DDPMScheduler.from_config(dict(config))
    except Exception as error:  # constructors raise what a wrong value makes of them; the user needs the file's name
        raise ConfigError(f"{place}: no noise schedule can be made of it: {(str(error).splitlines() or [type(error).__name__])[0]}") from error

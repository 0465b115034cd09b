"""Stable Diffusion 1.x and 2.x (arXiv:2112.10752): one CLIP text encoder, a UNet on 8x smaller latents of 4 channels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..device import send
from ..errors import ConfigError
from . import clip_text
from .base import Component, Conditioning, Models, Tokens
from .place import Place, check_vae, load_vae, open_place
from .source import MODEL_KEY

VAE_KEY = "model.vae"
MOST_TIMESTEPS = 1_000_000  # published models have 1000


class StableDiffusion:
    """The family of StableDiffusionPipeline."""

    name = "sd"
    pipeline = "StableDiffusionPipeline"
    components = (
        Component("unet", "lora_unet", "unet", "lora_unet"),
        Component("text_encoder", "lora_text_encoder", "text_encoder", "lora_te"),
    )

    def load(self, folder: Path | Place, name: str, parts: Sequence[str] = ("unet", "text_encoder", "vae"), dtype: torch.dtype = torch.float32,
             vae: str | None = None, variant: str | None = None, key: str = MODEL_KEY) -> Models:
        """Reads the named parts and the tokenizer, frozen and in eval mode, on the CPU in `dtype` (the VAE in fp32)."""
        from transformers import CLIPTokenizer

        place = open_place(folder)
        self.check(place, parts, vae, key)
        modules = {part: self._load_part(place, part, dtype, vae, variant, key) for part in parts}
        for module in modules.values():
            module.requires_grad_(False).eval()
        models = Models(self, place.path, name, modules, {"tokenizer": place.tokenizer(CLIPTokenizer, "tokenizer", key)}, place.config("scheduler"))
        if "vae" in modules:  # what latents need of the VAE outlives it
            models.extra["latent_scale"] = models.vae.config.scaling_factor
            models.extra["latent_shift"] = getattr(models.vae.config, "shift_factor", None) or 0.0
        return models

    def check(self, folder: Path | Place, parts: Sequence[str] = ("unet", "text_encoder", "vae"), vae: str | None = None,
              key: str = MODEL_KEY) -> None:
        """ConfigError that names everything of the parts, the tokenizer and the scheduler that is not there or cannot be used."""
        place = open_place(folder)
        needed = [part for part in parts if not (part == "vae" and vae)]
        faults: list[str] = []
        for check in (lambda: place.check([*needed, "tokenizer", "scheduler"], key), lambda: self._check_numbers(place), lambda: vae and check_vae(vae, place, VAE_KEY)):
            try:
                check()
            except ConfigError as error:
                faults += error.faults
        if faults:
            raise ConfigError(faults)

    def _check_numbers(self, place: Place) -> None:
        """The noise schedule can be made and the VAE's geometry read, where their configs are there."""
        if place.has_config("scheduler"):
            _schedule(place.config("scheduler"), place.where("scheduler"))
        if place.has_config("vae"):
            self.latent_geometry(place)

    def _load_part(self, place: Place, part: str, dtype: torch.dtype, vae: str | None, variant: str | None, key: str) -> torch.nn.Module:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel

        if part == "vae" and vae:
            return load_vae(AutoencoderKL, vae, place, torch.float32, VAE_KEY)
        kind = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}[part]
        return place.load(kind, part, torch.float32 if part == "vae" else dtype, variant, key)

    def latent_geometry(self, folder: Path | Place) -> tuple[int, int]:
        """(pixels per latent cell and side, latent channels) from the VAE's config; 8 and 4 for every published model."""
        place = open_place(folder)
        path, config = place.where("vae"), place.config("vae")
        blocks, channels = config.get("block_out_channels"), config.get("latent_channels")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= 8 or type(channels) is not int or not 1 <= channels <= 1024:
            raise ConfigError(f"{path} is not the config of a VAE: block_out_channels = {str(blocks)[:60]}, latent_channels = {str(channels)[:60]}.")
        return 2 ** (len(blocks) - 1), channels

    def aliases(self, component: str, path: str) -> tuple[str, ...]:
        """Text-encoder modules are known with and without `text_model.`."""
        if component != "text_encoder":
            return (path,)
        return (path.removeprefix("text_model."), "text_model." + path.removeprefix("text_model."))

    def file_path(self, component: str, path: str) -> str:
        """A module path as files spell it: text encoders with `text_model.`."""
        return path if component == "unet" else "text_model." + path.removeprefix("text_model.")

    def posterior(self, models: Models, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B,3,H,W) in [-1,1] -> mean, std (B,4,H/8,W/8) of the VAE's posterior, unscaled."""
        distribution = models.vae.encode(pixels).latent_dist
        return distribution.mean, distribution.std

    def scale_latent(self, models: Models, z: Tensor) -> Tensor:
        """(z - shift) * scaling_factor, as the VAE's config says."""
        return (z - models.extra["latent_shift"]) * models.extra["latent_scale"]

    def tokenize(self, models: Models, prompts: Sequence[str], repeats: int) -> Tokens:
        """Prompts -> ids of `repeats` chunks each."""
        ids, cut = clip_text.tokenize(models.tokenizer, prompts, repeats)
        return Tokens((ids,), cut)

    def count_tokens(self, models: Models, prompt: str) -> int:
        """Tokens of a prompt, without BOS and EOS."""
        return len(clip_text.token_ids(models.tokenizer, prompt))

    def encode_text(self, models: Models, tokens: Tokens, clip_skip: int = 0) -> Conditioning:
        """Token ids (B,R,77) -> hidden (B, R*77, D)."""
        device = next(models.text_encoder.parameters()).device
        return Conditioning(clip_text.encode_chunks(models.text_encoder, send(tokens.ids[0], device), clip_skip))

    def denoise(self, models: Models, x_t: Tensor, t: Tensor, cond: Conditioning, extras: Mapping[str, Tensor]) -> Tensor:
        """The UNet's prediction (B,4,h,w)."""
        return models.unet(x_t, t, encoder_hidden_states=cond.hidden, return_dict=False)[0]

    def alphas_cumprod(self, models: Models) -> Tensor:
        """(T,) float32, zero terminal SNR included where the config asks for it."""
        return _schedule(models.scheduler_config, models.folder / "scheduler").alphas_cumprod

    def checkpointing(self, models: Models, component: str) -> None:
        """Turns gradient checkpointing on for the UNet or the text encoder."""
        module = models.modules[component]
        if component == "unet":
            module.enable_gradient_checkpointing()
        else:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def base_version(self, models: Models) -> str:
        """sd_v1, sd_v2 or sd_v2_v (v-prediction), as kohya's metadata names them."""
        if not models.unet.config.use_linear_projection:
            return "sd_v1"
        return "sd_v2_v" if models.scheduler_config.get("prediction_type") == "v_prediction" else "sd_v2"


def _schedule(config: Mapping, place: Path):
    """The noise schedule that a scheduler's config describes, as DDPM; ConfigError names `place` where there is none."""
    from diffusers import DDPMScheduler

    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        raise ConfigError(f"{place}: num_train_timesteps = {str(steps)[:60]} must be a whole number from 1 to {MOST_TIMESTEPS}.")
    try:
        return DDPMScheduler.from_config(dict(config))
    except Exception as error:  # constructors raise what a wrong value makes of them; the user needs the file's name
        raise ConfigError(f"{place}: no noise schedule can be made of it: {(str(error).splitlines() or [type(error).__name__])[0]}") from error

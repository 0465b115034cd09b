"""Stable Diffusion 1.x and 2.x (arXiv:2112.10752): one CLIP text encoder, a UNet on 8x smaller latents of 4 channels."""

from collections.abc import Mapping

from torch import Tensor

from ..device import send
from . import clip_text
from .base import DENOISER, TEXT, Component, Conditioning, Models, Tokens
from .clip_unet import ClipUnet


class StableDiffusion(ClipUnet):
    """The family of StableDiffusionPipeline."""

    name = "sd"
    pipeline = "StableDiffusionPipeline"
    components = (
        Component("unet", "lora_unet", "unet", "lora_unet", DENOISER),
        Component("text_encoder", "lora_text_encoder", "text_encoder", "lora_te", TEXT),
    )
    text_kinds = {"text_encoder": "CLIPTextModel"}

    def encode_text(self, models: Models, tokens: Tokens, clip_skip: int = 0) -> Conditioning:
        """Token ids (B,R,77) -> hidden (B, R*77, D)."""
        device = next(models.text_encoder.parameters()).device
        return Conditioning(clip_text.encode_chunks(models.text_encoder, send(tokens.ids[0], device), clip_skip))

    def denoise(self, models: Models, x_t: Tensor, t: Tensor, cond: Conditioning, extras: Mapping[str, Tensor]) -> Tensor:
        """The UNet's prediction (B,4,h,w)."""
        return models.unet(x_t, t, encoder_hidden_states=cond.hidden, return_dict=False)[0]

    def base_version(self, models: Models) -> str:
        """sd_v1, sd_v2 or sd_v2_v (v-prediction), as kohya's metadata names them."""
        if not models.unet.config.use_linear_projection:
            return "sd_v1"
        return "sd_v2_v" if models.scheduler_config.get("prediction_type") == "v_prediction" else "sd_v2"

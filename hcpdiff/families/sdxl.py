"""Stable Diffusion XL (arXiv:2307.01952): two CLIP text encoders side by side, a pooled text embedding, and each image's size and crop as conditions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..device import send
from . import clip_text
from .base import DENOISER, TEXT, Component, Conditioning, Models, Tokens, text_components
from .clip_unet import ClipUnet, tokenizer_of
from .place import Place

SIZES = ("original_size", "crop_top_left", "target_size")  # in the order of the time ids


class StableDiffusionXL(ClipUnet):
    """The family of StableDiffusionXLPipeline."""

    name = "sdxl"
    pipeline = "StableDiffusionXLPipeline"
    components = (
        Component("unet", "lora_unet", "unet", "lora_unet", DENOISER),
        Component("text_encoder", "lora_text_encoder", "text_encoder", "lora_te1", TEXT, "te1"),
        Component("text_encoder_2", "lora_text_encoder", "text_encoder_2", "lora_te2", TEXT, "te2"),
    )
    text_kinds = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}

    def _extras(self, place: Place) -> dict:
        """zero_negative: an empty negative prompt is zeros, not encoded text, as the model was trained with left-out captions (decision 0071)."""
        return {"zero_negative": place.index().get("force_zeros_for_empty_prompt", True) is not False}

    def encode_text(self, models: Models, tokens: Tokens, clip_skip: int = 0) -> Conditioning:
        """Token ids 2 x (B,R,77) -> hidden (B, R*77, D1 + D2), pooled (B, P).

        hidden: the layer before the last of each encoder (clip_skip counts from there), without a final norm. pooled: of the second encoder, at
        the EOS of the first chunk, as AUTOMATIC1111's webui and ComfyUI take it of a prompt of several chunks.
        """
        hidden = []
        for component, ids in zip(text_components(self), tokens.ids, strict=True):
            encoder = models.modules[component.name]
            states, last = clip_text.states_of(encoder, send(ids, next(encoder.parameters()).device))
            hidden.append(states[-2 - clip_skip].reshape(len(ids), -1, last.shape[-1]))
        return Conditioning(torch.cat([part.to(hidden[0].device) for part in hidden], dim=-1), self._pooled(models, component.name, ids, last))

    def _pooled(self, models: Models, name: str, ids: Tensor, last: Tensor) -> Tensor:
        """(B,P): the first EOS of each first chunk through the projection. Not by the highest id, as transformers finds it: an embedding's words have higher ones."""
        eos = models.tokenizers[tokenizer_of(name)].eos_token_id
        place = send((ids[:, 0] == eos).int().argmax(-1), last.device)
        return models.modules[name].text_projection(last[torch.arange(len(ids), device=last.device), 0, place])

    def most_clip_skip(self, models: Models) -> int:
        """As everywhere at least one layer is left; the last is never read."""
        return super().most_clip_skip(models) - 1

    def text_layers_read(self, models: Models, component: str, clip_skip: int = 0) -> int:
        """The first encoder's last layer is never read; the pooled embedding reads all of the second's."""
        layers = clip_text.layers_of(models.modules[component])
        return layers if component == text_components(self)[-1].name else layers - 1 - clip_skip

    def denoise(self, models: Models, x_t: Tensor, t: Tensor, cond: Conditioning, extras: Mapping[str, Tensor]) -> Tensor:
        """The UNet's prediction (B,4,h,w). The sizes stay whole numbers until their sinusoids are made: bf16 would round 1025 to 1024."""
        added = {"text_embeds": cond.pooled, "time_ids": torch.cat([extras[name] for name in SIZES], dim=1)}
        return models.unet(x_t, t, encoder_hidden_states=cond.hidden, added_cond_kwargs=added, return_dict=False)[0]

    def vae_dtype(self, vae: torch.nn.Module, dtype: torch.dtype) -> torch.dtype:
        """fp32 instead of fp16 where its config says `force_upcast`: SDXL's own VAE overflows fp16 in every picture, mended ones say false."""
        return torch.float32 if dtype == torch.float16 and vae.config.get("force_upcast", True) else dtype

    def base_version(self, models: Models) -> str:
        """sdxl_base_v1-0, as kohya's metadata names it and webui looks for it."""
        return "sdxl_base_v1-0"

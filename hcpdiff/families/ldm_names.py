"""Every weight of a Stable Diffusion model by the name that single-file checkpoints (LDM, open_clip) have for it. No torch.

Names go one way only, from a parameter of the module to the places where a file may hold it: the module says what is needed, so a weight
that is missing or left over shows.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .unet_names import UnetPlan, unet_modules

HUGGINGFACE, OPEN_CLIP, LDM_VAE, DIFFUSERS, LDM_UNET = "huggingface", "open_clip", "ldm_vae", "diffusers", "ldm_unet"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES = {  # part -> where the single files of all kinds have it: prefix of its names, and style; for each kind in the order in which they are tried
    "unet": ((UNET, LDM_UNET),),
    "vae": ((VAE, LDM_VAE),),
    "text_encoder": (
        ("cond_stage_model.transformer.text_model.", HUGGINGFACE), ("cond_stage_model.transformer.", HUGGINGFACE), ("cond_stage_model.model.", OPEN_CLIP),
        ("conditioner.embedders.0.transformer.text_model.", HUGGINGFACE), ("conditioner.embedders.0.transformer.", HUGGINGFACE)),
    "text_encoder_2": (("conditioner.embedders.1.model.", OPEN_CLIP), ("conditioner.embedders.1.transformer.text_model.", HUGGINGFACE)),
}
PREFIXES_ALONE = {  # beside these in files of one part alone, or of parts in diffusers' names, which are no base models but can be worked on layer by layer
    "unet": (("diffusion_model.", LDM_UNET), ("", LDM_UNET), ("", DIFFUSERS), ("unet.", DIFFUSERS)),
    "text_encoder": (("text_encoder.", DIFFUSERS), ("text_encoder.", HUGGINGFACE), ("", DIFFUSERS), ("", HUGGINGFACE)),
    "text_encoder_2": (("conditioner.embedders.1.transformer.", HUGGINGFACE), ("text_encoder_2.", DIFFUSERS), ("text_encoder_2.", HUGGINGFACE)),
}


@dataclass(frozen=True)
class Source:
    """Where a parameter lies in a file: a name, and what is done with the tensor. third: which third of its rows (q, k, v in one); turned: transposed."""

    name: str
    third: int | None = None
    turned: bool = False


def sources(style: str, parameters: Iterable[str], config: Mapping[str, Any]) -> dict[str, tuple[Source, ...]]:
    """Parameter of a module -> the places of it in a file of this style, most usual first; () where the style has no name for it.

    config: the module's, whose depths and widths decide the numbers in LDM names.
    """
    if style == LDM_UNET:
        modules = unet_modules(unet_plan(config))
        return {parameter: _unet(parameter, modules) for parameter in parameters}
    blocks = len(config["block_out_channels"]) if style == LDM_VAE else 0
    name = {HUGGINGFACE: _huggingface, OPEN_CLIP: _open_clip, LDM_VAE: lambda parameter: _vae(parameter, blocks), DIFFUSERS: _diffusers}[style]
    return {parameter: name(parameter) for parameter in parameters}


def unet_plan(config: Mapping[str, Any]) -> UnetPlan:
    """What a UNet's names follow from, of its diffusers config."""
    widths, downs = tuple(config["block_out_channels"]), config["down_block_types"]
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    down = tuple(depth if "CrossAttn" in kind else 0 for depth, kind in zip(depths, downs))
    up = tuple(depth if "CrossAttn" in kind else 0 for depth, kind in zip(reversed(depths), config["up_block_types"]))
    return UnetPlan(down, depths[-1], up, widths, bool(config.get("use_linear_projection")), config.get("addition_embed_type") == "text_time")


def _unet(parameter: str, modules: Mapping[str, Any]) -> tuple[Source, ...]:
    path, _, leaf = parameter.rpartition(".")
    return (Source(f"{modules[path].ldm}.{leaf}"),) if path in modules else ()


_BEFORE_2023 = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # a VAE's attention, in most published ones


def _diffusers(parameter: str) -> tuple[Source, ...]:
    match = re.fullmatch(r"(.*\battentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)", parameter)
    return (Source(parameter), *([Source(f"{match[1]}.{_BEFORE_2023[match[2]]}.{match[3]}")] if match else []))


def _huggingface(parameter: str) -> tuple[Source, ...]:
    return (Source(parameter.removeprefix("text_model.")),)


_CLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
}
_CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def _open_clip(parameter: str) -> tuple[Source, ...]:
    """open_clip keeps q, k and v in one tensor, and its projection the other way round."""
    parameter = parameter.removeprefix("text_model.")
    if parameter == "text_projection.weight":
        return Source("text_projection", turned=True), Source("text_projection.weight")  # the second as ComfyUI saves it
    if parameter in _CLIP_TOP:
        return (Source(_CLIP_TOP[parameter]),)
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", parameter)
    if not match:
        return ()
    layer, path, leaf = f"transformer.resblocks.{match[1]}", match[2], match[3]
    if path in _CLIP_LAYER:
        return (Source(f"{layer}.{_CLIP_LAYER[path]}.{leaf}"),)
    third = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(path) if path.startswith("self_attn.") else None
    return () if third is None else (Source(f"{layer}.attn.in_proj_{leaf}", third=third),)


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_RULES = (  # diffusers' path -> LDM's; decoder blocks are counted from the other end
    (re.compile(r"(encoder|decoder)\.mid_block\.resnets\.([01])\.(.+)"), lambda m, n: f"{m[1]}.mid.block_{int(m[2]) + 1}.{m[3]}"),
    (re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)"), lambda m, n: f"{m[1]}.mid.attn_1.{_VAE_ATTENTION.get(m[2], m[2])}"),
    (re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(.+)"), lambda m, n: f"encoder.down.{m[1]}.block.{m[2]}.{m[3]}"),
    (re.compile(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv"), lambda m, n: f"encoder.down.{m[1]}.downsample.conv"),
    (re.compile(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(.+)"), lambda m, n: f"decoder.up.{n - 1 - int(m[1])}.block.{m[2]}.{m[3]}"),
    (re.compile(r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv"), lambda m, n: f"decoder.up.{n - 1 - int(m[1])}.upsample.conv"),
    (re.compile(r"(encoder|decoder)\.conv_norm_out"), lambda m, n: f"{m[1]}.norm_out"),
    (re.compile(r"(encoder|decoder)\.(conv_in|conv_out)|quant_conv|post_quant_conv"), lambda m, n: m[0]),
)


def _vae(parameter: str, blocks: int) -> tuple[Source, ...]:
    path, _, leaf = parameter.rpartition(".")
    for pattern, spell in _VAE_RULES:
        match = pattern.fullmatch(path)
        if match:
            return (Source(f"{spell(match, blocks).replace('conv_shortcut', 'nin_shortcut')}.{leaf}"),)
    return ()

"""What a single file of weights is, from the names and shapes in its header: which Stable Diffusion, or what else it is by mistake. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .ldm_names import DIFFUSERS, LDM_VAE, PREFIXES, UNET, VAE

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kind:
    """A kind of base model that is read from a single file. `layouts`: part -> (prefix of its names, style) in the order in which they are tried."""

    name: str
    title: str
    pipeline: str
    layouts: Mapping[str, tuple[tuple[str, str], ...]]

    def layout(self, part: str, shapes: Shapes) -> tuple[str, str] | None:
        """Prefix and style of a part in this file; None where the file has nothing of it."""
        return next((layout for layout in self.layouts[part] if any(name.startswith(layout[0]) for name in shapes)), None)


def _layouts(**beginnings: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """Of each part the rows of PREFIXES that begin so."""
    return {part: tuple(row for row in PREFIXES[part] if row[0].startswith(beginning)) for part, beginning in beginnings.items()}


SD1 = Kind("sd1", "Stable Diffusion 1.x", "StableDiffusionPipeline", _layouts(unet=UNET, vae=VAE, text_encoder="cond_stage_model.transformer."))
SD2 = Kind("sd2", "Stable Diffusion 2.x", "StableDiffusionPipeline", _layouts(unet=UNET, vae=VAE, text_encoder="cond_stage_model.model."))
SDXL = Kind("sdxl", "Stable Diffusion XL", "StableDiffusionXLPipeline", _layouts(unet=UNET, vae=VAE, text_encoder="conditioner.", text_encoder_2="conditioner."))

VAE_LAYOUTS = (  # of a file that holds a VAE, by a name that only this layout has: prefix, style
    (f"{VAE}encoder.conv_in.weight", VAE, LDM_VAE), ("encoder.down_blocks.0.resnets.0.conv1.weight", "", DIFFUSERS), ("encoder.down.0.block.0.conv1.weight", "", LDM_VAE),
)

# What files on the usual sites hold beside Stable Diffusion models: a pattern of names -> what it is called. The first that fits is told.
_LORA = re.compile(r"\.(lora_down|lora_up|lora_A|lora_B|lora_mid|hada_w1_a|lokr_w1|lokr_w1_a|oft_blocks|dora_scale)\b|^lora[:_]")
_OTHERS = (
    (re.compile(r"^(emb_params|clip_[lg]|string_to_param)$"), "a textual-inversion embedding, not a base model: it belongs into the visualizer's emb_dir"),
    (re.compile(r"^(model\.diffusion_model\.|transformer\.)?(double_blocks|single_transformer_blocks)\."), "a FLUX model or one built like it, which is not supported"),
    (re.compile(r"^(model\.diffusion_model\.|transformer\.)?joint_blocks\.|\.norm1_context\."), "a Stable Diffusion 3 model, which is not supported"),
    (re.compile(r"^(model\.diffusion_model\.)?(double_layers|cap_embedder|x_pad_token|patchify_proj|patch_embedding|y_embedder)\b"),
     "a diffusion transformer (AuraFlow, Lumina, Z-Image, PixArt, Wan, LTX …), which is not supported"),
    (re.compile(r"\bmotion_modules\.|\btime_stack\."), "a video model or motion module (AnimateDiff, Stable Video Diffusion), which is not supported"),
    (re.compile(r"^control_model\.|^controlnet_cond_embedding\.|^input_hint_block\."), "a ControlNet, not a base model"),
    (re.compile(r"\bip_adapter\.|^image_proj\."), "an IP-Adapter, not a base model"),
    (re.compile(r"^edm_(mean|std)$"), "Playground v2.5, whose noise schedule (EDM) is not supported"),
    (re.compile(r"^edm_vpred\."), "CosXL or another model with EDM noise levels, which are not supported"),
    (re.compile(r"^(noise_augmentor|embedder)\."), "an unCLIP model, which is not supported"),
)
_PARTS_ALONE = (  # where there is no UNet in LDM's spelling
    (re.compile(r"^down_blocks\.0\.(resnets|attentions)\."), "the UNet alone in diffusers' names: name the folder that holds model_index.json instead"),
    (re.compile(r"^(encoder|decoder)\.(conv_in|down|up|down_blocks|up_blocks)\b|^first_stage_model\."), "a VAE alone, not a base model: it can be {vae}"),
    (re.compile(r"^input_blocks\.0\."), "the UNet alone, without text encoder and VAE: a whole model is needed"),
    (re.compile(r"^(text_model\.)?(encoder\.layers|embeddings\.token_embedding)|^(token_embedding|positional_embedding|transformer\.resblocks)\b|\.encoder\.block\.0\.layer\.|^encoder\.block\."),
     "a text encoder alone, not a base model"),
)
_CHANNELS = {9: "an inpainting model", 8: "an InstructPix2Pix (edit) model", 7: "an upscaler", 5: "a depth-to-image model"}
USUAL_CHANNELS = 4
REFINER_CONTEXT = 1280  # SDXL's refiner reads OpenCLIP-G alone


def kind_of(shapes: Shapes, vae: str, lora: str) -> Kind | str:
    """The kind of a file, or what it is instead and what to do with it, as the end of a sentence 'The file is ...'.

    vae, lora: the keys where such a file would be in place.
    """
    names = list(shapes)
    if any(_LORA.search(name) for name in names):
        return f"a LoRA, not a base model: it can be {lora}"
    other = next((what for pattern, what in _OTHERS if any(pattern.search(name) for name in names)), None)
    if other:
        return other
    if not any(name.startswith(UNET) for name in names):
        alone = next((what for pattern, what in _PARTS_ALONE if any(pattern.search(name) for name in names)), None)
        return alone.format(vae=vae) if alone else f"no Stable Diffusion model: no name in it begins with {UNET} (it holds {_few(names)})"
    channels = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, USUAL_CHANNELS))[1:2]
    if channels and channels[0] in _CHANNELS:
        return f"{_CHANNELS[channels[0]]} (its UNet takes {channels[0]} channels), which is not supported"
    return _by_encoders(shapes)


_ADVICE = {"the UNet alone": "the weights of a UNet", "a VAE alone": "a VAE", "a text encoder alone": "a text encoder"}


def not_lora(shapes: Shapes) -> str | None:
    """What a file is in which no name is a LoRA's, and what to do with it, as the end of 'The file is ...'; None where that is not known."""
    if all(name.startswith("state.") for name in shapes):
        return "a training state, not a LoRA: the LoRA of that step are in ckpts/ of the run folder, and train.resume takes the state's folder"
    kind = kind_of(shapes, "", "")
    if isinstance(kind, Kind):
        return f"a whole model ({kind.title}), not a LoRA: name it as the base model. lora_extract makes a LoRA of what it differs from another model"
    if kind.startswith(("a LoRA", "no Stable Diffusion model")):
        return None
    plain = next((what for alone, what in _ADVICE.items() if kind.startswith(alone)), None)
    if plain:
        return f"{plain}, not a LoRA: it is a part of a base model. lora_extract makes a LoRA of what a model differs from another"
    return kind.replace(", not a base model", ", not a LoRA") if ", not a base model" in kind else f"{kind}; it is not a LoRA"


def _by_encoders(shapes: Shapes) -> Kind | str:
    """Text encoders tell the kinds apart; where there are none, the UNet does."""
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    if has(f"{UNET}label_emb."):
        context = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2), 0)
        if has("conditioner.embedders.1.") or has("conditioner.embedders.0.transformer.") or not has("conditioner.") and not has("cond_stage_model.") and context != REFINER_CONTEXT:
            return SDXL
        if has("conditioner.") or context == REFINER_CONTEXT:
            return "the refiner of Stable Diffusion XL, which is not trained or drawn with here: name the base model"
        return "a model with class embeddings (an upscaler or unCLIP), which is not supported"
    if has("cond_stage_model.model."):
        return SD2
    if has("cond_stage_model.transformer."):
        return SD1
    return SD2 if any(name.endswith("proj_in.weight") and len(shape) == 2 for name, shape in shapes.items()) else SD1


def _few(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "no tensors"


# Names that take part in nothing here, in files of the kinds above.
_IDLE = re.compile(r"""
    model_ema\..*                                                                                    # the running mean of the UNet
    | (model\.)?(alphas_cumprod(_prev)? | betas | sqrt_\w+ | log_one_minus_\w+ | posterior_\w+ | lvlb_weights | logvar | scale_factor | global_step)
    | denoiser\.(sigmas | log_sigmas) | v_pred | ztsnr                                               # marks are read as such
    | (cond_stage_model | conditioner\.embedders\.[01])\..*\b(position_ids | attn_mask | logit_scale)  # buffers, and what only CLIP's own loss needs
    | cond_stage_model\.((model | transformer)\.)?text_projection(\.weight)? | cond_stage_model\.logit_scale
    | conditioner\.embedders\.0\.(transformer\.)?text_projection(\.weight)? | conditioner\.embedders\.[01]\.logit_scale
    | first_stage_model\.(loss | model_ema)\b.*
    | (first_stage_model\.)?(decoder | encoder)\.\w*_ema\b.*
    | embedding_manager\..*
    """, re.VERBOSE)


def idle(name: str) -> bool:
    """Whether a name belongs to nothing that is trained or drawn with: copies, buffers, marks."""
    return _IDLE.fullmatch(name) is not None


def unread(kind: Kind, shapes: Shapes) -> list[str]:
    """Names in a file of this kind that no part reads, sorted."""
    read = tuple(layout[0] for part in kind.layouts if (layout := kind.layout(part, shapes)))
    return [name for name in sorted(shapes) if not name.startswith(read) and not idle(name)]


def spelt_otherwise(kind: Kind, names: Sequence[str]) -> dict[str, list[str]]:
    """Part -> those of the `unread` names that are its own in another of its spellings."""
    found = {part: [name for name in names if name.startswith(tuple(prefix for prefix, _ in layouts))] for part, layouts in kind.layouts.items()}
    return {part: others for part, others in found.items() if others}


def in_two_ways(file: str, part: str, count: int, spelling: str, others: Sequence[str]) -> str:
    """The fault of a file that has names of a part beside those that are read."""
    return (f"{file} spells its {part} in two ways: {count} names begin with {spelling}, {len(others)} do not, such as {others[0]}. "
            f"Which are meant cannot be told: save the model with one of them alone.")


def vae_layout(shapes: Shapes) -> tuple[str, str] | None:
    """Prefix and style of the VAE in a file; None where it holds none."""
    return next(((prefix, style) for name, prefix, style in VAE_LAYOUTS if name in shapes), None)

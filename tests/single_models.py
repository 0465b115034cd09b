"""Small models in the form of single-file checkpoints, written from a diffusers folder as such files are; diffusers' own reader is what they are tested against."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from hcpdiff.families.file_kind import SD1, SD2, SDXL
from hcpdiff.families.ldm_names import sources
from tests.tiny import TOKENIZER

KINDS = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
CLIP = {"sd1": {"text_encoder": "quick_gelu"}, "sd2": {"text_encoder": "gelu"}, "sdxl": {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}}
PARTS = {"sd1": ("unet", "vae", "text_encoder"), "sd2": ("unet", "vae", "text_encoder"), "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2")}


def make_parts(kind: str, seed: int = 0) -> dict[str, torch.nn.Module]:
    """Parts with the heads, groups and activations of the released models (what shapes do not show), and small widths."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",) if kind != "sdxl" else ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    own = {"sd1": {"attention_head_dim": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 64},
           "sd2": {"attention_head_dim": (1, 1, 2, 2), "block_out_channels": (64, 64, 128, 128), "cross_attention_dim": 64, "use_linear_projection": True, "upcast_attention": True},
           "sdxl": {"attention_head_dim": (1, 1, 2), "block_out_channels": (64, 64, 128), "cross_attention_dim": 192, "use_linear_projection": True,
                    "transformer_layers_per_block": (1, 2, 3), "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 128 + 48}}[kind]
    size = {"sd1": 64, "sd2": 96, "sdxl": 128}[kind]
    parts = {
        "unet": UNet2DConditionModel(sample_size=size, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=32, down_block_types=down, up_block_types=up, **own),
        "vae": AutoencoderKL(block_out_channels=(32, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
                             latent_channels=4, norm_num_groups=32, sample_size={"sd1": 512, "sd2": 768, "sdxl": 1024}[kind],
                             scaling_factor=0.13025 if kind == "sdxl" else 0.18215, force_upcast=True),
    }
    for name, act in CLIP[kind].items():
        width = 128 if name == "text_encoder_2" else 64
        config = CLIPTextConfig(vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=width // 64, hidden_act=act,
                                max_position_embeddings=77, projection_dim=width, pad_token_id=1, bos_token_id=0, eos_token_id=2)
        parts[name] = (CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel)(config)
    return {name: part.requires_grad_(False).eval() for name, part in parts.items()}


def save_folder(folder: Path, kind: str, parts: dict[str, torch.nn.Module], prediction: str = "epsilon", **schedule) -> Path:
    """The same model as a diffusers folder."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    common = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1, prediction_type=prediction)
    scheduler = {"sd1": lambda: PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **common),
                 "sd2": lambda: DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **common),
                 "sdxl": lambda: EulerDiscreteScheduler(timestep_spacing="leading", **common, **schedule)}[kind]()
    first = CLIPTokenizer.from_pretrained(TOKENIZER, **({"pad_token": "!"} if kind == "sd2" else {}))
    if kind == "sdxl":
        pipeline = StableDiffusionXLPipeline(**parts, tokenizer=first, tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER, pad_token="!"), scheduler=scheduler)
    else:
        pipeline = StableDiffusionPipeline(**parts, tokenizer=first, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return folder


def ldm_state(kind: str, parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The tensors of a single-file checkpoint, with the buffers that such files also hold."""
    state = {}
    for part, module in parts.items():
        prefix, style = KINDS[kind].layouts[part][0]
        tensors = module.state_dict()
        thirds: dict[str, dict[int, torch.Tensor]] = {}
        for name, (source, *_) in sources(style, tensors, dict(module.config) if part in ("unet", "vae") else {}).items():
            tensor = tensors[name].T if source.turned else tensors[name]
            if source.third is not None:
                thirds.setdefault(prefix + source.name, {})[source.third] = tensor
            else:
                square = part == "vae" and ".attn_1." in source.name and tensor.ndim == 2
                state[prefix + source.name] = tensor[:, :, None, None] if square else tensor
        state |= {name: torch.cat([rows[0], rows[1], rows[2]]) for name, rows in thirds.items()}
    state["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def save_single(path: Path, kind: str, parts: dict[str, torch.nn.Module], metadata: dict[str, str] | None = None, **more: torch.Tensor) -> Path:
    """A single-file checkpoint of these parts; `more` tensors are added."""
    save_file(ldm_state(kind, parts) | more, str(path), metadata)
    return path

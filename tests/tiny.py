"""Makes small Stable Diffusion models of the true architecture: same modules and names as SD1.5 / SD2.1, tiny widths, random weights."""

from pathlib import Path

import torch

TOKENIZER = Path(__file__).parents[1] / "hcpdiff" / "assets" / "clip_tokenizer"


def make_unet(version: str = "sd1", cross_dim: int = 32, widths=(32, 32, 64, 64)):
    """UNet with SD's block types: 16 transformers, 192 kohya target modules."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=widths, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=cross_dim, attention_head_dim=2 if version == "sd1" else (1, 1, 2, 2), use_linear_projection=version == "sd2",
    )


def make_vae(widths=(8, 8, 16, 16), scaling_factor: float = 0.18215):
    """AutoencoderKL with SD's factor of 8."""
    from diffusers import AutoencoderKL

    n = len(widths)
    return AutoencoderKL(block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
                         latent_channels=4, norm_num_groups=4, sample_size=64, scaling_factor=scaling_factor)


def make_text_encoder(width: int = 32, layers: int = 3, act: str = "quick_gelu"):
    """CLIP text encoder with the real vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                                        num_attention_heads=2, hidden_act=act, max_position_embeddings=77, projection_dim=width, pad_token_id=1))


def make_sdxl_unet(widths=(32, 32, 64), cross_dim: int = 80, pooled: int = 24, depth=(1, 2, 3)):
    """UNet with SDXL's block types: no attention in the outer blocks, several transformer layers in the inner ones, linear projections, size and text as conditions."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=widths, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=depth, attention_head_dim=(2, 2, 4), cross_attention_dim=cross_dim, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=pooled + 6 * 8)


def make_text_encoder_2(width: int = 48, layers: int = 4, pooled: int = 24):
    """OpenCLIP's text encoder as SDXL has it: plain gelu, a projection of the pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                                                      num_attention_heads=2, hidden_act="gelu", max_position_embeddings=77, projection_dim=pooled, pad_token_id=1))


def make_tiny_sdxl(folder, seed: int = 0, **schedule) -> Path:
    """Saves a StableDiffusionXLPipeline folder; `schedule`: what its scheduler's config has beside or instead of SDXL's own values."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    own = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1, timestep_spacing="leading")
    pipeline = StableDiffusionXLPipeline(
        vae=make_vae(scaling_factor=0.13025), text_encoder=make_text_encoder(), text_encoder_2=make_text_encoder_2(), tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER, pad_token="!"), unet=make_sdxl_unet(), scheduler=EulerDiscreteScheduler(**own | schedule), add_watermarker=False)
    pipeline.save_pretrained(folder)
    return Path(folder)


def make_tiny_sd(folder, version: str = "sd1", seed: int = 0, prediction_type: str | None = None) -> Path:
    """Saves a StableDiffusionPipeline folder; `version` is 'sd1' (epsilon) or 'sd2' (v-prediction, linear projections)."""
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
                    prediction_type=prediction_type or ("epsilon" if version == "sd1" else "v_prediction"))
    scheduler = PNDMScheduler(skip_prk_steps=True, **schedule) if version == "sd1" else DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **schedule)
    pipeline = StableDiffusionPipeline(
        vae=make_vae(), text_encoder=make_text_encoder(act="quick_gelu" if version == "sd1" else "gelu"), tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=make_unet(version), scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return Path(folder)

"""The public configs of the released models, for building them without weights on the meta device."""

import torch

SD15_UNET = dict(
    sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
SD21_UNET = SD15_UNET | dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
SDXL_UNET = dict(
    sample_size=128, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
    attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10], use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, projection_dim=512, hidden_act="gelu")
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, hidden_act="gelu")


def meta_unet(config):
    """A UNet2DConditionModel of this config, without memory for weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def meta_clip(config, projection: bool = False):
    """A CLIP text encoder of this config, without memory for weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        return (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(**config))


def layers_with_weights(model):
    """Path -> module of what has parameters of its own."""
    return {path: module for path, module in model.named_modules() if next(iter(module.parameters(recurse=False)), None) is not None}


def kohya_targets(unet) -> list[str]:
    """What kohya's default network adapts in a UNet: every Linear and 1x1 convolution inside a Transformer2DModel."""
    parents = [path for path, module in unet.named_modules() if type(module).__name__ == "Transformer2DModel"]
    return [path for path, module in unet.named_modules()
            if any(path.startswith(f"{parent}.") for parent in parents) and (type(module).__name__ == "Linear" or _conv1(module))]


def locon_targets(unet) -> list[str]:
    """What LoCon adds: every Linear and convolution inside a ResnetBlock2D, Downsample2D or Upsample2D."""
    parents = [path for path, module in unet.named_modules() if type(module).__name__ in ("ResnetBlock2D", "Downsample2D", "Upsample2D")]
    return [path for path, module in unet.named_modules()
            if any(path.startswith(f"{parent}.") for parent in parents) and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]


def _conv1(module) -> bool:
    return isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1)

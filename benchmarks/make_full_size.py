"""Writes a Stable Diffusion 1.5 of full size with random weights: `python benchmarks/make_full_size.py [FOLDER]` (2.1 GB, fp16).

Speed and memory do not depend on what the weights are, so this stands in for the real model where no hub is reached.
"""

import sys
from pathlib import Path

import torch
from common import FOLDER, ROOT
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENIZER = ROOT / "hcpdiff" / "assets" / "clip_tokenizer"


def make_once(folder: Path) -> Path:
    """The folder, made where it is not there."""
    if not (folder / "model_index.json").is_file():  # written last
        dtype = torch.get_default_dtype()
        try:
            main(folder)
        finally:
            torch.set_default_dtype(dtype)
    return folder


def main(folder: Path) -> None:
    """SD1.5's published configuration, in fp16."""
    torch.set_default_dtype(torch.float16)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        layers_per_block=2, latent_channels=4, sample_size=512, scaling_factor=0.18215)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768))
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1, skip_prk_steps=True)
    StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER), unet=unet, scheduler=scheduler, safety_checker=None,
                            feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)

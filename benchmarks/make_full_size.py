"""Writes a Stable Diffusion 1.5 of full size with random weights: `python benchmarks/make_full_size.py [FOLDER]` (2.1 GB, fp16).

Speed and memory do not depend on what the weights are, so this stands in for the real model where no hub is reached. `--device cuda` draws them on a GPU,
which takes a fraction of the time; `--narrow 10` makes a model of a tenth of the widths, to see in seconds whether all of it works.
"""

import argparse
from pathlib import Path

import torch
from common import FOLDER, ROOT
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENIZER = ROOT / "hcpdiff" / "assets" / "clip_tokenizer"
GROUPS = 32  # of every norm: widths are multiples


def make_once(folder: Path, device: str = "cpu") -> Path:
    """The folder, made where it is not there."""
    if not (folder / "model_index.json").is_file():  # written last
        make(folder, device)
    return folder


def make(folder: Path, device: str = "cpu", narrow: int = 1) -> None:
    """SD1.5's published configuration, in fp16, its widths divided by `narrow`."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            parts = _parts(narrow)
    finally:
        torch.set_default_dtype(dtype)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1, skip_prk_steps=True)
    StableDiffusionPipeline(**parts, tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER), scheduler=scheduler, safety_checker=None, feature_extractor=None,
                            requires_safety_checker=False).save_pretrained(folder)


def _parts(narrow: int) -> dict[str, torch.nn.Module]:
    """UNet, VAE and text encoder."""
    def widths(*full: int) -> tuple[int, ...]:
        return tuple(max(GROUPS, width // narrow // GROUPS * GROUPS) for width in full)

    text = 12 * (64 // narrow)
    unet = UNet2DConditionModel(sample_size=64, block_out_channels=widths(320, 640, 1280, 1280), cross_attention_dim=text, attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=widths(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        layers_per_block=2, latent_channels=4, sample_size=512, scaling_factor=0.18215)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=text, intermediate_size=4 * text, num_hidden_layers=12, num_attention_heads=12, projection_dim=text))
    return {"unet": unet, "vae": vae, "text_encoder": encoder}


def main() -> None:
    """Writes the folder."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    options.add_argument("--device", default="cpu", help="where the weights are drawn: cpu or cuda")
    options.add_argument("--narrow", type=int, default=1, help="the widths are divided by this, up to 64")
    args = options.parse_args()
    make(args.folder, args.device, args.narrow)


if __name__ == "__main__":
    main()

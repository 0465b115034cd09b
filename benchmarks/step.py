"""What a LoRA step costs, as a ratio to the frozen model alone and to other ways of training the same LoRA, in one process and in turn.

    python benchmarks/step.py                               # SD1.5, 512 px, batch 1, fp32 on a CPU
    python benchmarks/step.py --pixels 256 --rounds 7
    python benchmarks/step.py --family sdxl --pixels 1024 --device cuda --dtype bf16 --batch 8

Weights are random: speed and memory do not depend on them. In each round every way takes one step that does not count and then one that
does; a ratio is of two times of one round. Printed are medians and, in brackets, the smallest and the largest.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from hcpdiff.quiet import quiet_libraries

quiet_libraries()

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from transformers import CLIPTextConfig, CLIPTextModel
from ways import WAYS, Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIGS = ROOT / "hcpdiff" / "assets" / "base_models"


def make_unet(family: str, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The published architecture with random weights, frozen."""
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / family / "unet"))
    return unet.to(dtype).requires_grad_(False).train()


def make_batch(args: argparse.Namespace, unet: UNet2DConditionModel) -> Batch:
    """Random latents, timesteps and text of the family's shapes; the encoders only where `example` is asked for."""
    torch.manual_seed(0)
    side, like = args.pixels // 8, {"device": args.device, "dtype": DTYPES[args.dtype]}
    added = None
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.randn(args.batch, 1280, **like), "time_ids": torch.full((args.batch, 6), float(args.pixels), device=args.device)}
    latents = [torch.randn(args.batch, 4, side, side, **like) for _ in range(2)]
    batch = Batch(latents[0], torch.randint(0, 1000, (args.batch,), device=args.device), torch.randn(args.batch, 77, unet.config.cross_attention_dim, **like), latents[1], added)
    if "example" in args.ways:
        batch.encode = make_encoders(args, like)
    return batch


def make_encoders(args: argparse.Namespace, like: dict):
    """VAE and text encoder, frozen, as a function to (latents, text)."""
    config = CONFIGS / args.family
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(config / "vae")).to(**like).requires_grad_(False)
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder")).to(**like).requires_grad_(False)
    pixels, ids = torch.rand(args.batch, 3, args.pixels, args.pixels, **like) * 2 - 1, torch.randint(0, 49000, (args.batch, 77), device=args.device)
    return lambda: (vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor, text(ids).last_hidden_state)


def timed(step, device: str) -> float:
    """Seconds of one step, the device waited for."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds by way and round, and the loss of each way's first step, which must be the same for all: a fresh LoRA changes nothing."""
    unet = make_unet(args.family, args.device, DTYPES[args.dtype])
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
    batch, seconds, first = make_batch(args, unet), {name: [] for name in args.ways}, {}
    for number in range(args.rounds):
        for name in [*args.ways[number % len(args.ways) :], *args.ways[: number % len(args.ways)]]:
            with WAYS[name](unet, batch, args.rank) as step:
                first.setdefault(name, float(step()))
                seconds[name].append(timed(step, args.device))
        print(f"round {number + 1} of {args.rounds}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()), flush=True)
    return seconds, first


def ratio(over: list[float], under: list[float]) -> str:
    """Median and range of what each round gives."""
    ratios = [a / b for a, b in zip(over, under)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["sd1", "sd2", "sdxl"], default="sd1")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["floor", "loop", "hooks", "ours"])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    seconds, first = measure(args)
    if max(abs(loss / first["floor"] - 1) for loss in first.values() if "floor" in first) > (1e-4 if args.dtype == "fp32" else 1e-2):
        sys.exit(f"error: the ways do not do the same work: their first losses are {first}")
    table = Table("way", "seconds a step", "to the floor", "ours to it", title=f"{args.family}, {args.pixels} px, batch {args.batch}, {args.dtype}, rank {args.rank}, {args.device}")
    for name, times in seconds.items():
        table.add_row(name, f"{statistics.median(times):.2f}", ratio(times, seconds["floor"]), ratio(seconds["ours"], times) if name != "ours" else "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

"""What a LoRA step costs, as a ratio to the frozen model alone and to other ways of training the same LoRA, in one process and in turn.

    python benchmarks/step.py                               # SD1.5, 512 px, batch 1, fp32 on a CPU
    python benchmarks/step.py --pixels 256 --rounds 7
    python benchmarks/step.py --family sdxl --pixels 1024 --device cuda --dtype bf16 --batch 8 [--compile]

Weights are random: speed and memory do not depend on them. In each round every way takes one step that does not count and then one that
does; a ratio is of two times of one round. With --compile every way has the UNet's blocks compiled, as model.compile has them.
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from hcpdiff.quiet import quiet_libraries

quiet_libraries()

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from common import Figure, parser, ratios, show, timed
from transformers import CLIPTextConfig, CLIPTextModel
from ways import WAYS, Batch

from hcpdiff.families.base import Models
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.train.compiled import compile_regions, eagerly

EAGER = "ours uncompiled"
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


def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds by way and round, and the loss of each way's first step, which must be the same for all: a fresh LoRA changes nothing."""
    unet = make_unet(args.family, args.device, DTYPES[args.dtype])
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
    batch = make_batch(args, unet)
    if args.compile:
        models = Models(StableDiffusion(), Path(), args.family, {"unet": unet}, {}, {})
        print(compile_regions(models, ["unet"], {(args.batch, args.pixels, args.pixels)}, "sdpa"), flush=True)
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096  # each way and round is new to it
    works, seconds, first = [*args.ways, *([EAGER] if args.compile else [])], {}, {}
    for number in range(args.rounds):
        for name in [*works[number % len(works) :], *works[: number % len(works)]]:
            batch.compiled = args.compile and name != EAGER
            with eagerly(name == EAGER), WAYS[name.split()[0]](unet, batch, args.rank) as step:
                first.setdefault(name, float(step()))
                seconds.setdefault(name, []).append(timed(step, args.device))
        print(f"round {number + 1} of {args.rounds}: " + ", ".join(f"{name} {times[-1]:.3g} s" for name, times in seconds.items()), flush=True)
    return seconds, first


def goal(args: argparse.Namespace) -> float | None:
    """Ours to the floor at most, where there is a goal for such a step (rank 8)."""
    size = {"sd1": 512, "sdxl": 1024}.get(args.family)
    if args.pixels != size or args.rank != 8 or args.checkpointing:
        return None
    if args.device == "cpu":
        return {1: 1.10, 4: 1.08}.get(args.batch) if (args.family, args.dtype, args.compile) == ("sd1", "fp32", False) else None
    if args.compile:
        return {"sd1": 1.12, "sdxl": 1.06}[args.family]
    return 1.12 if args.batch >= 8 else {"sd1": 1.40, "sdxl": 1.30}[args.family]


def figures(args: argparse.Namespace, seconds: dict[str, list[float]]) -> list[Figure]:
    """Ours to each other way; with `--compile` also ours uncompiled to it."""
    label = f"{args.family} {args.pixels} px batch {args.batch} {args.dtype}{' compiled' if args.compile else ''}{' checkpointing' if args.checkpointing else ''}"
    bounds = {"floor": goal(args), "loop": 1.0}
    made = [Figure(f"step, {label}", name, ratios(seconds["ours"], times), bounds.get(name), values={"ours s": statistics.median(seconds["ours"]), f"{name} s": statistics.median(times)})
            for name, times in seconds.items() if name not in ("ours", EAGER) and "ours" in seconds]
    if (args.family, args.pixels, args.batch, args.rank, args.checkpointing) == ("sd1", 512, 1, 8, False) and args.device != "cpu":
        most = 0.05 if args.compile else 0.10
        made.append(Figure(f"step, {label}", f"{most} s", [took / most for took in seconds["ours"]], 1.0))
    if EAGER in seconds and "ours" in seconds:
        made.append(Figure(f"step uncompiled, {label}", "ours", ratios(seconds[EAGER], seconds["ours"]), 1.5 if args.device != "cpu" else None, at_least=True))
    return made


def main() -> None:
    """Measures and prints the table."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--family", choices=["sd1", "sd2", "sdxl"], default="sd1")
    made.add_argument("--pixels", type=int, default=512)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--dtype", choices=DTYPES, default="fp32")
    made.add_argument("--checkpointing", action="store_true")
    made.add_argument("--compile", action="store_true", help="every way with the UNet's blocks compiled, and ours without beside it; the first round takes minutes")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=["floor", "loop", "hooks", "ours"])
    args = made.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    seconds, first = measure(args)
    if max(abs(loss / first["floor"] - 1) for loss in first.values() if "floor" in first) > (1e-4 if args.dtype == "fp32" else 1e-2):
        sys.exit(f"error: the ways do not do the same work: their first losses are {first}")
    show(f"rank {args.rank}: a step of ours to that of another way", figures(args, seconds), args)


if __name__ == "__main__":
    main()

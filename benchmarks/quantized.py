"""What a base in 8 or 4 bits (`model.quantize`) takes of memory, adds to a step and does to the model's prediction, against the dense one.

    python benchmarks/quantized.py                                     # SD1.5's UNet with random weights, 256 px, fp32 on a CPU
    python benchmarks/quantized.py --family sdxl --pixels 1024 --device cuda --dtype bf16 --rounds 7
    python benchmarks/quantized.py --model demo/model                  # a real, small UNet: only here the errors mean something

Memory is what the weights take as they are stored, against bf16, and as measured (allocated on a GPU, anonymous pages on a CPU), against the dense weights
in the same dtype. The LoRA of a step is of rank 8 on attention and feed-forward.
"""

import argparse
from pathlib import Path

from common import Figure, in_turn, parser, ratios, show

from hcpdiff.quiet import quiet_libraries

quiet_libraries()

import torch
from step import DTYPES, make_batch, make_unet
from ways import WAYS

from hcpdiff import device as machine
from hcpdiff.families.clip_unet import ClipUnet
from hcpdiff.families.read_parts import move
from hcpdiff.quantized import Plan, Quantized, stored_bytes
from hcpdiff.quantized.codes import CODES

TIMESTEPS = range(60, 1000, 118)
MOST = {"int8": 0.6, "nf4": 0.6}


def held(device: str) -> float:
    """MiB that the process holds: of the GPU, or in pages that no file backs."""
    machine.release()
    if device != "cpu":
        return torch.cuda.memory_allocated() / 2**20
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) / 2**10


def make(args: argparse.Namespace, code: str | None) -> torch.nn.Module:
    """The UNet, the same weights every time."""
    torch.manual_seed(0)
    if args.model:
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(args.model / "unet").requires_grad_(False).to(DTYPES[args.dtype])
    else:
        unet = make_unet(args.family, "cpu", DTYPES[args.dtype])
    if code:
        move(unet, torch.device("cpu"), Plan(code, ClipUnet.dense).keeper(unet))
    return unet.to(args.device).train()


def measure(args: argparse.Namespace) -> list[Figure]:
    """Bytes, measured memory, time of a step and error of the prediction."""
    models, memory = {}, {}
    for code in (None, *CODES):
        before = held(args.device)
        models[code] = make(args, code)
        memory[code] = held(args.device) - before
    batch = make_batch(args, models[None])
    predictions = {code: predict(unet, batch) for code, unet in models.items()}
    seconds = {code: step_pairs(models, code, batch, args) for code in CODES}
    bf16 = sum(parameter.numel() * 2 for parameter in models[None].parameters())
    figures = []
    for code in CODES:
        kept = stored_bytes(models[code])
        figures += [Figure(f"bytes of the UNet in {code}", "bf16", [kept / bf16], MOST[code], values={"MiB": kept / 2**20, "dense MiB": bf16 / 2**20}),
                    Figure(f"memory of the UNet in {code}", f"dense {args.dtype}, measured", [memory[code] / memory[None]], values={"MiB": memory[code], "dense MiB": memory[None]}),
                    Figure(f"step on {code}", f"step on dense {args.dtype}", ratios(*seconds[code]), values={"s": sorted(seconds[code][0])[len(seconds[code][0]) // 2]}),
                    Figure(f"change of the prediction by {code}", f"dense {args.dtype}", [distance(predictions[code], predictions[None])])]
    if args.model and args.dtype == "fp32":  # what everybody takes for granted
        rounded = predict(models[None].to(torch.bfloat16), batch)
        figures.append(Figure("change of the prediction by bf16", "dense fp32", [distance(rounded, predictions[None])]))
    return figures


@torch.no_grad()
def predict(unet: torch.nn.Module, batch) -> torch.Tensor:
    """The prediction for eight timesteps, fp32."""
    like = {"dtype": unet.dtype}
    return torch.stack([unet(batch.noisy.to(**like), torch.full_like(batch.t, t), batch.hidden.to(**like), added_cond_kwargs=batch.added).sample.float()
                        for t in TIMESTEPS])


def distance(found: torch.Tensor, true: torch.Tensor) -> float:
    """Of all numbers, relative to the size of the true ones."""
    return float((found - true).norm() / true.norm())


def step_pairs(models: dict, code: str, batch, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of steps on the quantized and on the dense UNet, in turn."""
    with WAYS["ours"](models[code], batch, 8) as quantized, WAYS["ours"](models[None], batch, 8) as dense:
        seconds = in_turn({"quantized": quantized, "dense": dense}, args.rounds, args.device)
    assert any(isinstance(parameter, Quantized) for parameter in models[code].parameters())
    return seconds["quantized"], seconds["dense"]


def main() -> None:
    """Measures and prints the table."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--family", choices=["sd1", "sd2", "sdxl"], default="sd1")
    made.add_argument("--model", type=Path, help="a diffusers folder whose UNet is taken instead of one with random weights")
    made.add_argument("--pixels", type=int, default=256)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = made.parse_args()
    args.ways = ["ours"]
    if args.threads:
        torch.set_num_threads(args.threads)
    show(f"{args.model or args.family}, {args.pixels} px, batch {args.batch}, {args.dtype}", measure(args), args)


if __name__ == "__main__":
    main()

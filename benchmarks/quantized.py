"""What a base in 8 or 4 bits (`model.quantize`) takes of memory, adds to a step and does to the model's prediction, against the dense one.

    python benchmarks/quantized.py                                     # SD1.5's UNet with random weights, 256 px, fp32 on a CPU
    python benchmarks/quantized.py --family sdxl --pixels 1024 --device cuda --dtype bf16 --rounds 7 [--compile | --checkpointing]
    python benchmarks/quantized.py --model demo/model                  # a real, small UNet: only here the errors mean something

Memory is what the weights take as they are stored, against bf16, and as measured (allocated on a GPU, anonymous pages on a CPU), against the dense weights
in the same dtype; on a GPU also the peak of a step, weights included. The goal of memory is half precision's. The LoRA of a step is of rank 8 on attention and
feed-forward.
"""

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path

from common import MIB, Figure, in_turn, parser, ratios, show, steps_a_turn

from hcpdiff.quiet import quiet_libraries

quiet_libraries()

import torch
from step import AGAIN, DTYPES, compile_blocks, make_batch, make_unet, repeat
from ways import WAYS, Batch

from hcpdiff import device as machine
from hcpdiff.families.clip_unet import ClipUnet
from hcpdiff.families.read_parts import move
from hcpdiff.quantized import Plan, Quantized, stored_bytes
from hcpdiff.quantized.codes import CODES

TIMESTEPS = range(60, 1000, 118)
MOST = 0.6


def held(device: str) -> float:
    """MiB that the process holds: of the GPU, or in pages that no file backs."""
    machine.release()
    if device != "cpu":
        return torch.cuda.memory_allocated() / MIB
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) / 2**10


def make(args: argparse.Namespace, code: str | None) -> torch.nn.Module:
    """The UNet, the same weights every time, made and quantized where it is trained."""
    torch.manual_seed(0)
    unet = make_unet(args)
    if code:
        move(unet, torch.device(args.device), Plan(code, ClipUnet.dense).keeper(unet))
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def measure(args: argparse.Namespace) -> list[Figure]:
    """Bytes, measured memory, time and peak of a step and error of the prediction."""
    models, memory = {}, {}
    for code in (None, *CODES):
        before = held(args.device)
        models[code] = make(args, code)
        memory[code] = held(args.device) - before
    batch = make_batch(args, models[None])
    predictions = {code: predict(unet, batch) for code, unet in models.items()}
    rounded = predict_rounded(models[None], batch) if args.model and args.dtype == "fp32" else None
    seconds, peaks = steps(models, memory, batch, args)
    figures = []
    for code in CODES:
        figures += [*weights(models, code, memory, args), step(seconds, code, args), *peak(peaks, code, args),
                    Figure(f"change of the prediction by {code}, {kind(args)}", f"dense {args.dtype}", [distance(predictions[code], predictions[None])])]
    if rounded is not None:  # what everybody takes for granted
        figures.append(Figure(f"change of the prediction by bf16, {kind(args)}", "dense fp32", [distance(rounded, predictions[None])]))
    return figures


def weights(models: dict, code: str, memory: dict[str | None, float], args: argparse.Namespace) -> list[Figure]:
    """The UNet's bytes as they are stored and as measured."""
    kept, bf16 = stored_bytes(models[code]), sum(parameter.numel() * 2 for name, parameter in models[None].named_parameters() if ".adapter." not in name)
    return [Figure(f"bytes of the UNet in {code}, {model_name(args)}", "bf16", [kept / bf16], MOST, values={"MiB": kept / MIB, "dense MiB": bf16 / MIB}),
            Figure(f"memory of the UNet in {code}, {model_name(args)}", f"dense {args.dtype}, measured", [memory[code] / memory[None]], None if args.dtype == "fp32" else MOST,
                   values={"MiB": memory[code], "dense MiB": memory[None]})]


def step(seconds: dict[str | None, list[float]], code: str, args: argparse.Namespace) -> Figure:
    """A step's time."""
    values = {"s": statistics.median(seconds[code]), "dense s": statistics.median(seconds[None])}
    return Figure(f"step on {code}, {kind(args)}", f"step on dense {args.dtype}", ratios(seconds[code], seconds[None]), values=values)


def peak(peaks: dict[str | None, float], code: str, args: argparse.Namespace) -> list[Figure]:
    """A step's peak on a GPU."""
    values = {"MiB": peaks[code], "dense MiB": peaks[None]} if peaks else {}
    return [Figure(f"peak of a step on {code}, {kind(args)}", f"step on dense {args.dtype}", [peaks[code] / peaks[None]], values=values)] if peaks else []


def model_name(args: argparse.Namespace) -> str:
    """The family, or the folder's name."""
    return args.model.name if args.model else args.family


def kind(args: argparse.Namespace) -> str:
    """What the steps are of, for a figure's name."""
    return f"{model_name(args)} {args.pixels} px batch {args.batch}{' compiled' if args.compile else ''}{' checkpointing' if args.checkpointing else ''}"


@torch.no_grad()
def predict(unet: torch.nn.Module, batch) -> torch.Tensor:
    """The prediction for eight timesteps, fp32."""
    like = {"dtype": unet.dtype}
    return torch.stack([unet(batch.noisy.to(**like), torch.full_like(batch.t, t), batch.hidden.to(**like), added_cond_kwargs=batch.added).sample.float()
                        for t in TIMESTEPS])


def predict_rounded(unet: torch.nn.Module, batch) -> torch.Tensor:
    """The prediction of an fp32 model computed in bf16; the model is fp32 again afterwards, rounded weights and all but put back."""
    exact = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    try:
        return predict(unet.to(torch.bfloat16), batch)
    finally:
        unet.to(torch.float32).load_state_dict(exact)


def distance(found: torch.Tensor, true: torch.Tensor) -> float:
    """Of all numbers, relative to the size of the true ones."""
    return float((found - true).norm() / true.norm())


def steps(models: dict, memory: dict[str | None, float], batch: Batch, args: argparse.Namespace) -> tuple[dict[str | None, list[float]], dict[str | None, float]]:
    """Seconds of steps on the quantized and on the dense UNet, in turn; on a GPU the MiB at their peak, as if the other models were not there."""
    if args.device != "cpu":
        with WAYS["ours"](models[None], batch, 8) as first:  # libraries take memory at their first products, for both passes, and keep it
            first()
    batch.compiled = args.compile
    with ExitStack() as stack:
        ways, own = {}, {}
        for code, unet in models.items():
            if args.compile:
                compile_blocks(unet, args)
            before = held(args.device)
            ways[code] = stack.enter_context(WAYS["ours"](unet, batch, 8))
            ways[code]()
            own[code] = memory[code] + held(args.device) - before
        seconds = in_turn(ways, args.rounds, args.device, each=steps_a_turn(ways[None], args.device))
        peaks = {code: own[code] + peak_of(way) for code, way in ways.items()} if args.device != "cpu" else {}
    assert all(any(isinstance(parameter, Quantized) for parameter in models[code].parameters()) for code in CODES)
    return seconds, peaks


def peak_of(way) -> float:
    """MiB that a step takes at its highest, above what is there between steps."""
    repeat(way, AGAIN)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def main() -> None:
    """Measures and prints the table."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--family", choices=["sd1", "sd2", "sdxl"], default="sd1")
    made.add_argument("--model", type=Path, help="a diffusers folder whose UNet is taken instead of one with random weights")
    made.add_argument("--pixels", type=int, default=256)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--dtype", choices=DTYPES, default="fp32")
    made.add_argument("--compile", action="store_true", help="with the UNet's blocks compiled")
    made.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    args = made.parse_args()
    args.ways = ["ours"]
    if args.threads:
        torch.set_num_threads(args.threads)
    show(f"{model_name(args)}, {args.pixels} px, batch {args.batch}, {args.dtype}", measure(args), args)


if __name__ == "__main__":
    main()

"""What a LoRA step costs, as a ratio to the frozen model alone and to other ways of training the same LoRA, in one process and in turn.

    python benchmarks/step.py                               # SD1.5, 512 px, batch 1, fp32 on a CPU
    python benchmarks/step.py --pixels 256 --rounds 7
    python benchmarks/step.py --family sdxl --pixels 1024 --device cuda --dtype bf16 --batch 8 [--compile]
    python benchmarks/step.py --model demo/model --pixels 64               # a small model: whether all of it works, in seconds

Weights are random: speed and memory do not depend on them. Every way has a copy of the UNet that shares the weights, and all are there from the beginning;
after steps that do not count, every way takes a turn in each round, and a ratio is of two turns of one round. A turn is a step on a CPU, and on a GPU the mean
of up to ten that are waited for together. With --compile every way has the UNet's blocks compiled, as model.compile has them, and ours without is beside them; with
--checkpointing every way keeps little and does the forward pass twice, and ours that keeps all is beside them. A way that does not fit into a GPU's memory is
told as that. `example` is for families with one text encoder.
"""

import argparse
import copy
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType

from common import MIB, ROOT, Figure, parser, ratios, show, steps_a_turn, timed, turned

from hcpdiff.quiet import quiet_libraries

quiet_libraries()

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from ways import WAYS, Batch, Step

from hcpdiff import device as machine
from hcpdiff.families.base import Models
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.train.compiled import compile_regions

EAGER, KEPT = "ours uncompiled", "ours without checkpointing"
PEFT = ("loop", "loop plain")  # what ours has to be below
WARM, AGAIN = 4, 2  # steps on a GPU that do not count, before the first turn and before each
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIGS = ROOT / "hcpdiff" / "assets" / "base_models"


def make_unet(args: argparse.Namespace) -> UNet2DConditionModel:
    """The published architecture with random weights, made on the device that trains it, or the UNet of `--model`; frozen."""
    if args.model:
        unet = UNet2DConditionModel.from_pretrained(args.model / "unet").to(args.device)
    else:
        with torch.device(args.device):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / args.family / "unet"))
    return unet.to(DTYPES[args.dtype]).requires_grad_(False).train()


def factor_of(folder: Path) -> int:
    """Pixels of a latent cell's side, from a model's config of its VAE."""
    return 2 ** (len(AutoencoderKL.load_config(folder / "vae")["block_out_channels"]) - 1)


def make_batch(args: argparse.Namespace, unet: UNet2DConditionModel) -> Batch:
    """Random latents, timesteps and text of the family's shapes; the encoders only where `example` is asked for."""
    torch.manual_seed(0)
    side, like = args.pixels // factor_of(args.model or CONFIGS / args.family), {"device": args.device, "dtype": DTYPES[args.dtype]}
    added = None
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(args.batch, pooled, **like), "time_ids": torch.full((args.batch, 6), float(args.pixels), device=args.device)}
    latents = [torch.randn(args.batch, 4, side, side, **like) for _ in range(2)]
    batch = Batch(latents[0], torch.randint(0, 1000, (args.batch,), device=args.device), torch.randn(args.batch, 77, unet.config.cross_attention_dim, **like), latents[1], added)
    if "example" in args.ways:
        batch.encode = make_encoders(args, like)
    return batch


def make_encoders(args: argparse.Namespace, like: dict):
    """VAE and text encoder, frozen, as a function to (latents, text)."""
    config = args.model or CONFIGS / args.family
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(config / "vae")).to(**like).requires_grad_(False)
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder")).to(**like).requires_grad_(False)
    pixels, ids = torch.rand(args.batch, 3, args.pixels, args.pixels, **like) * 2 - 1, torch.randint(0, 49000, (args.batch, 77), device=args.device)
    return lambda: (vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor, text(ids).last_hidden_state)


@dataclass
class Way:
    """A way with its copy of the UNet. `own`: bytes that it holds between steps beside the frozen weights; peaks: the most in a turn beside those weights."""

    name: str
    step: Step | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    first: float = 0.0
    own: int = 0
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether there was memory enough so far."""
        return self.step is not None

    def drop(self) -> None:
        """Lets go of everything: it does not fit."""
        self.stack.close()
        self.step, self.seconds, self.peaks = None, [], []


def held(device: str) -> int:
    """Bytes that tensors on the GPU take."""
    return torch.cuda.memory_allocated() if device != "cpu" else 0


def sharing(unet: torch.nn.Module) -> torch.nn.Module:
    """A copy whose weights are the same tensors."""
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())})


def compile_blocks(unet: torch.nn.Module, args: argparse.Namespace) -> None:
    """As model.compile does it, with code of its own: what is compiled of one copy is not looked through for another."""
    models = Models(StableDiffusion(), Path(), args.family, {"unet": unet}, {}, {})
    kinds: dict[type, type] = {}
    for region in models.family.regions(models, "unet"):
        kind = type(region)
        if kind not in kinds:
            old = kind.forward
            forward = FunctionType(old.__code__.replace(), old.__globals__, old.__name__, old.__defaults__, old.__closure__)
            forward.__kwdefaults__ = old.__kwdefaults__
            kinds[kind] = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
        region.__class__ = kinds[kind]
    compile_regions(models, ["unet"], {(args.batch, args.pixels, args.pixels)}, "sdpa")


def first_products(way: Way, unet: torch.nn.Module, batch: Batch, args: argparse.Namespace) -> None:
    """A step that belongs to no way: libraries take memory at their first products, for both passes, and keep it."""
    own = sharing(unet)
    if args.checkpointing:
        own.enable_gradient_checkpointing()
    way.stack.enter_context(WAYS["floor"](own, batch, args.rank))()
    way.stack.close()


def begin(way: Way, unet: torch.nn.Module, batch: Batch, args: argparse.Namespace) -> None:
    """Attaches it and does the steps that do not count. On a CPU that is one, of one sample: nothing has to be compiled or to find its place in memory."""
    started, before, own = time.perf_counter(), held(args.device), sharing(unet)
    if args.checkpointing and way.name != KEPT:
        own.enable_gradient_checkpointing()
    batch.compiled = args.compile and way.name != EAGER
    if batch.compiled:
        compile_blocks(own, args)
    way.step = way.stack.enter_context(WAYS["ours" if way.name in (EAGER, KEPT) else way.name](own, batch, args.rank))
    batch.rows = 1 if args.device == "cpu" and not args.compile else None
    way.first = float(way.step())
    batch.rows = None
    if args.device != "cpu":
        repeat(way.step, WARM - 1)
    way.own = held(args.device) - before
    print(f"{way.name}: ready after {time.perf_counter() - started:.3g} s", flush=True)


def repeat(step: Step, count: int) -> None:
    """Steps, one after the other."""
    for _ in range(count):
        step()


def turn(way: Way, each: int, args: argparse.Namespace) -> None:
    """Notes the seconds of a step, and the peak of memory on a GPU."""
    if args.device == "cpu":
        way.seconds.append(timed(way.step))
        return
    repeat(way.step, AGAIN)
    torch.cuda.reset_peak_memory_stats()
    before = held(args.device)
    way.seconds.append(timed(way.step, args.device, each))
    way.peaks.append(torch.cuda.max_memory_allocated() - before + way.own)


def if_it_fits(way: Way, work, *given) -> None:
    """Does the work; where memory is not enough the way is dropped."""
    try:
        return work(way, *given)
    except torch.OutOfMemoryError:
        print(f"{way.name}: does not fit", flush=True)
    way.drop()  # here the error, which held the step's tensors, is gone
    machine.release()


def measure(args: argparse.Namespace) -> dict[str, Way]:
    """The ways, measured."""
    unet = make_unet(args)
    batch = make_batch(args, unet)
    ways = {name: Way(name) for name in [*args.ways, *([EAGER] if args.compile else []), *([KEPT] if args.checkpointing else [])]}
    if args.device != "cpu":
        if_it_fits(Way("floor"), first_products, unet, batch, args)
    for way in ways.values():
        if_it_fits(way, begin, unet, batch, args)
    same_work(ways, args)
    each = next((steps_a_turn(way.step, args.device) for way in ways.values() if way.fits), 1)
    for number in range(args.rounds):
        for way in (ways[name] for name in turned(ways, number) if ways[name].fits):
            if_it_fits(way, turn, each, args)
        print(f"round {number + 1} of {args.rounds}: " + ", ".join(f"{way.name} {way.seconds[-1]:.3g} s" for way in ways.values() if way.fits), flush=True)
    return ways


def same_work(ways: dict[str, Way], args: argparse.Namespace) -> None:
    """Ends where first losses or the numbers trained differ: a fresh LoRA changes nothing, and all train the same layers."""
    losses = {way.name: way.first for way in ways.values() if way.fits}
    trained = {way.name: way.step.trained for way in ways.values() if way.fits and way.step.trained}
    apart = max(losses.values(), default=0) - min(losses.values(), default=0)
    if apart > (1e-4 if args.dtype == "fp32" else 1e-2) * max(losses.values(), default=0) or len(set(trained.values())) > 1:
        sys.exit(f"error: the ways do not do the same work: first losses {losses}, numbers trained {trained}")


def goal(args: argparse.Namespace) -> float | None:
    """Ours to the floor at most, where there is a goal for such a step (rank 8)."""
    size, large = {"sd1": 512, "sdxl": 1024}.get(args.family), (args.family, args.batch) == ("sdxl", 8)
    if args.model or args.pixels != size or args.rank != 8 or args.checkpointing and not large:  # SDXL's eight samples do not fit without
        return None
    if args.device == "cpu":
        return {1: 1.10, 4: 1.08}.get(args.batch) if (args.family, args.dtype, args.compile) == ("sd1", "fp32", False) else None
    if args.dtype == "fp32" or args.batch not in (1, 8):
        return None
    if args.compile:
        return {"sd1": 1.12, "sdxl": 1.06}[args.family]
    return 1.12 if args.batch == 8 else {"sd1": 1.40, "sdxl": 1.30}[args.family]


def first_target(args: argparse.Namespace) -> bool:
    """Whether it is the step that has goals in seconds: SD1.5 at 512 px, batch 1, half precision, on a GPU."""
    wanted = (args.model, args.family, args.pixels, args.batch, args.rank, args.checkpointing) == (None, "sd1", 512, 1, 8, False)
    return wanted and args.device != "cpu" and args.dtype != "fp32"


def figures(args: argparse.Namespace, ways: dict[str, Way]) -> list[Figure]:
    """Ours to each other way, and what --compile and --checkpointing change of ours. Below peft's: on a GPU in every pair; a CPU's host is too noisy for that,
    so there the median counts."""
    label = f"{args.model or args.family} {args.pixels} px batch {args.batch} {args.dtype}{' compiled' if args.compile else ''}{' checkpointing' if args.checkpointing else ''}"
    ours, gpu, made = ways["ours"], args.device != "cpu", []
    bounds = {"floor": goal(args)} | dict.fromkeys(PEFT, 1.0)
    for way in (way for name, way in ways.items() if name not in ("ours", EAGER, KEPT)):
        made.append(_pairs(f"step, {label}", way.name, ours, way, bounds.get(way.name), gpu and way.name != "floor"))
    if first_target(args):
        most = 0.05 if args.compile else 0.10
        made.append(Figure(f"step, {label}", f"{most} s", [took / most for took in ours.seconds], 1.0, values=_seconds(ours), note=_unfit(ours)))
    if EAGER in ways:
        slow = ways[EAGER]
        made.append(Figure(f"step uncompiled, {label}", "ours", _ratios(slow.seconds, ours.seconds), 1.5 if first_target(args) else None, at_least=True,
                           values=_seconds(slow) | _seconds(ours), note=_unfit(slow, ours)))
    if KEPT in ways:
        made.append(_pairs(f"step, {label}", KEPT, ours, ways[KEPT]))
    return made + ([_peak(label, ours, way) for way in ways.values() if way.name in ("floor", *PEFT, KEPT)] if gpu else [])


def _pairs(what: str, reference: str, one: Way, other: Way, bound: float | None = None, every: bool = False) -> Figure:
    return Figure(what, reference, _ratios(one.seconds, other.seconds), bound, values=_seconds(one) | _seconds(other), every=every and bound is not None, note=_unfit(one, other))


def _peak(label: str, ours: Way, other: Way) -> Figure:
    """Peak memory beside the frozen weights, which are the same for all."""
    values = {f"{way.name} MiB": statistics.median(way.peaks) / MIB for way in (ours, other) if way.peaks}
    return Figure(f"peak memory beside the weights, {label}", other.name, _ratios(ours.peaks, other.peaks), 1.0 if other.name in PEFT else None, values=values, note=_unfit(ours, other))


def _ratios(over: list, under: list) -> list[float]:
    return ratios(over, under) if over and under else []


def _seconds(way: Way) -> dict[str, float]:
    return {f"{way.name} s": statistics.median(way.seconds)} if way.seconds else {}


def _unfit(*ways: Way) -> str:
    names = [way.name for way in ways if not way.fits]
    return f"{', '.join(names)}: does not fit" if names else ""


def main() -> None:
    """Measures and prints the table."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--family", choices=["sd1", "sd2", "sdxl"], default="sd1")
    made.add_argument("--model", type=Path, help="a diffusers folder whose UNet is taken instead of one of the family with random weights")
    made.add_argument("--pixels", type=int, default=512)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--dtype", choices=DTYPES, default="fp32")
    made.add_argument("--checkpointing", action="store_true", help="every way with gradient checkpointing, and ours without beside it")
    made.add_argument("--compile", action="store_true", help="every way with the UNet's blocks compiled, and ours without beside it; it takes minutes before the first round")
    made.add_argument("--ways", nargs="+", choices=[name.replace(" ", "-") for name in WAYS], default=["floor", "loop", "hooks", "ours"])
    args = made.parse_args()
    args.ways = list(dict.fromkeys(name.replace("-", " ") for name in args.ways))
    if "ours" not in args.ways:
        made.error("--ways: ours is what the others are compared with; it has to be among them")
    if "example" in args.ways and args.family == "sdxl":
        made.error("--ways example: it has one text encoder, SDXL has two; leave it out")
    if args.threads:
        torch.set_num_threads(args.threads)
    show(f"rank {args.rank}: a step of ours to that of another way", figures(args, measure(args)), args)


if __name__ == "__main__":
    main()

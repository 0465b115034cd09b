"""What a picture with a LoRA costs in the visualizer, against diffusers' own pipeline: without a LoRA, and with the same file by `load_lora_weights`.

    python benchmarks/drawing.py                                              # SD1.5 of full size with random weights, 256 px, 4 steps, fp32 on a CPU
    python benchmarks/drawing.py --model demo/model --pixels 256              # a small model
    python benchmarks/drawing.py --device cuda --dtype fp16 --pixels 512 --steps 20 --batch 4

Each way draws the same pictures (prompts, seeds, sampler, steps), with prompts that were encoded before, and writes them as PNG files. The largest difference
of ours to diffusers' with the LoRA is a figure in fp32 (TF32 is switched off), and only told in half precision, where the order of the sums decides it.
A LoRA that hardly changes the pictures would make that figure say nothing: then it ends with an error. On a CPU the CPU seconds of all threads stand beside the
seconds, with the median of their ratios: other work on the machine lengthens them less.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import FOLDER, ROOT, Figure, in_turn, parser, ratios, show

from hcpdiff.quiet import quiet_libraries

quiet_libraries()

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from make_full_size import make_once
from ways import targets

from hcpdiff.checkpoint.convert import find_family, to_webui
from hcpdiff.config.infer_schema import InferConfig
from hcpdiff.device import DTYPES
from hcpdiff.lora_tensors import LoraTensors
from hcpdiff.vis import request, run

PROMPT, NEGATIVE, RANK = "a photo of a cat on a mat", "blurry", 8
STRENGTH, CHANGED = 0.5, 3  # of the LoRA, to the weights in norm; by how much of 255 it has to change a picture somewhere
ENCODED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")  # as encode_prompt gives them
PLAIN, PEFT, OURS = "diffusers without LoRA", "diffusers, load_lora_weights", "ours"


def write_lora(unet: torch.nn.Module, path: Path) -> None:
    """A LoRA on attention and feed-forward in webui's form, each layer's half as large as the weight in norm."""
    layers, draws = {}, torch.Generator().manual_seed(0)
    for name, layer in targets(unet).items():
        down, up = torch.randn(RANK, layer.in_features, generator=draws), torch.randn(layer.out_features, RANK, generator=draws)
        size = STRENGTH * layer.weight.detach().float().norm() / (up @ down).norm()
        layers[name] = LoraTensors(down, up * size, float(RANK))
    found = {"unet": layers}
    save_file({key: value.contiguous() for key, value in to_webui(found, find_family(found, {}).family).tensors.items()}, path)


class Theirs:
    """diffusers' pipeline, its prompts encoded ahead and its pictures written as ours are."""

    def __init__(self, pipe: DiffusionPipeline, args: argparse.Namespace, out: Path):
        self.pipe, self.args, self.out = pipe, args, out
        pipe.set_progress_bar_config(disable=True)
        made = pipe.encode_prompt(PROMPT, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=NEGATIVE)
        self.prompts = dict(zip(ENCODED, made))
        out.mkdir()

    def __call__(self) -> None:
        seeds = list(range(self.args.pictures))
        for batch in (seeds[n:n + self.args.batch] for n in range(0, len(seeds), self.args.batch)):
            draws = [torch.Generator().manual_seed(seed) for seed in batch]
            prompts = {name: made.repeat(len(batch), *[1] * (made.dim() - 1)) for name, made in self.prompts.items()}
            images = self.pipe(**prompts, generator=draws, num_inference_steps=self.args.steps, width=self.args.pixels, height=self.args.pixels).images
            for seed, image in zip(batch, images):
                image.save(self.out / f"{seed}.png")


def share(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Lets the weights that are the same in both lie in one place: where memory lies costs or spares a few per cent, by chance."""
    same = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        found = same.get(name.replace(".base_layer.", "."))  # as peft renames what it lays a LoRA on
        if found is not None and found.dtype == parameter.dtype and torch.equal(found, parameter):
            parameter.data = found.data


class Ours:
    """The visualizer, prepared once; its pictures of the last call are `paths`."""

    def __init__(self, folder: Path, lora: Path, args: argparse.Namespace, out: Path):
        sizes = {"width": args.pixels, "height": args.pixels, "num_inference_steps": args.steps}
        cfg = InferConfig(pretrained_model=str(folder), prompt=PROMPT, neg_prompt=NEGATIVE, seed=list(range(args.pictures)), bs=args.batch, infer_args=sizes,
                          lora_path=str(lora), dtype=args.dtype, device=args.device, out_dir=str(out), cpu_threads=args.threads or "auto")
        self.request, self.paths = request.read(cfg), []
        self.studio = run.prepare(self.request, (), lambda line: None)

    def __call__(self) -> None:
        self.paths = run.draw(self.request, self.studio, lambda line: None)


class Clocked:
    """A work, with the CPU seconds of each of its calls."""

    def __init__(self, work: Callable[[], None]):
        self.work, self.seconds = work, []

    def __call__(self) -> None:
        started = time.process_time()
        self.work()
        self.seconds.append(time.process_time() - started)


def medians(seconds: dict[str, list[float]], works: dict[str, Clocked], other: str, args: argparse.Namespace) -> dict[str, float]:
    """What stands beside the ratio of ours to another way, for a picture."""
    def both(unit: str, times: dict[str, list[float]]) -> dict[str, float]:
        return {f"{name} {unit}": statistics.median(times[way]) / args.pictures for name, way in (("ours", OURS), ("theirs", other))}

    if args.device != "cpu":
        return both("s", seconds)
    cpu = {name: work.seconds[-args.rounds :] for name, work in works.items()}
    return both("s", seconds) | both("CPU s", cpu) | {"CPU ratio": statistics.median(ratios(cpu[OURS], cpu[other]))}


def measure(args: argparse.Namespace, place: Path) -> list[Figure]:
    """Ours to each of the others, and how far the pictures are apart."""
    folder, lora = args.model or make_once(FOLDER, args.device), place / "lora.safetensors"
    plain = DiffusionPipeline.from_pretrained(folder, torch_dtype=DTYPES[args.dtype], safety_checker=None, requires_safety_checker=False)
    write_lora(plain.unet, lora)
    peft = type(plain)(**{**plain.components, "unet": copy.deepcopy(plain.unet)}, requires_safety_checker=False)
    peft.load_lora_weights(lora)
    ours = Ours(folder, lora, args, place / "ours")
    works = {PLAIN: Clocked(Theirs(plain.to(args.device), args, place / "plain")), PEFT: Clocked(Theirs(peft.to(args.device), args, place / "peft")), OURS: Clocked(ours)}
    for part in ("unet", "vae"):
        for pipe in (plain, peft):
            share(getattr(pipe, part), getattr(ours.studio.pipe, part))
    if args.threads:
        torch.set_num_threads(args.threads)
    seconds = in_turn(works, args.rounds, args.device)
    theirs, without = ([place / way / f"{n}.png" for n in range(args.pictures)] for way in ("peft", "plain"))
    far, changed = apart(ours.paths, theirs), apart(theirs, without)
    if changed <= CHANGED:
        sys.exit(f"error: the LoRA changes diffusers' own pictures by {changed} of 255 at most, so they do not tell whether ours have it; wanted: more than {CHANGED}")
    what = f"picture with LoRA, {folder.name}, {args.pixels} px, {args.steps} steps, {args.batch} a batch, {args.dtype}"
    return [Figure(what, PLAIN, ratios(seconds[OURS], seconds[PLAIN]), 1.02, values=medians(seconds, works, PLAIN, args)),
            Figure(what, PEFT, ratios(seconds[OURS], seconds[PEFT]), values=medians(seconds, works, PEFT, args)),
            Figure(f"largest difference of a {what}", "1 of 255", [far], 1.0 if args.dtype == "fp32" else None, values={"by the LoRA": changed})]


def apart(some: list[Path], others: list[Path]) -> float:
    """The largest difference of a number of two pictures."""
    return float(max(np.abs(_pixels(one) - _pixels(other)).max() for one, other in zip(some, others, strict=True)))


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def main() -> None:
    """Measures and prints the table."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--model", type=Path, default=None, help="a diffusers folder (default: build/sd15-random, made where it is not there: 2.1 GB)")
    options.add_argument("--pixels", type=int, default=256)
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--pictures", type=int, default=2)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    args = options.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place:
        show("Drawing", measure(args, Path(place)), args)


if __name__ == "__main__":
    main()

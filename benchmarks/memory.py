"""Memory of a training run at its highest, as a sum of named parts, against what the work needs.

    python benchmarks/memory.py                                  # SD1.5 at full size, 256 px, batch 1, fp32 on a CPU
    python benchmarks/memory.py --pixels 512 --checkpointing
    python benchmarks/memory.py --pixels 512 --dtype bf16 --device cuda

A run is a process of its own that trains a rank-8 LoRA on attention and feed-forward of a base model with random weights. Counted are anonymous pages (RssAnon, what a process has of memory for itself, every 5 ms), above what they are when everything is imported.
Beside it stands the sum that the work needs, each part measured or counted in another process that holds the UNet alone:

weights      the UNet's parameters in the dtype that they are trained in
activations  what forward and backward of the frozen model need at their highest, above the weights: it and nothing else
inputs       what adapters keep for the backward pass beside that (the inputs of their layers and their own small products)
adapters     LoRA weights, their gradients, and AdamW's two moments

The figure is the run's peak over that sum. Linux. With a GPU both are what torch has allocated there, and nothing of the host's.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from itertools import zip_longest
from pathlib import Path

from common import FOLDER, MIB, ROOT, Figure, parser, show

BOUND = 1.10
LAYERS = r"re:.*\.attentions\..*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)$"
CONFIG = """
exp_dir: '{place}/run'
mixed_precision: {dtype}
train: {{train_steps: {steps}, cpu_threads: {threads}, log_step: 1, save_step: null, optimizer: {{_target_: torch.optim.AdamW}}}}
model: {{pretrained_model_name_or_path: '{model}', gradient_checkpointing: {checkpointing}}}
lora_unet:
  - {{lr: 1e-4, rank: {rank}, layers: ['{layers}']}}
logger:
  - {{_target_: hcpdiff.loggers.ConsoleLogger}}
data:
  one:
    batch_size: {batch}
    source: {{a: {{img_root: '{place}/images', word_names: {{pt1: cat}}}}}}
    bucket: {{target_area: {area}, num_bucket: 1}}
"""


def anonymous() -> int:
    """Bytes of anonymous pages of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class Watch:
    """The highest number of anonymous bytes by phase, looked at every 5 ms from a thread."""

    def __init__(self, phase=lambda: "all"):
        self.phase, self.highest, self.done = phase, {}, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self.done.wait(0.005):
            self.note()

    def note(self) -> None:
        """Looks now."""
        phase = self.phase()
        self.highest[phase] = max(self.highest.get(phase, 0), anonymous())

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()

    @property
    def peak(self) -> int:
        """Over all phases."""
        return max(self.highest.values())


class GpuWatch:
    """The highest number of bytes that were allocated on a GPU."""

    highest: dict[str, int]

    def __enter__(self):
        import torch

        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error) -> None:
        import torch

        self.peak = torch.cuda.max_memory_allocated()
        self.highest = {"on the GPU": self.peak}


def held(device: str) -> int:
    """Bytes that this process has now: anonymous pages, or what is allocated on a GPU."""
    if device == "cpu":
        return anonymous()
    import torch

    return torch.cuda.memory_allocated()


def watch_of(device: str, phase=lambda: "all") -> Watch | GpuWatch:
    """What looks for the highest number of such bytes."""
    return Watch(phase) if device == "cpu" else GpuWatch()


def import_all(device: str) -> int:
    """Bytes with everything imported that a run and the frozen model need."""
    import diffusers
    import torch
    import transformers

    import hcpdiff.train.run
    from hcpdiff import loggers

    _ = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DDPMScheduler, transformers.CLIPTextModel, transformers.CLIPTokenizer, torch.optim.AdamW
    _ = hcpdiff.train.run.Run, loggers.ConsoleLogger
    return held(device)


def saved_bytes(model, step) -> int:
    """Bytes of the distinct storages that one call keeps for its backward pass; the model's parameters do not count."""
    import torch

    own, seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def note(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            seen[place] = tensor.untyped_storage().nbytes(), tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(size for size, _ in seen.values())


def need(args: argparse.Namespace) -> dict[str, int]:
    """The parts of the sum, in bytes."""
    before = import_all(args.device)
    import torch
    from diffusers import UNet2DConditionModel
    from step import factor_of
    from ways import WAYS, Batch, targets

    from hcpdiff.device import DTYPES

    torch.set_num_threads(args.threads)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(Path(args.model) / "unet")).to(DTYPES[args.dtype])
    unet = unet.to_empty(device=args.device).requires_grad_(False).train()
    for parameter in unet.parameters():
        parameter.fill_(0.01)
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
    side, like, weights = args.pixels // factor_of(args.model), {"dtype": DTYPES[args.dtype], "device": args.device}, held(args.device)
    noisy, target = (torch.randn(args.batch, 4, side, side, **like) for _ in range(2))
    batch = Batch(noisy, torch.full((args.batch,), 500, device=args.device), torch.randn(args.batch, 77, unet.config.cross_attention_dim, **like), target)
    kept = {}
    with WAYS["floor"](unet, batch, args.rank) as step, watch_of(args.device) as watch:
        step()
        step()
    for way in ("floor", "ours"):
        with WAYS[way](unet, batch, args.rank) as step:
            kept[way] = saved_bytes(unet, lambda: batch.loss(unet))
    count = sum(args.rank * sum(layer.weight.shape) for layer in targets(unet).values())
    exact = sum(p.numel() * p.element_size() for p in unet.parameters())
    assert abs(weights - before - exact) < 0.02 * exact + 8 * MIB, (weights, before, exact)
    return {"weights": exact, "activations": watch.peak - weights, "inputs": max(0, kept["ours"] - kept["floor"]), "adapters": 4 * 4 * count}


def train(args: argparse.Namespace) -> dict[str, int]:
    """Peak of each phase of a run above the imports, in bytes."""
    from hcpdiff.quiet import quiet_libraries

    quiet_libraries()
    before = import_all(args.device)
    from hcpdiff.config.load import load
    from hcpdiff.config.schema import RunConfig
    from hcpdiff.train.parallel import Parallel
    from hcpdiff.train.run import Run

    with tempfile.TemporaryDirectory() as place:
        config, images = Path(place) / "cfg.yaml", sorted((ROOT / "demo" / "concept").glob("*.png"))[:4]
        (Path(place) / "images").mkdir()
        for image in images:
            shutil.copy(image, Path(place) / "images")
        config.write_text(CONFIG.format(place=place, layers=LAYERS, area=args.pixels**2, **vars(args) | {"checkpointing": str(args.checkpointing).lower()}), encoding="utf-8")
        run = Run(load(str(config), [], RunConfig), Parallel())
        with contextlib.redirect_stdout(sys.stderr), watch_of(args.device, lambda: run.phase) as watch:
            run.train()
    return {phase: value - before for phase, value in watch.highest.items()}


def child(args: argparse.Namespace, what: str) -> dict[str, int]:
    """The result of one of the functions above in a process of its own."""
    given = [f"--{name}={value}" for name, value in vars(args).items() if name in ("device", "model", "pixels", "batch", "rank", "dtype", "steps", "threads")]
    command = [sys.executable, __file__, f"--child={what}", *given, *(["--checkpointing"] if args.checkpointing else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])


def tell(parts: dict[str, int], phases: dict[str, int]) -> None:
    """The parts of the sum, and how high each phase of the run comes."""
    from rich.console import Console
    from rich.table import Table

    total = sum(parts.values())
    table = Table("needed", "MiB", "", "phase of the run", "highest, MiB", "to the sum")
    rows = [*((name, f"{value / MIB:.0f}") for name, value in parts.items()), ("sum", f"{total / MIB:.0f}")]
    seen = [(phase, f"{value / MIB:.0f}", f"{value / total:.2f}") for phase, value in phases.items()]
    for left, right in zip_longest(rows, seen):
        table.add_row(*(left or ("", "")), "", *(right or ("", "", "")))
    Console(width=120).print(table)


def main() -> None:
    """Measures and prints the tables."""
    options = parser(__doc__, rounds=1)
    options.add_argument("--model", type=Path, default=FOLDER, help="a model in diffusers format; made where it is missing")
    options.add_argument("--pixels", type=int, default=256)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--checkpointing", action="store_true")
    options.add_argument("--child", choices=["need", "train"], help=argparse.SUPPRESS)
    args = options.parse_args()
    args.threads = args.threads or len(os.sched_getaffinity(0))
    if args.child:
        print(json.dumps({"need": need, "train": train}[args.child](args)))
        return
    if not (args.model / "model_index.json").is_file():
        subprocess.run([sys.executable, str(Path(__file__).parent / "make_full_size.py"), str(args.model), f"--device={args.device}"], check=True)
    parts = child(args, "need")
    runs = [child(args, "train") for _ in range(args.rounds)]
    tell(parts, runs[0])
    total = sum(parts.values())
    what = f"peak memory, {args.model.name}, {args.pixels} px, batch {args.batch}, {args.dtype}{', checkpointing' if args.checkpointing else ''}"
    values = {f"{name} MiB": value / MIB for name, value in parts.items()} | {f"peak while {phase} MiB": value / MIB for phase, value in runs[0].items()}
    show("memory of the GPU" if args.device != "cpu" else "memory above the imports", [Figure(what, "sum of what is needed", [max(run.values()) / total for run in runs], BOUND, values=values)], args)


if __name__ == "__main__":
    main()

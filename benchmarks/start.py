"""How long a training run takes until its first step begins, against the imports that it needs and the reading of its weights.

    python benchmarks/start.py                        # SD1.5 of full size, fp32 on a CPU
    python benchmarks/start.py --tiny                 # the demo's small model: here the run's own work is seen best
    python benchmarks/start.py --cold                 # weights that the disk has to give, as after the machine was started

All are processes of their own, in turn, files in the system's cache (with --cold all but the weights). The run has its latents on disk from a run before, so nothing of caching is in it, and its
VAE is known and stays unread; its parts are listed. The floor is what no run can do without: the packages that a run imports, with the collector of cycles at
rest as it is then, and the weights of UNet and text encoder read and cast one by one, without modules that hold them. Beside it stands what people load: the
classes imported, and UNet, VAE, text encoder and tokenizer read with from_pretrained, in the same dtype.
Also measured: how long --help and a mistake in a config take; they have to be below one second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import FOLDER, ROOT, Figure, in_turn, parser, ratios, show

BOUND, ANSWER = 1.3, 1.0


def keys(args: argparse.Namespace, place: str) -> list[str]:
    """The run's command line."""
    return [f"--cfg={ROOT / 'benchmarks' / 'full_size.yaml'}", f"exp_dir={place}/run-{os.getpid()}", f"model.pretrained_model_name_or_path={model_of(args)}", f"mixed_precision={args.dtype}",
            f"data.dataset1.source.data_source1.img_root={ROOT / 'demo' / 'concept'}", f"data.dataset1.source.data_source1.caption_file={ROOT / 'demo' / 'concept'}",
            "data.dataset1.cache_latents=disk", f"data.dataset1.cache_dir={place}/cache", "train.train_steps=1", *([f"train.cpu_threads={args.threads}"] if args.threads else [])]


def run(args: argparse.Namespace, place: str) -> None:
    """The command's own way to the first step; there it ends and writes the seconds of its parts."""
    from hcpdiff import train_ac, train_ac_single

    begun = float(os.environ["BEGUN"])
    times = [("python", time.time() - begun)]

    def note(name: str) -> None:
        times.append((name, time.time() - begun))

    def stop(trainer, step, micro, *more):
        note("run folder and hooks")
        parts = dict(zip([name for name, _ in times], [b - a for a, b in zip([0, *(t for _, t in times)], [t for _, t in times])]))
        print(json.dumps({"seconds": times[-1][1], "cpu": time.process_time(), "parts": parts}), flush=True)
        os._exit(0)

    def imported(*more, real=train_ac.run):
        note("imports")
        from hcpdiff.train.run import Run
        from hcpdiff.train.trainer import Trainer

        for name in ("_read_inputs", "_load_model", "_attach_adapters", "_build_trainer", "_report", "_cache", "_place_models"):
            def timed(self, *more, real=getattr(Run, name), name=name):
                made = real(self, *more)
                note(name.strip("_").replace("_", " "))
                return made

            setattr(Run, name, timed)
        if not args.fill:
            Trainer._step = stop
        return real(*more)

    train_ac.run = imported  # nothing is imported before the command does it
    train_ac_single.main(train_ac_single.parser().parse_args(keys(args, place)))


def floor(args: argparse.Namespace) -> None:
    """What no run can do without: the other packages, and the weights in memory and in their dtype."""
    from hcpdiff.importing import importing
    from hcpdiff.quiet import quiet_libraries

    with importing():
        quiet_libraries()
        import accelerate
        import hydra.utils
        import rich.progress
        import rich.table
        import torch.utils.tensorboard

        from hcpdiff.families.clip_unet import import_kinds

        import_kinds()
    del accelerate, hydra, rich
    from safetensors import safe_open

    from hcpdiff.device import DTYPES

    threads(args)
    kept = []
    for part in ("unet", "text_encoder"):
        (path,) = (model_of(args) / part).glob("*.safetensors")
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                tensor = file.get_tensor(name)  # mapped
                kept.append(torch.empty(tensor.shape, dtype=DTYPES[args.dtype], device=args.device).copy_(tensor))
    _ = kept[-1].view(-1)[0].item()  # a GPU's are there
    print(json.dumps({"seconds": time.time() - float(os.environ["BEGUN"])}), flush=True)
    os._exit(0)  # as the run does


def reference(args: argparse.Namespace) -> None:
    """What people load."""
    from hcpdiff.quiet import quiet_libraries

    quiet_libraries()
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from hcpdiff.device import DTYPES

    threads(args)
    model, dtype = model_of(args), DTYPES[args.dtype]
    parts = [AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32), CLIPTextModel.from_pretrained(model / "text_encoder", dtype=dtype),
             UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=dtype), CLIPTokenizer.from_pretrained(model / "tokenizer"),
             DDPMScheduler.from_pretrained(model / "scheduler")]
    with torch.no_grad():
        read = [p.view(torch.uint8).view(-1)[::4096].sum() for part in parts[:3] for p in part.to(args.device).parameters()]  # read, not only mapped
    _ = [number.item() for number in read[-1:]]  # a GPU's are there
    print(json.dumps({"seconds": time.time() - float(os.environ["BEGUN"])}), flush=True)
    os._exit(0)  # as the run does


def threads(args: argparse.Namespace) -> None:
    """As many of torch as the run has."""
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)


def model_of(args: argparse.Namespace) -> Path:
    """The folder of the base model."""
    return ROOT / "demo" / "model" if args.tiny else args.model


def evict(model: Path) -> None:
    """Takes a model's weights out of the system's cache."""
    for path in model.glob("*/*.safetensors"):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())  # what is not written yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(args: argparse.Namespace, what: str, place: str) -> dict:
    """The JSON that a process of its own prints last; what went wrong ends this."""
    if args.cold:
        evict(model_of(args))
    given = [f"--device={args.device}", f"--dtype={args.dtype}", f"--model={args.model}", *(["--tiny"] if args.tiny else []), *([f"--threads={args.threads}"] if args.threads else [])]
    command = [sys.executable, __file__, *given, f"--child={what}", f"--place={place}"]
    begun = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=os.environ | {"BEGUN": str(begun)})
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed\n{done.stdout}")
    return json.loads(done.stdout.strip().splitlines()[-1]) if what != "fill" else {}


def answer(words: list[str], code: int) -> None:
    """One call of the command that has to answer at once."""
    done = subprocess.run([sys.executable, "-m", "hcpdiff.train_ac_single", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if done.returncode != code:
        sys.exit(f"error: {' '.join(words)} ended with {done.returncode}, not {code}")


def main() -> None:
    """Measures and prints."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--model", type=Path, default=FOLDER, help="a model in diffusers format; made where it is missing")
    options.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    options.add_argument("--tiny", action="store_true", help="the demo's model in the place of one of full size")
    options.add_argument("--cold", action="store_true", help="weights are not in the system's cache (Linux)")
    options.add_argument("--child", choices=["run", "fill", "floor", "reference"], help=argparse.SUPPRESS)
    options.add_argument("--place", help=argparse.SUPPRESS)
    args = options.parse_args()
    args.fill = args.child == "fill"
    if args.child:
        return {"reference": reference, "floor": floor}[args.child](args) if args.child in ("reference", "floor") else run(args, args.place)
    if not args.tiny and not (args.model / "model_index.json").is_file():
        subprocess.run([sys.executable, str(Path(__file__).parent / "make_full_size.py"), str(args.model), f"--device={args.device}"], check=True)
    with tempfile.TemporaryDirectory() as place:
        child(args, "fill", place)
        made: dict[str, list[dict]] = {"run": [], "floor": [], "reference": []}
        in_turn({name: lambda name=name: made[name].append(child(args, name, place)) for name in made}, args.rounds)
        wrong = f"--cfg={ROOT / 'cfgs/train/examples/lora_conventional.yaml'}", "train.nothing=1"
        answers = {} if args.tiny or args.cold else in_turn({"--help": lambda: answer(["--help"], 0), "a mistake": lambda: answer([*wrong], 2)}, args.rounds)  # they read no model
    seconds = {name: [one["seconds"] for one in all_[1:]] for name, all_ in made.items()}  # the first round does not count
    middle = sorted(made["run"][1:], key=lambda one: one["seconds"])[args.rounds // 2]
    values = {f"{name} s": seconds_[len(seconds_) // 2] for name, seconds_ in ((name, sorted(all_)) for name, all_ in seconds.items())} | {f"{name} s": value for name, value in middle["parts"].items()}
    what = f"until the first step, {'the demo model' if args.tiny else 'SD1.5'}, {args.dtype}{', weights on the disk' if args.cold else ''}"
    figures = [Figure(what, "imports and reading", ratios(seconds["run"], seconds["floor"]), BOUND, values=values),
               Figure(what, "imports and from_pretrained", ratios(seconds["run"], seconds["reference"])),
               *(Figure(f"answer to {name}", "one second", [took / ANSWER for took in all_], 1.0) for name, all_ in answers.items())]
    show("the start", figures, args)


if __name__ == "__main__":
    main()

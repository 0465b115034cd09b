"""Options that the LoRA tools share, and what can be said of their values without torch."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from hcpdiff.checkpoint.paths import SUFFIX, StepFiles, beside, locate
from hcpdiff.checkpoint.safetensors_header import read_header
from hcpdiff.cli import place
from hcpdiff.config.schema import OPEN_METADATA
from hcpdiff.errors import CheckpointError, HCPError

FAMILIES = ("sd1", "sd2", "sdxl")
SAVE_DTYPES = ("fp32", "fp16", "bf16")
PICKLES = (".pt", ".pth", ".ckpt", ".bin")

Source = tuple[str, list[Path]]  # what the user named, and the files that it stands for


def add_output(add: Callable, dtypes: str) -> None:
    """--dump_path and what goes with it; `dtypes` says what --save_dtype defaults to."""
    add("--dump_path", metavar="PATH", type=place, help="the file to write")
    add("--save_dtype", choices=SAVE_DTYPES, help=f"store the factors in this type (default: {dtypes})")
    add("--name", help="the name in the metadata (default: that of the file)")
    add("--metadata", metavar="KEY=VALUE", action="append", default=[], help="an entry of the header, such as modelspec.author=me; may be repeated")
    add("--overwrite", action="store_true", help="replace a file that this command did not make itself (its own it replaces)")


def add_family(add: Callable) -> None:
    """--family."""
    add("--family", choices=FAMILIES, help="which Stable Diffusion the LoRA is for, where names and widths leave it open")


def add_limit(add: Callable) -> None:
    """--rank and --energy."""
    add("--rank", type=int, metavar="N", help="the highest rank of a layer")
    add("--energy", type=float, metavar="SHARE", help="keep this share of each layer's energy (sum of squared singular values), 0.99 for example; "
                                                      "with --rank, at most that rank")


def limit_faults(args: argparse.Namespace) -> list[str]:
    """What is wrong with --rank and --energy."""
    faults = [] if args.rank is None or args.rank >= 1 else [f"--rank {args.rank}: a whole number from 1 on is wanted."]
    if args.energy is not None and not 0 < args.energy <= 1:
        faults.append(f"--energy {args.energy}: a share above 0 and up to 1 is wanted, such as 0.99.")
    return faults


def output_faults(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options of `add_output`."""
    if not args.dump_path:
        return ["--dump_path is missing: which file is to be written?"]
    path = Path(args.dump_path)
    faults = [f"--dump_path {path}: only {SUFFIX} files are written, {path.suffix} is a pickle."] if path.suffix in PICKLES else []
    return faults + blocked_faults(path) + header_faults(args) + control_faults([("dump_path", args.dump_path)])


def blocked_faults(path: Path) -> list[str]:
    """Why --dump_path cannot be made."""
    blocked = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    return [f"--dump_path {path} cannot be written: {blocked} is a file, not a folder."] if blocked else []


def header_faults(args: argparse.Namespace) -> list[str]:
    """What is wrong with --metadata and --name."""
    faults = []
    for entry in args.metadata:
        key, equals, _ = entry.partition("=")
        if not equals or not key.startswith(OPEN_METADATA):
            faults.append(f"--metadata {entry!r} is not KEY=VALUE with a key that begins with {', '.join(OPEN_METADATA)}.")
        if key.startswith("modelspec.hash"):
            faults.append(f"--metadata {key}: hashes are computed from the file.")
    if args.name is not None and (not args.name.strip() or set(args.name) & set('/\\:*?"<>|\0\n')):
        faults.append(f"--name {args.name!r} cannot be a file's name.")
    return faults


def control_faults(values: Sequence[tuple[str, str | None]]) -> list[str]:
    """Paths that hold control characters: what a backslash in a shell or a copied line leaves behind."""
    return [f"--{option} {value!r} holds a control character; write / instead of \\." for option, value in values if value and any(ord(c) < 32 for c in value)]


def weight_faults(option: str, weights: Sequence[float], count: int) -> list[str]:
    """What is wrong with weights that are one for all, or one for each of `count` LoRA."""
    faults = [f"--{option} {value}: a finite number is wanted." for value in weights if not math.isfinite(value)]
    if len(weights) not in (0, 1, count):
        faults.append(f"--{option} has {len(weights)} numbers for {count} LoRA: give one for each, or one for all.")
    return faults


def sources(values: Sequence[str], option: str = "--lora_path") -> tuple[list[Source], list[str]]:
    """The files behind each value (a run folder stands for all parts of its newest step), each with a sound header; and what a user should be told."""
    found: list[Source] = []
    lines: list[str] = []
    faults: list[str] = []
    for value in values:
        try:
            place = locate(value)
            files = list(place.parts.values()) if isinstance(place, StepFiles) else [place]
            for path in files:
                read_header(path)
        except HCPError as error:
            faults += [f"{option}: {fault}" for fault in error.faults]
            continue
        if isinstance(place, StepFiles):
            lines.append(said_of(value, place))
        found.append((value, files))
    if faults:
        raise CheckpointError(faults)
    return found, lines + _left_out(found, option)


def said_of(value: str, place: StepFiles) -> str:
    """What a folder stands for."""
    if not place.step:
        return f"{value}: a PEFT folder, {', '.join(f'{stem}/{path.name}' for stem, path in place.parts.items())}"
    return f"{value}: step {place.step}, {', '.join(path.name for path in place.parts.values())}"


def _left_out(found: Sequence[Source], option: str) -> list[str]:
    given = {path.resolve() for _, files in found for path in files}
    lines = [f"warning: {other} lies beside {path.name} and is not given; add it to {option} if it belongs to it."
             for _, files in found for path in files for other in beside(path).values() if other.resolve() not in given]
    return list(dict.fromkeys(lines))

"""Where weight files lie: what to say of one that is not there, the newest of a run folder, the parts of one step. Needs no torch."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

SUFFIX = ".safetensors"
PEFT_WEIGHTS, DIFFUSERS_WEIGHTS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"  # what PEFT and diffusers call their files
STEMS = ("unet", "text_encoder", "text_encoder_2")  # names of our weight files before '-<step>', each also the component inside
_OURS = re.compile(rf"({'|'.join(sorted(STEMS, key=len, reverse=True))})-(.+)\{SUFFIX}")


@dataclass(frozen=True)
class StepFiles:
    """The weight files of one step: component -> path, and the step as the file names spell it ('100'; '' in a folder of another program)."""

    step: str
    parts: dict[str, Path]


def missing(path: Path | str, most: int = 5) -> str:
    """One sentence for a path that is not there: the part of it that exists, and the names there that are nearest."""
    path = Path(path)
    here = next((parent for parent in path.parents if parent.exists()), Path("."))
    if not here.is_dir():
        return f"{path} does not exist: {here} is a file, not a folder."
    wanted = path.parts[len(here.parts)] if here in path.parents else path.name
    names = _names(here)
    near = difflib.get_close_matches(wanted, names, n=most, cutoff=0.5) or [name for name in names if name.endswith(path.suffix or SUFFIX)][:most]
    there = f"Nearest in {_folder(here)}: {', '.join(near)}." if near else f"In {_folder(here)}: {_few(names, most)}."
    return f"{path} does not exist. {there}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except PermissionError:
        return []


def _folder(path: Path) -> str:
    return "the working folder" if path == Path(".") else str(path)


def _few(names: list[str], most: int) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def split_name(path: Path | str) -> tuple[str, str] | None:
    """('unet', '100') of `unet-100.safetensors`; None for names that are not of that form."""
    match = _OURS.fullmatch(Path(path).name)
    return (match[1], match[2]) if match else None


def beside(path: Path | str) -> dict[str, Path]:
    """The other parts of the same step that lie in the same folder, or beside PEFT's folder of one part those of the others: component -> path."""
    path = Path(path)
    known = split_name(path)
    if known:
        others = {stem: path.with_name(f"{stem}-{known[1]}{SUFFIX}") for stem in STEMS if stem != known[0]}
    elif path.name == PEFT_WEIGHTS and path.parent.name in STEMS:
        others = {stem: path.parent.with_name(stem) / PEFT_WEIGHTS for stem in STEMS if stem != path.parent.name}
    else:
        return {}
    return {stem: other for stem, other in others.items() if other.is_file()}


def newest(folder: Path | str) -> StepFiles:
    """The files of the highest step in a run folder (or in its `ckpts`). CheckpointError where there are none."""
    folder = Path(folder)
    places = [place for place in (folder / "ckpts", folder) if place.is_dir()]
    steps: dict[tuple[int, str], dict[str, Path]] = {}
    for place in places:
        for file in sorted(place.iterdir()):
            known = split_name(file)
            if known and known[1].isdigit() and file.is_file():
                steps.setdefault((int(known[1]), known[1]), {})[known[0]] = file
        if steps:
            break
    if not steps:
        raise CheckpointError(f"{folder} holds no weight files: looked for unet-<step>{SUFFIX} in {' and '.join(map(str, places)) or folder}, and for {DIFFUSERS_WEIGHTS} and "
                              f"{PEFT_WEIGHTS}. In it: {_few(_names(folder), 5)}.")
    number = max(steps)
    return StepFiles(number[1], {stem: steps[number][stem] for stem in STEMS if stem in steps[number]})


def of_others(folder: Path) -> Path | StepFiles | None:
    """The LoRA of a folder that diffusers or PEFT wrote, with PEFT's also one adapter in a folder for each part; None where it is no such folder."""
    for name in (DIFFUSERS_WEIGHTS, PEFT_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    parts = {stem: folder / stem / PEFT_WEIGHTS for stem in STEMS if (folder / stem / PEFT_WEIGHTS).is_file()}
    return StepFiles("", parts) if parts else None


def locate(path: Path | str) -> Path | StepFiles:
    """`path` itself where it is a file, the newest step where it is a run folder, the LoRA in a folder of diffusers or PEFT; CheckpointError with near
    names where it is not there."""
    path = Path(path)
    try:
        if path.is_dir():
            return newest(path) if (path / "ckpts").is_dir() else of_others(path) or newest(path)
        there = path.exists()
    except OSError as error:  # a name too long, a folder that may not be read
        raise CheckpointError(f"{str(path)[:200]} cannot be read: {error.strerror or error}.") from error
    if not there:
        raise CheckpointError(missing(path))
    return path

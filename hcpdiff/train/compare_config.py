"""The config of a run that is resumed against that of the run that was saved, and what is said where they are two runs. Needs no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Keys of the config whose change makes another run: what is trained, and on what. Layers and ranks are compared as they are, not by their patterns.
DECISIVE = re.compile(r"""
    seed
    | model\.(tokenizer_repeats | clip_skip | prediction_type | noise_scheduler | quantize) \b.*
    | data\.[^.]+\.(batch_size | bucket\b.*)
    | data\.[^.]+\.source\.[^.]+\.(word_names\b.* | repeats | tag_shuffle | keep_tokens | tag_dropout | caption_dropout | prompt_dropout | flip | bg_color)
""", re.VERBOSE)
UNKNOWN = {"model.quantize": None}  # keys that states of before they came do not have, and what was so then
RANK = re.compile(r"lora_\w+\.\d+\.rank")
NO_MATTER = re.compile(r"exp_dir | train\.resume | train\.resume_force", re.VERBOSE)


@dataclass
class Changes:
    """Lines of the form 'key: before -> now'. impossible: cannot be gone on from; refused: another run, gone on from only if asked; notes: for the log."""

    impossible: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare_images_per_step(saved: Mapping[str, Any], now: Mapping[str, Any], found: Changes) -> None:
    """Processes x accumulation are what one step takes of the plan: their product decides, not who does what."""
    (world, accumulation), (world_now, accumulation_now) = ((run["world"], run["accumulation"]) for run in (saved, now))
    if (world, accumulation) == (world_now, accumulation_now):
        return
    line = f"processes x accumulation: {world} x {accumulation} before, {world_now} x {accumulation_now} now"
    if world * accumulation == world_now * accumulation_now:
        found.notes.append(f"{line}; the images per step are the same")
        return
    fits = world * accumulation % world_now == 0
    hint = f"; train.gradient_accumulation_steps={world * accumulation // world_now} keeps the images per step" if fits else ""
    found.refused.append(line + hint)


def compare_configs(saved: Mapping[str, Any], now: Mapping[str, Any], found: Changes) -> None:
    """Adds what differs between two configs."""
    was, asked = UNKNOWN | flat(saved), UNKNOWN | flat(now)
    for key, line in differing(was, asked):
        if NO_MATTER.fullmatch(key) or key == "train.gradient_accumulation_steps" or _whole_part(key, was, asked):
            continue
        if key == "train.optimizer._target_":
            found.impossible.append(f"{line}; the state of one optimizer is of no use to another")
        else:
            (found.refused if DECISIVE.fullmatch(key) else found.notes).append(line)


def _whole_part(key: str, was: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether the key belongs to a dataset or source that is new or gone as a whole, which the data's own comparison tells."""
    match = re.match(r"data\.[^.]+\.(source\.[^.]+\.)?", key)
    return bool(match) and any(not any(other.startswith(prefix) for other in keys) for keys in (was, asked) for prefix in (match[0], key.split(".")[0] + "." + key.split(".")[1] + "."))


def differing(was: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, 'key: before -> now') of all that differ."""
    def spell(values: Mapping[str, Any], key: str) -> str:
        value = values.get(key)
        return "absent" if key not in values else "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)

    return [(key, f"{key}: {spell(was, key)} before, {spell(asked, key)} now") for key in dict.fromkeys([*was, *asked]) if was.get(key, ...) != asked.get(key, ...)]


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> leaf; lists of mappings are gone through by number, other lists are leaves."""
    if isinstance(tree, list) and tree and all(isinstance(item, Mapping) for item in tree):
        tree = {str(number): item for number, item in enumerate(tree)}
    if isinstance(tree, Mapping):
        return {key: leaf for name, item in tree.items() for key, leaf in flat(item, f"{path}.{name}" if path else str(name)).items()}
    return {path: tree}


def ranks(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Groups of layers as they were that have another rank now: what can be told of them by the configs alone."""
    was, asked = flat(saved), flat(now)
    layers = {key: f"{key.rpartition('.')[0]}.layers" for key in asked if RANK.fullmatch(key)}
    return [line for key, line in differing(was, asked) if key in layers and key in was and was.get(layers[key]) == asked.get(layers[key])]


def refusals(asked: str, folder: Path, impossible: Sequence[str], refused: Sequence[str]) -> list[str]:
    """Faults that say why `train.resume = asked` is not gone on with; none where both lists are empty."""
    faults = []
    if impossible:
        faults.append(_listed("the saved state cannot be gone on from, not even with train.resume_force:", impossible, "Set it back."))
    if refused:
        faults.append(_listed("this would be another run than the one that was saved:", refused, "Set it back, or go on all the same with train.resume_force=true."))
    which = f" (the newest run, {folder})" if asked == "latest" else ""
    resized = any(re.search(r"\brank\b", line) for line in impossible)
    way = f" A new run can start from the weights of this one: model.init_lora={folder}/ckpts/..." if not resized else ""
    return [f"train.resume = {asked!r}{which}: {fault}{way}" for fault in faults]


def _listed(title: str, lines: Sequence[str], way: str) -> str:
    return "\n  ".join([title, *lines]) + f"\n{way}"


def is_done(folder: Path, step: int, total: int) -> str:
    """What is said where no step is left."""
    return f"train.resume: {folder} has done {step} of {total} steps. Raise train.train_epochs or train.train_steps to go on."

"""A run that is resumed against the run that was saved: what differs, and whether that would make it another run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.fingerprint import changes as data_changes

# Keys of the config whose change makes another run: what is trained, and on what. Layers and ranks are compared as they are, not by their patterns.
DECISIVE = re.compile(r"""
    seed
    | model\.(tokenizer_repeats | clip_skip | prediction_type | noise_scheduler | quantize) \b.*
    | data\.[^.]+\.(batch_size | bucket\b.*)
    | data\.[^.]+\.source\.[^.]+\.(word_names\b.* | repeats | tag_shuffle | keep_tokens | tag_dropout | caption_dropout | prompt_dropout | flip | bg_color)
""", re.VERBOSE)
UNKNOWN = {"model.quantize": None}  # keys that states of before they came do not have, and what was so then
LEARNT = {"prediction": "what the base model predicts", "schedule": "the noise schedule (digest)"}
NO_MATTER = re.compile(r"exp_dir | train\.resume | train\.resume_force", re.VERBOSE)


@dataclass
class Changes:
    """Lines of the form 'key: before -> now'. impossible: cannot be gone on from; refused: another run, gone on from only if asked; notes: for the log."""

    impossible: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Both are what `describe` gives: config, marks of the base model's parts, what is learnt, data, world, accumulation, alphas, versions, device."""
    found = Changes()
    for part, mark in now["marks"].items():
        if saved["marks"].get(part) != mark:
            found.refused.append(f"the {part.replace('_', ' ')} has other weights")
    found.refused += [f"{title}: {saved['learns'][name]} before, {now['learns'][name]} now" for name, title in LEARNT.items()
                      if "learns" in saved and saved["learns"][name] != now["learns"][name]]
    found.refused += data_changes(saved["data"], now["data"])
    _images_per_step(saved, now, found)
    other = [path for path, alpha in now["alphas"].items() if saved["alphas"].get(path, alpha) != alpha]
    if other:
        found.refused.append(f"alpha of {len(other)} LoRA layers, such as {other[0]}: {saved['alphas'][other[0]]:g} before, {now['alphas'][other[0]]:g} now")
    _config(UNKNOWN | flat(saved["config"]), UNKNOWN | flat(now["config"]), found)
    rest = {key: value for key, value in saved.items() if key in ("versions", "device")}, {key: value for key, value in now.items() if key in ("versions", "device")}
    found.notes += [line for _, line in _differing(flat(rest[0]), flat(rest[1]))]
    return found


def _images_per_step(saved: Mapping[str, Any], now: Mapping[str, Any], found: Changes) -> None:
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


def _config(was: Mapping[str, Any], asked: Mapping[str, Any], found: Changes) -> None:
    for key, line in _differing(was, asked):
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


def _differing(was: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, str]]:
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

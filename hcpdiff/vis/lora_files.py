"""Which LoRA files a config names: files, run folders, the text encoder's beside the UNet's, `merge`. Nothing here imports torch."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.paths import STEMS, SUFFIX, locate
from ..checkpoint.paths import beside as parts_beside
from ..config.infer_schema import InferConfig, MergeItem
from ..errors import CheckpointError
from .prompt import LoraTag

READABLE = (SUFFIX, ".ckpt", ".pt", ".bin")
STEP = re.compile(r"-(\d+)$")


@dataclass(frozen=True)
class LoraSource:
    """One LoRA to lay beside the model. `key` is the config key that named it.

    `path` is the UNet's file (or one for all), `path_TE` the text encoder's where it is another, `second_TE` that of a second text encoder;
    `text` false: text-encoder layers are not used. `layers` null means all of them.
    """

    key: str
    path: Path | None
    path_TE: Path | None
    text: bool
    strength: float
    strength_TE: float
    layers: tuple[str, ...] | None = None
    second_TE: Path | None = None

    @property
    def text_files(self) -> tuple[Path, ...]:
        """The files of text encoders."""
        return tuple(path for path in (self.path_TE, self.second_TE) if path)

    @property
    def name(self) -> str:
        """Stem of the file, as a prompt tag would name it."""
        return (self.path or self.path_TE).stem


class Finder:
    """Resolves what the config says, keeping every fault and notice."""

    def __init__(self):
        self.faults: list[str] = []
        self.notices: list[str] = []

    def all(self, cfg: InferConfig, tags: Sequence[LoraTag] = ()) -> list[LoraSource]:
        """The sources of lora_path, merge and (webui syntax) the prompt's tags; no file twice."""
        named = self.lists(cfg)
        items, legacy = self.merge_items(cfg.merge)
        merged = [source for key, item in items if (source := self.source(key, item)) is not None]
        tagged = [source for tag in tags if (source := self.tag(tag, cfg.lora_dir)) is not None]
        if legacy:  # there, `path: ${lora_path}` was how lora_path came to be read
            places = {p for s in merged for p in (s.path, *s.text_files) if p}
            named = [s for s in named if not {s.path, *s.text_files} & places]
        return self.once([*named, *merged, *tagged])

    def once(self, sources: list[LoraSource]) -> list[LoraSource]:
        """Faults for a file that two places name."""
        seen: dict[tuple, str] = {}
        for source in sources:
            key = (source.path, source.path_TE, source.layers)
            if key in seen:
                self.faults.append(f"{source.key} and {seen[key]} name the same LoRA, {source.path or source.path_TE}. Name it once; its strength can be doubled.")
            seen.setdefault(key, source.key)
        return sources

    def lists(self, cfg: InferConfig) -> list[LoraSource]:
        """lora_path, lora_path_TE, lora_alpha, lora_alpha_TE: single values or lists that go together."""
        paths = as_list(cfg.lora_path)
        if not paths and cfg.lora_path_TE in (None, "auto"):
            return []
        count = max(1, len(paths))
        paths = paths or [None]
        text = cfg.lora_path_TE
        if count == 1 and isinstance(text, list) and len(text) == 2:  # a file for each of two text encoders
            text = [text]
        columns = {"lora_path_TE": text, "lora_alpha": cfg.lora_alpha, "lora_alpha_TE": cfg.lora_alpha_TE}
        given = {}
        for key, value in columns.items():
            given[key] = value if isinstance(value, list) else [value] * count
            if len(given[key]) != count:
                self.faults.append(f"{key} has {len(given[key])} values for {count} lora_path; give one for all, or one for each.")
                return []
            if key == "lora_path_TE" and count > 1 and isinstance(value, str) and value != "auto":
                self.faults.append(f"lora_path_TE is one file for {count} lora_path; give a list (auto or null where there is none).")
                return []
        found = []
        for n, path in enumerate(paths):
            item = MergeItem(path=path, path_TE=given["lora_path_TE"][n], alpha=given["lora_alpha"][n], alpha_TE=given["lora_alpha_TE"][n])
            source = self.source(f"lora_path[{n}]" if count > 1 else "lora_path", item, flat=True)
            found += [source] if source else []
        return found

    def source(self, key: str, item: MergeItem, flat: bool = False) -> LoraSource | None:
        """One LoRA with its files found, or None after a fault."""
        before = len(self.faults)
        key_TE = key.replace("lora_path", "lora_path_TE") if flat else f"{key}.path_TE"
        path = self.file(key if flat else f"{key}.path", item.path) if item.path is not None else None
        texts = self.text_files(key_TE, item.path_TE, path)
        if item.path is None and not texts and len(self.faults) == before:
            self.faults.append(f"{key} names no file: give path (a LoRA file or a run folder).")
        if len(self.faults) > before:
            return None
        layers = None if item.layers == "all" else tuple(as_list(item.layers))
        strength_TE = item.alpha if item.alpha_TE is None else item.alpha_TE
        return LoraSource(key, path, *padded(texts[:1]), item.path_TE is not None, item.alpha, strength_TE, layers, *padded(texts[1:]))

    def text_files(self, key: str, asked: str | list[str] | None, path: Path | None) -> list[Path]:
        """The text encoders' files that `asked` (path_TE) means for a LoRA whose UNet's file is `path`; at most two."""
        if asked == "auto":
            texts = beside(path) if path else []
            if texts:
                lie, are = ("lie", "are") if len(texts) > 1 else ("lies", "is")
                self.notices.append(f"{key} = auto: {' and '.join(map(str, texts))} {lie} beside and {are} used too (null leaves {'them' if len(texts) > 1 else 'it'} out).")
            return texts
        texts = [found for name in as_list(asked) if (found := self.file(key, name, "text_encoder"))]
        if len(as_list(asked)) > 2:
            self.faults.append(f"{key} names {len(asked)} files; a model has at most two text encoders.")
        elif len(texts) == 1 and Path(asked if isinstance(asked, str) else asked[0]).is_dir():
            texts += beside(texts[0])  # a run folder stands for all of its step
        elif len(texts) == 1:
            self.notices += [f"{key}: {other} lies beside {texts[0].name} and is not used; a list of both uses both." for other in beside(texts[0])]
        return texts

    def file(self, key: str, value: str, stem: str = "unet") -> Path | None:
        """The file that `value` names; of a run folder's newest step, or of a folder that diffusers or PEFT wrote, the one for `stem`."""
        path = Path(value)
        if path.is_file():
            if path.suffix.lower() in READABLE:
                return path
            self.faults.append(f"{key} = {value!r} is no weight file ({', '.join(READABLE)}).")
            return None
        if not path.is_dir():
            self.faults.append(missing(key, value, path))
            return None
        try:
            found = locate(path)
        except CheckpointError as error:
            self.faults += [f"{key} = {value!r}: {fault}" for fault in error.faults]
            return None
        if isinstance(found, Path):
            return found
        part = part_for(stem, found.parts)
        if part is None:
            self.faults.append(f"{key} = {value!r}: its newest checkpoint is {', '.join(file.name for file in found.parts.values())}, without one of a text encoder. "
                               f"Name the file that is meant. {listing(path)}".rstrip())
        elif found.step:
            self.notices.append(f"{key} = {value!r}: its newest checkpoint is {part}.")
        return part

    def tag(self, tag: LoraTag, lora_dir: str | None) -> LoraSource | None:
        """The file of a webui tag, below lora_dir."""
        if lora_dir is None:
            self.faults.append(f"the prompt's <lora:{tag.name}> needs lora_dir, the folder where {tag.name}{SUFFIX} is.")
            return None
        found = [p for p in sorted(Path(lora_dir).rglob(f"*{SUFFIX}")) if p.stem == tag.name]
        if len(found) != 1:
            what = f"is there several times: {', '.join(map(str, found))}" if found else f"is not in lora_dir = {lora_dir!r}. {listing(Path(lora_dir))}"
            self.faults.append(f"the prompt's <lora:{tag.name}>: {tag.name}{SUFFIX} {what}")
            return None
        texts = beside(found[0])
        return LoraSource(f"<lora:{tag.name}>", found[0], *padded(texts[:1]), True, tag.strength, tag.text_strength, None, *padded(texts[1:]))

    def merge_items(self, merge) -> tuple[list[tuple[str, MergeItem]], bool]:
        """`merge` as (key, item) pairs, and whether it was the ancestor's form of groups."""
        if isinstance(merge, dict):
            return [pair for name, group in merge.items() for pair in self.group(f"merge.{name}", group)], True
        return [(f"merge[{n}]", item) for n, item in enumerate(merge or [])], False

    def group(self, key: str, group) -> list[tuple[str, MergeItem]]:
        """One group of the ancestor: {type: unet | TE, base_model_alpha: 1, lora: [{path, alpha, layers}], part: null}."""
        if not isinstance(group, dict):
            if key in ("merge.exp_dir", "merge.alpha") or group is None:  # names that only its interpolations read
                return []
            self.faults.append(f"{key} = {group!r} is no group; merge is a list of {{path, path_TE, alpha, layers}} (or the older group1: {{type, lora}}).")
            return []
        kind = str(group.get("type", "unet"))
        if kind not in ("unet", "TE"):
            self.faults.append(f"{key}.type = {kind!r}; it is unet or TE.")
        for name, value in group.items():
            if name in ("part", "plugin") and value:
                self.faults.append(f"{key}.{name} (whole weights and plugins) is not read; only LoRA files are.")
            elif name == "base_model_alpha" and value != 1:
                self.faults.append(f"{key}.base_model_alpha = {value}: the base model is never scaled; remove it.")
            elif name not in ("type", "lora", "part", "plugin", "base_model_alpha"):
                self.faults.append(f"{key}.{name} is not a key of a group ({nearest(name, ('type', 'lora', 'base_model_alpha', 'part'))}).")
        entries = group.get("lora") or []
        return [pair for n, entry in enumerate(entries) for pair in self.entry(f"{key}.lora[{n}]", entry, kind)]

    def entry(self, key: str, entry, kind: str) -> list[tuple[str, MergeItem]]:
        """One LoRA of a group; `mask` (a LoRA on one half of the guidance) is refused."""
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            self.faults.append(f"{key} = {entry!r} needs a path.")
            return []
        unknown = [name for name in entry if name not in ("path", "alpha", "layers", "mask")]
        self.faults += [f"{key}.{name} is not read ({nearest(name, ('path', 'alpha', 'layers'))})." for name in unknown]
        if entry.get("mask") not in (None, [0, 1], [0.0, 1.0]):
            self.faults.append(f"{key}.mask is not read; remove it.")
        alpha, layers = entry.get("alpha", 1.0), entry.get("layers", "all")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            self.faults.append(f"{key}.alpha = {alpha!r} is not a number.")
            return []
        path = os.path.expanduser(entry["path"])  # of a free map, whose paths the config's check does not know
        files = {"path": path, "path_TE": None} if kind == "unet" else {"path": None, "path_TE": path}
        return [(key, MergeItem(alpha=float(alpha), alpha_TE=None, layers=layers, **files))]


def as_list(value) -> list:
    """A list as it is, null as none, anything else as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def beside(path: Path) -> list[Path]:
    """The text encoders' other files of the same step: `text_encoder-100` and `text_encoder_2-100` beside `unet-100`."""
    return [other for stem, other in parts_beside(path).items() if stem != "unet"]


def padded(paths: list[Path]) -> list[Path | None]:
    """The path of a list of at most one, None where there is none."""
    return [*paths, None][:1]


def part_for(stem: str, parts: Mapping[str, Path]) -> Path | None:
    """Of the files of one step the one for `stem`: of a text encoder's, either's; of the UNet's, another part's where only that was trained."""
    return next((parts[name] for name in (STEMS if stem == "unet" else STEMS[1:]) if name in parts), None)


def step_of(path: Path) -> int:
    """The step at the end of a file's name, -1 without one."""
    match = STEP.search(path.stem)
    return int(match.group(1)) if match else -1


def missing(key: str, value: str, path: Path) -> str:
    """The fault of a path that is not there, with what lies beside it."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    there = f"{path.parent} is not there either; the part that exists is {parent}. " if parent != path.parent else ""
    return f"{key} = {value!r}: there is no such file or folder. {there}{listing(parent)}".rstrip()


def listing(folder: Path, most: int = 12) -> str:
    """The checkpoints in a folder (or below its ckpts/), in the order of their steps, else the runs in it."""
    for place in (folder, folder / "ckpts"):
        files = sorted(place.glob(f"*{SUFFIX}"), key=lambda p: (p.stem[:STEP.search(p.stem).start()] if STEP.search(p.stem) else p.stem, step_of(p)))
        if files:
            return f"Checkpoints in {place}: {some([p.name for p in files], most)}."
    runs = sorted(place.parent.name for place in folder.glob("*/ckpts"))
    return f"Runs in {folder}: {some(runs, most)}." if runs else ""


def some(names: list[str], most: int) -> str:
    """The names, the middle ones left out where there are too many."""
    return ", ".join(names if len(names) <= most else [*names[:most // 2], f"… {len(names) - most} more …", *names[-(most - most // 2):]])


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the nearest known key."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"

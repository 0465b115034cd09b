"""Captions of images, out of text files, JSON, JSON Lines or YAML. Standard library and PyYAML only.

A caption belongs to an image by a key: its path below img_root (with or without the ending), its file name, or its stem. The most exact key wins;
a bare name that fits images in several folders is an error, never a guess.
"""

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import yaml

TEXT_ENDINGS = (".txt", ".caption")
TABLE_ENDINGS = (".json", ".jsonl", ".yaml", ".yml")
NAME_KEYS = ("file_name", "image", "img", "name", "file", "path", "id")
CAPTION_KEYS = ("text", "caption", "prompt", "tags")


@dataclass
class Captions:
    """`texts[i]` is the caption of image i, '' if it is empty, None if there is none. `notices` are for the start report."""

    texts: list[str | None]
    form: str
    notices: list[str] = field(default_factory=list)

    @property
    def found(self) -> int:
        """How many images have a caption (an empty one counts)."""
        return sum(text is not None for text in self.texts)


def load_captions(caption_file: str | None, img_root: str, keys: Sequence[str], where: str, faults: list[str]) -> Captions:
    """Captions of the images `keys` (POSIX paths below img_root). Faults, each naming file, line and remedy, are appended to `faults`."""
    if caption_file is None:
        return Captions([None] * len(keys), "none")
    path = Path(caption_file)
    if path.is_dir():
        captions = _from_folder(path, img_root, keys, where, faults)
    elif path.is_file():
        captions = _from_file(path, img_root, keys, where, faults)
    else:
        faults.append(f"{where}.caption_file = {caption_file!r} is neither a file nor a folder (working directory: {os.getcwd()})")
        return Captions([None] * len(keys), "none")
    return captions


def check_caption_file(caption_file: str | None, where: str) -> list[str]:
    """Faults of caption_file that show without looking at images: missing, not UTF-8, JSON or YAML mistakes. For the check before anything starts."""
    faults: list[str] = []
    if caption_file is None:
        return faults
    path = Path(caption_file)
    if path.is_file():
        _from_file(path, "", [], where, faults)
    elif not path.is_dir():
        faults.append(f"{where}.caption_file = {caption_file!r} is neither a file nor a folder (working directory: {os.getcwd()})")
    return faults


def _from_file(path: Path, img_root: str, keys: Sequence[str], where: str, faults: list[str]) -> Captions:
    ending = path.suffix.lower()
    if ending in TEXT_ENDINGS:
        text = read_caption(path, faults)
        return Captions([text] * len(keys), f"{path.name} for all")
    if ending not in TABLE_ENDINGS:
        faults.append(f"{where}.caption_file = {str(path)!r}: captions are read from {', '.join((*TEXT_ENDINGS, *TABLE_ENDINGS))} files or a folder")
        return Captions([None] * len(keys), "none")
    table = read_table(path, faults)
    captions = match(table, img_root, keys, str(path), faults)
    captions.form = path.name
    return captions


# ---- text files ----------------------------------------------------------------------------------------------------------------------------------

def _from_folder(folder: Path, img_root: str, keys: Sequence[str], where: str, faults: list[str]) -> Captions:
    texts = {}
    for name in list_below(folder, f"{where}.caption_file", faults):
        stem, ending = os.path.splitext(name)
        if ending.lower() in TEXT_ENDINGS and (stem not in texts or ending.lower() == ".txt"):
            texts[stem] = name
    matched = match(texts, "", keys, str(folder), faults, ambiguous_faults=False)
    tables = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name.lower().endswith(TABLE_ENDINGS) and not entry.name.startswith("."))
    if not matched.found and tables:
        if len(tables) > 1:
            faults.append(f"{where}.caption_file = {str(folder)!r} holds {len(tables)} caption files: {', '.join(tables)}. Name the one to use.")
            return Captions([None] * len(keys), "none")
        return _from_file(folder / tables[0], img_root, keys, where, faults)
    captions = match(texts, "", keys, str(folder), faults)
    captions.form = "text files"
    read: dict[str, str | None] = {}
    for number, name in enumerate(captions.texts):
        if name is not None:
            if name not in read:
                read[name] = read_caption(folder / name, faults)
            captions.texts[number] = read[name]
    if tables:
        captions.notices.append(f"{', '.join(tables)} beside the text files is not used")
    return captions


def list_below(folder: str | Path, where: str, faults: list[str]) -> list[str]:
    """POSIX paths of the files in a folder and below it, sorted; hidden ones left out, folders that are linked in a circle entered once."""
    found, seen, stack = [], set(), [""]
    while stack:
        below = stack.pop()
        here = os.path.join(folder, below)
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(here))
        except OSError as error:
            faults.append(f"{where}: the folder {here!r} cannot be listed: {error.strerror or error}")
            continue
        for entry in entries:
            if not entry.name.startswith(".") and entry.name != "__MACOSX":
                name = f"{below}/{entry.name}" if below else entry.name
                kind = _kind_of(entry)
                if kind:
                    (stack if kind == "folder" else found).append(name)
    return sorted(found)


def _kind_of(entry: os.DirEntry) -> str | None:
    """folder, file, or None for pipes and the like. A link to nothing is a file that is wanted and missing; entry.is_dir() would raise for a circle."""
    if not entry.is_symlink():
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    if os.path.isdir(entry.path):
        return "folder"
    return "file" if os.path.isfile(entry.path) or not os.path.exists(entry.path) else None


def read_text(path: Path, faults: list[str]) -> str | None:
    """The file as UTF-8 text, with or without BOM; a fault that says where it is not, otherwise."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        faults.append(f"{path}: cannot be read: {error.strerror or error}")
        return None
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        faults.append(f"{path}: is UTF-16; save it as UTF-8")
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        faults.append(f"{path}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8")
        return None


def read_caption(path: Path, faults: list[str]) -> str | None:
    """A caption file's text on one line."""
    text = read_text(path, faults)
    return None if text is None else one_line(text)


def one_line(text: str) -> str:
    """Lines joined by a space, edges trimmed."""
    return " ".join(part for part in (line.strip() for line in text.split("\n")) if part)


# ---- JSON, JSON Lines, YAML -----------------------------------------------------------------------------------------------------------------------

def read_table(path: Path, faults: list[str]) -> dict[str, str]:
    """key -> caption of a json, jsonl or yaml file."""
    text = read_text(path, faults)
    if text is None:
        return {}
    table = _Table(path, faults)
    ending = path.suffix.lower()
    if ending == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                _add_json(table, line, number, number)
    elif ending == ".json":
        _add_json(table, text, 1, None)
    else:
        _add_yaml(table, text)
    return table.captions


class _Table:
    """Collects key -> caption out of one file; every fault names the file and, where known, the line."""

    def __init__(self, path: Path, faults: list[str]):
        self.path, self.faults, self.captions = path, faults, {}

    def fault(self, line: int | None, text: str) -> None:
        self.faults.append(f"{self.path}: {f'line {line}: ' if line else ''}{text}")

    def add(self, key: str, value: str | None, line: int | None) -> None:
        if key in self.captions:
            self.fault(line, f"key {key!r} stands there twice")
        elif value is not None:
            self.captions[key] = one_line(value)

    def add_entry(self, key: str, value: object, line: int | None) -> None:
        if isinstance(value, dict):
            value = next((value[name] for name in CAPTION_KEYS if name in value), value)
        if value is None or isinstance(value, str):
            self.add(key, value, line)
        else:
            self.fault(line, f"the caption of {key!r} must be text (or a map with one of {', '.join(CAPTION_KEYS)}), not {_kind(value)}")

    def add_record(self, value: object, line: int | None) -> None:
        """{"file_name": ..., "text": ...}, or a map of keys to captions."""
        if not isinstance(value, dict):
            self.fault(line, f'expected {{"image": "caption"}} or {{"file_name": ..., "text": ...}}, not {_kind(value)}')
            return
        name = next((value[key] for key in NAME_KEYS if isinstance(value.get(key), str)), None)
        caption = next((value[key] for key in CAPTION_KEYS if isinstance(value.get(key), str)), None)
        if name is not None and caption is not None:
            self.add(name, caption, line)
        else:
            for key, entry in value.items():
                self.add_entry(key, entry, line)


def _kind(value: object) -> str:
    names = {list: "a list", dict: "a map", bool: "true or false", str: "text", type(None): "null"}
    return names.get(type(value), "a number")


class _Pairs(list):
    """A JSON object's pairs before they become a dict, so that a key that stands there twice is seen."""


def _add_json(table: _Table, text: str, line: int, record_line: int | None) -> None:
    twice: list[str] = []

    def pairs(found: list[tuple[str, object]]) -> dict[str, object]:
        twice.extend(key for key, count in Counter(key for key, _ in found).items() if count > 1)
        return dict(found)

    try:  # numbers keep their spelling: a caption 007 or 1.50 in a file is text to us
        value = json.loads(text, object_pairs_hook=pairs, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        table.faults.append(f"{table.path}: line {line + error.lineno - 1} column {error.colno}: {_json_hint(text, error)}")
        return
    except RecursionError:
        table.fault(line, "is nested too deeply to be a list of captions")
        return
    for key in twice:
        table.fault(record_line, f"key {key!r} stands there twice")
    if isinstance(value, list):
        for number, entry in enumerate(value, 1):
            table.add_record(entry, None if record_line is None else record_line)
    elif record_line is not None:
        table.add_record(value, record_line)
    elif isinstance(value, dict):
        for key, entry in value.items():
            table.add_entry(key, entry, None)
    else:
        table.fault(None, f'expected {{"image": "caption", ...}}, not {_kind(value)}')


def _json_hint(text: str, error: json.JSONDecodeError) -> str:
    before = text[:error.pos].rstrip()
    at = text[error.pos:error.pos + 1]
    if not at:
        return "the file ends too early; a closing bracket or quote is missing"
    if before.endswith(",") and at in "}]":
        return f"a comma too many before '{at}'"
    if at == "'":
        return "JSON wants double quotes"
    if error.msg.startswith("Expecting ',' delimiter"):
        return f"a comma (or a closing bracket) is missing before {text[error.pos:error.pos + 20]!r}"
    if error.msg.startswith("Extra data"):
        return "more text after the end; one JSON object per line is a .jsonl file"
    return error.msg


def _add_yaml(table: _Table, text: str) -> None:
    """YAML by its nodes, so that every scalar stays the text that was written (01, no, 12:30) and each fault has its line."""
    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1} column {mark.column + 1}: " if mark else ""
        table.faults.append(f"{table.path}: {place}{getattr(error, 'problem', None) or str(error).splitlines()[0]}")
        return
    except RecursionError:
        table.fault(None, "is nested too deeply to be a list of captions")
        return
    if root is None:
        return
    nodes = root.value if isinstance(root, yaml.SequenceNode) else [root]
    for node in nodes:
        if not isinstance(node, yaml.MappingNode):
            table.fault(node.start_mark.line + 1, "expected 'image: caption' lines")
        elif isinstance(root, yaml.SequenceNode):
            table.add_record({_scalar(key): _plain(value) for key, value in node.value}, node.start_mark.line + 1)
        else:
            for key, value in node.value:
                table.add_entry(_scalar(key), _plain(value), key.start_mark.line + 1)


def _scalar(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else "?"


def _plain(node: yaml.Node) -> object:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.MappingNode):
        return {_scalar(key): _scalar(value) for key, value in node.value}
    return []


# ---- keys and images ------------------------------------------------------------------------------------------------------------------------------

def _normal(key: str) -> str:
    """One spelling per path: composed Unicode (macOS decomposes file names), forward slashes, no leading './'."""
    key = unicodedata.normalize("NFC", key.replace("\\", "/"))
    while key.startswith("./"):
        key = key[2:]
    return key


def match(table: dict[str, str], img_root: str, keys: Sequence[str], origin: str, faults: list[str], ambiguous_faults: bool = True) -> Captions:
    """Give each image the caption whose key names it most exactly: path, path without ending, file name, stem."""
    root = _normal(str(img_root)).rstrip("/") + "/"
    entries = {}
    for key, text in table.items():
        normal = _normal(key)
        entries[normal[len(root):] if img_root and normal.startswith(root) else normal] = (key, text)

    names = [_normal(key) for key in keys]
    texts: list[str | None] = [None] * len(keys)
    used: set[str] = set()
    for spell in (lambda name: name, lambda name: os.path.splitext(name)[0]):  # paths below img_root: one place only
        for number, name in enumerate(names):
            if texts[number] is None and spell(name) in entries:
                used.add(spell(name))
                texts[number] = entries[spell(name)][1]
    for spell in (lambda name: PurePosixPath(name).name, lambda name: PurePosixPath(name).stem):  # bare names: wherever the image lies
        fitting: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            if texts[number] is None and spell(name) in entries and spell(name) not in used:
                fitting.setdefault(spell(name), []).append(number)
        for key, numbers in fitting.items():
            folders = {os.path.dirname(names[number]) for number in numbers}
            if len(folders) > 1 and ambiguous_faults:
                faults.append(f"{origin}: key {entries[key][0]!r} fits {len(numbers)} images: {_some([keys[n] for n in numbers])}. Write their paths below img_root as keys.")
            for number in numbers:
                texts[number] = entries[key][1]
            used.add(key)
    _by_tail(entries, used, names, texts)
    return Captions(texts, "", _match_notices(entries, used, names, texts))


def _by_tail(entries: dict, used: set[str], names: list[str], texts: list[str | None]) -> None:
    """Keys that lie deeper than the images (captions/part1/7.txt for 7.png): by file name or stem, where exactly one key has it."""
    left = [key for key in entries if key not in used and "/" in key]
    tails = Counter(PurePosixPath(key).name for key in left)
    by_tail = {PurePosixPath(key).name: key for key in left if tails[PurePosixPath(key).name] == 1}
    if not by_tail:
        return
    for spell in (lambda name: PurePosixPath(name).name, lambda name: PurePosixPath(name).stem):
        counts = Counter(spell(name) for number, name in enumerate(names))
        for number, name in enumerate(names):
            tail = spell(name)
            if texts[number] is None and tail in by_tail and counts[tail] == 1 and by_tail[tail] not in used:
                used.add(by_tail[tail])
                texts[number] = entries[by_tail[tail]][1]


def _some(items: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(items[:most])
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown


def _loose(name: str) -> str:
    """A spelling that forgives letter case, ending, leading zeros, blanks and dashes; for pointing at near misses only."""
    stem, ending = os.path.splitext(PurePosixPath(name).name)
    base = stem if len(ending) <= 5 else stem + ending
    return base.casefold().replace(" ", "").replace("_", "").replace("-", "").lstrip("0") or "0"


def _match_notices(entries: dict, used: set[str], names: list[str], texts: list[str | None]) -> list[str]:
    unused = [key for key in entries if key not in used]
    missing = [number for number, text in enumerate(texts) if text is None]
    if not unused or not names:
        return []
    loose = {_loose(key): key for key in unused}
    near = [f"{names[n]!r} ~ {entries[loose[_loose(names[n])]][0]!r}" for n in missing if _loose(names[n]) in loose]
    notices = [f"{len(unused)} captions belong to no image: {_some([repr(entries[key][0]) for key in unused])}"]
    if near:
        notices.append(f"{len(near)} of them nearly match: {_some(near)}")
    return notices

"""Captions of images, out of text files, JSON, JSON Lines or YAML. No torch here.

A caption belongs to an image by a key: its path below img_root (with or without the ending), its file name, or its stem. The most exact key wins;
a bare name that fits images in several folders is an error, never a guess.
"""

import difflib
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .caption_table import read_table
from .files import list_below, read_caption

TEXT_ENDINGS = (".txt", ".caption")
TABLE_ENDINGS = (".json", ".jsonl", ".yaml", ".yml")
_COMPARED, _CLOSE = 10_000, 0.75  # pairs of names that are looked at for misspelt ones; how alike they have to be (1: equal)


@dataclass
class Captions:
    """`texts[i]` is the caption of image i, '' if it is empty, None if there is none. `notices` are for the start report; `fit` is how many keys name an image,
    skipped ones too."""

    texts: list[str | None]
    form: str
    notices: list[str] = field(default_factory=list)
    fit: int = 0

    @property
    def found(self) -> int:
        """How many images have a caption (an empty one counts)."""
        return sum(text is not None for text in self.texts)


def load_captions(caption_file: str | None, img_root: str, keys: Sequence[str], where: str, faults: list[str], skipped: Sequence[str] = ()) -> Captions:
    """Captions of the images `keys` (POSIX paths below img_root). Faults, each naming file, line and remedy, are appended to `faults`.

    skipped: images that are not used; they get no caption, but one of theirs is not told as belonging to no image.
    """
    if caption_file is None:
        return Captions([None] * len(keys), "none")
    path = Path(caption_file)
    if path.is_dir():
        captions = _from_folder(path, img_root, keys, where, faults, skipped)
    elif path.is_file():
        captions = _from_file(path, img_root, keys, where, faults, skipped)
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


def _from_file(path: Path, img_root: str, keys: Sequence[str], where: str, faults: list[str], skipped: Sequence[str] = ()) -> Captions:
    ending = path.suffix.lower()
    if ending in TEXT_ENDINGS:
        text = read_caption(path, faults)
        return Captions([text] * len(keys), f"{path.name} for all")
    if ending not in TABLE_ENDINGS:
        faults.append(f"{where}.caption_file = {str(path)!r}: captions are read from {', '.join((*TEXT_ENDINGS, *TABLE_ENDINGS))} files or a folder")
        return Captions([None] * len(keys), "none")
    table = read_table(path, faults)
    captions = match(table, img_root, keys, str(path), faults, skipped=skipped)
    captions.form = path.name
    return captions


def _from_folder(folder: Path, img_root: str, keys: Sequence[str], where: str, faults: list[str], skipped: Sequence[str]) -> Captions:
    texts = {}
    for name in list_below(folder, f"{where}.caption_file", faults):
        stem, ending = os.path.splitext(name)
        if ending.lower() in TEXT_ENDINGS and (stem not in texts or ending.lower() == ".txt"):
            texts[stem] = name
    matched = match(texts, "", keys, str(folder), faults, ambiguous_faults=False)
    tables = sorted(entry.name for entry in os.scandir(folder) if os.path.isfile(entry.path) and entry.name.lower().endswith(TABLE_ENDINGS) and not entry.name.startswith("."))
    if not matched.found and tables:
        if len(tables) > 1:
            faults.append(f"{where}.caption_file = {str(folder)!r} holds {len(tables)} caption files: {', '.join(tables)}. Name the one to use.")
            return Captions([None] * len(keys), "none")
        return _from_file(folder / tables[0], img_root, keys, where, faults, skipped)
    captions = match(texts, "", keys, str(folder), faults, skipped=skipped)
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


def _normal(key: str) -> str:
    """One spelling per path: composed Unicode (macOS decomposes file names), forward slashes, no leading './'."""
    key = unicodedata.normalize("NFC", key.replace("\\", "/"))
    while key.startswith("./"):
        key = key[2:]
    return key


def match(table: dict[str, str], img_root: str, keys: Sequence[str], origin: str, faults: list[str], ambiguous_faults: bool = True,
          skipped: Sequence[str] = ()) -> Captions:
    """Give each image the caption whose key names it most exactly: path, path without ending, file name, stem."""
    root = _normal(str(img_root)).rstrip("/") + "/"
    entries = {}
    for key, text in table.items():
        normal = _normal(key)
        entries[normal[len(root):] if img_root and normal.startswith(root) else normal] = (key, text)

    names, gone = [_normal(key) for key in keys], [_normal(key) for key in skipped]
    texts: list[str | None] = [None] * len(keys)
    used = {spelling for name in gone for spelling in (name, os.path.splitext(name)[0]) if spelling in entries}  # theirs alone, though nobody sees it
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
    used |= {spelling for path in map(PurePosixPath, gone) for spelling in (path.name, path.stem) if spelling in entries}
    _by_tail(entries, used, gone, [None] * len(gone))
    return Captions(texts, "", _match_notices(entries, used, names, texts), len(used))


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


def _digits(name: str) -> str:
    return "".join(filter(str.isdigit, name))


def _match_notices(entries: dict, used: set[str], names: list[str], texts: list[str | None]) -> list[str]:
    unused = [key for key in entries if key not in used]
    missing = [number for number, text in enumerate(texts) if text is None]
    if not unused or not names:
        return []
    loose = {_loose(key): key for key in unused}
    found = {names[n]: loose[_loose(names[n])] for n in missing if _loose(names[n]) in loose}
    if len(missing) * len(unused) <= _COMPARED:
        for name in (names[n] for n in missing if names[n] not in found):
            taken = set(found.values())
            alike = [other for other, key in loose.items() if key not in taken and _digits(other) == _digits(_loose(name))]  # 0001 is not a misspelt 0002
            found |= {name: loose[close] for close in difflib.get_close_matches(_loose(name), alike, 1, _CLOSE)}
    near = [f"{name!r} ~ {entries[key][0]!r}" for name, key in found.items()]
    notices = [f"{len(unused)} captions belong to no image: {_some([repr(entries[key][0]) for key in unused])}"]
    if near:
        notices.append(f"{len(near)} of them nearly match: {_some(near)}")
    return notices

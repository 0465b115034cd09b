"""The image folders of a dataset: which images there are, how large, with which captions, masks and templates. No torch.

Settings come as objects with the attributes of SourceConfig (config/schema.py); nothing here reads a config file.
Every function appends what is wrong to a list of faults, so that one message can name them all.
"""

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..threads import mapped
from . import image as pixels
from .caption import Captions, check_caption_file, load_captions
from .files import list_below, shown
from .template import Prompter, load_templates, word_notices

_SHOWN = 500  # damaged or missing files named in one message; more are counted
_LOOKALIKES = frozenset({".tif", ".tiff", ".jfif", ".heic", ".heif", ".jxl", ".psd", ".tga", ".ico", ".svg", ".raw", ".dng"})


@dataclass(frozen=True)
class Source:
    """One image folder, read. Lists run along `keys`, the images' POSIX paths below `root`, sorted."""

    name: str
    root: str
    keys: list[str]
    sizes: np.ndarray  # (n, 2) int32: width, height, upright
    captions: Captions
    prompter: Prompter
    masks: list[str] | None
    repeats: int
    flip: bool
    bg_color: tuple[int, int, int]
    skipped: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def path(self, number: int) -> str:
        """File of an image."""
        return os.path.join(self.root, self.keys[number])


def check_sources(data: Mapping[str, Any]) -> list[str]:
    """Faults of all datasets' sources that show quickly: folders and files missing, captions and templates that do not parse."""
    faults: list[str] = []
    for dataset, config in data.items():
        for name, source in config.source.items():
            where = f"data.{dataset}.source.{name}"
            _check_folder(source.img_root, f"{where}.img_root", faults)
            if source.att_mask is not None:
                _check_folder(source.att_mask, f"{where}.att_mask", faults)
            faults += check_caption_file(source.caption_file, where)
            if source.prompt_template is not None:
                load_templates(source.prompt_template, True, source.word_names, where, faults)
    return faults


def _check_folder(path: str, where: str, faults: list[str]) -> bool:
    if os.path.isdir(path):
        return True
    parent = os.path.dirname(os.path.abspath(path)) or "."
    beside = [entry.name for entry in os.scandir(parent) if os.path.isdir(entry.path)] if os.path.isdir(parent) else []
    near = difflib.get_close_matches(os.path.basename(os.path.normpath(path)), beside, 3)
    what = "is a file, not a folder" if os.path.isfile(path) else "is not a folder"
    hint = f". Near it: {', '.join(near)}" if near else f" (working directory: {os.getcwd()})"
    faults.append(f"{where} = {path!r} {what}{hint}")
    return False


def read_source(name: str, config: Any, where: str, faults: list[str], verify: bool = False,
                known_good: Callable[[str], bool] = lambda path: False) -> Source | None:
    """Index one source: images by their headers, captions, masks, templates. None if the folder is missing.

    verify: also decode every image once, except those that `known_good(path)` vouches for (a damaged body shows only then).
    """
    if not _check_folder(config.img_root, f"{where}.img_root", faults):
        return None
    keys, notices = _image_keys(config, where, faults)
    every = keys
    keys, sizes, skipped = _readable(keys, config, where, faults, verify, known_good)
    captions = load_captions(config.caption_file, config.img_root, keys, where, faults, sorted(set(every).difference(keys)))
    _caption_faults(captions, config, keys, where, faults)
    has_captions = captions.found > 0
    templates = load_templates(config.prompt_template, has_captions, config.word_names, where, faults)
    prompter = Prompter(tuple(templates), dict(config.word_names), config.tag_shuffle, config.keep_tokens, config.tag_dropout,
                        config.caption_dropout, config.prompt_dropout)
    notices += captions.notices + word_notices(templates, config.word_names, has_captions)
    masks = _masks(config, keys, sizes, where, faults, verify, known_good)
    return Source(name, config.img_root, keys, sizes, captions, prompter, masks, config.repeats, config.flip, tuple(config.bg_color), skipped, notices)


def _image_keys(config: Any, where: str, faults: list[str]) -> tuple[list[str], list[str]]:
    """Image files below img_root, without those of a mask folder that lies inside it; and notices about files that only look like images."""
    before = len(faults)
    files = list_below(config.img_root, f"{where}.img_root", faults)
    if config.att_mask is not None:
        inside = os.path.relpath(os.path.realpath(config.att_mask), os.path.realpath(config.img_root)).replace(os.sep, "/")
        files = [name for name in files if not name.startswith(inside + "/")]
    taken = pixels.readable_extensions()
    keys = [name for name in files if os.path.splitext(name)[1].lower() in taken]
    others = Counter(os.path.splitext(name)[1].lower() for name in files) - Counter(os.path.splitext(name)[1].lower() for name in keys)
    left = {ending: count for ending, count in others.items() if ending in _LOOKALIKES}
    notices = [f"{count} {ending} files are left out" + ("; install pillow-heif to read them" if ending in pixels.HEIF_EXTENSIONS else "") for ending, count in left.items()]
    if not keys and len(faults) == before:
        there = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in others.most_common(5)) or "no file at all"
        faults.append(f"{where}.img_root = {config.img_root!r} holds no image in it or below ({' '.join(sorted(e[1:] for e in taken))}); there: {there}")
    return keys, notices


def _readable(keys: list[str], config: Any, where: str, faults: list[str], verify: bool, known_good: Callable[[str], bool]) -> tuple[list[str], np.ndarray, list[str]]:
    """(keys, sizes, skipped keys): the images whose header (and body, with verify) can be read; the others are faults or are skipped."""
    def look(key: str) -> tuple[int, int] | str | None:
        path = os.path.join(config.img_root, key)
        try:
            size = pixels.read_header(path)
            if verify and not known_good(path):
                pixels.verify(path)
            return size
        except pixels.READ_FAULTS as error:
            return reason(error, path)
        except MemoryError:
            return None

    found = list(_parallel(look, keys))
    faults += [f"{where}: {no_memory(key)}" for key, size in zip(keys, found) if size is None][:1]
    good = [number for number, size in enumerate(found) if isinstance(size, tuple)]
    bad = [f"{keys[number]}: {size}" for number, size in enumerate(found) if isinstance(size, str)]
    if bad and not config.skip_bad_images:
        faults.append(f"{where}: {damaged(bad, len(keys))}")
    elif bad and not good:
        faults.append(f"{where}: none of {len(keys)} images can be read:\n{_lines(bad)}")
    sizes = np.array([found[number] for number in good], dtype=np.int32).reshape(-1, 2)
    return [keys[number] for number in good], sizes, bad if config.skip_bad_images else []


def damaged(lines: list[str], total: int) -> str:
    """The message about images that cannot be read; `lines`: 'name: reason' each."""
    return (f"{len(lines)} of {total} images cannot be read. Repair or remove them, or set skip_bad_images: true to go on without them:\n{_lines(lines)}")


def no_memory(name: str, more: str = "") -> str:
    """The message about an image that may be as good as any. `more`: what else needs less where it is read."""
    return f"{shown(name)}: no main memory was left to read it. Let other programs end, or make large images smaller{more}."


def _lines(lines: list[str]) -> str:
    more = [f"  and {len(lines) - _SHOWN} more"] * (len(lines) > _SHOWN)
    return "\n".join([f"  {shown(line)}" for line in lines[:_SHOWN]] + more)


def reason(error: BaseException, path: str) -> str:
    """Why an image cannot be read, in a few words without its path."""
    if isinstance(error, FileNotFoundError):
        return "the file is gone"
    if os.path.exists(path) and os.path.getsize(path) == 0:
        return "the file is empty"
    if isinstance(error, pixels.Image.DecompressionBombError):
        return f"more than {2 * pixels.Image.MAX_IMAGE_PIXELS // 1_000_000} megapixels; make it smaller"
    if isinstance(error, pixels.Image.UnidentifiedImageError):
        return "is not an image, or damaged at its beginning"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _parallel(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Results in order; threads, since reading headers waits on the disk and decoding releases the interpreter lock."""
    return map(work, items) if len(items) < 8 else mapped(work, items, min(8, 2 * (os.cpu_count() or 1)))


def _caption_faults(captions: Captions, config: Any, keys: list[str], where: str, faults: list[str]) -> None:
    if config.caption_file is None or captions.found or not keys or captions.form == "none" or captions.fit and not config.skip_bad_images:
        return  # the last: all captions are those of images that are told as bad
    details = "".join(f"\n  {notice}" for notice in captions.notices)
    faults.append(f"{where}.caption_file = {config.caption_file!r} has a caption for none of {len(keys)} images ({shown(', '.join(keys[:3]))}{' ...' if len(keys) > 3 else ''}). "
                  f"Name text files or keys like the images, or set caption_file: null.{details}")


def _masks(config: Any, keys: list[str], sizes: np.ndarray, where: str, faults: list[str], verify: bool, known_good: Callable[[str], bool]) -> list[str] | None:
    """Path of each image's mask: same path below att_mask, else the same without regard to the ending."""
    def look(pair: tuple[str, np.ndarray]) -> str | None:
        path = os.path.join(config.att_mask, pair[0])
        try:
            width, height = pixels.read_header(path)
            if verify and not known_good(path):
                pixels.verify(path)
        except pixels.READ_FAULTS as error:
            return reason(error, path)
        except MemoryError:
            return "no main memory was left to read it"
        return _shape_fault((width, height), (int(pair[1][0]), int(pair[1][1])))

    if config.att_mask is None or not _check_folder(config.att_mask, f"{where}.att_mask", faults):
        return None
    taken = pixels.readable_extensions()
    files = [name for name in list_below(config.att_mask, f"{where}.att_mask", faults) if os.path.splitext(name)[1].lower() in taken]
    exact = set(files)
    stems = {os.path.splitext(name)[0]: name for name in files}
    found = [key if key in exact else stems.get(os.path.splitext(key)[0]) for key in keys]
    missing = [key for key, name in zip(keys, found) if name is None]
    if missing:
        faults.append(f"{where}.att_mask = {config.att_mask!r} lacks the mask of {len(missing)} of {len(keys)} images (wanted: same name, any image ending):\n{_lines(missing)}")
        return None
    bad = [f"{name}: {fault}" for name, fault in zip(found, _parallel(look, list(zip(found, sizes)))) if fault]
    if bad:
        faults.append(f"{where}.att_mask: {len(bad)} of {len(keys)} masks cannot be used:\n{_lines(bad)}")
    return [os.path.join(config.att_mask, name) for name in found]


def _shape_fault(mask: tuple[int, int], image: tuple[int, int]) -> str | None:
    """A mask may be smaller or larger than its image, not of another shape (a pixel of rounding is forgiven)."""
    scale = mask[0] / image[0]
    if abs(mask[1] - image[1] * scale) <= max(1.0, scale):
        return None
    return f"{mask[0]} x {mask[1]} has another shape than its image of {image[0]} x {image[1]}"

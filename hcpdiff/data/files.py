"""Files below a folder, and text files read as UTF-8. Standard library only; what is wrong is appended to a list of faults."""

import os
import re
from pathlib import Path

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")  # also what turns the direction of text around


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
            faults.append(f"{where}: the folder {shown(here)!r} cannot be listed: {error.strerror or error}")
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
        faults.append(f"{shown(str(path))}: cannot be read: {error.strerror or error}")
        return None
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        faults.append(f"{shown(str(path))}: is UTF-16; save it as UTF-8")
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        faults.append(f"{shown(str(path))}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8")
        return None


def read_caption(path: Path, faults: list[str]) -> str | None:
    """A caption file's text on one line."""
    text = read_text(path, faults)
    return None if text is None else one_line(text)


def one_line(text: str) -> str:
    """Lines joined by a space, edges trimmed."""
    return " ".join(part for part in (line.strip() for line in text.split("\n")) if part)


def shown(name: str) -> str:
    """A file name as text that any log or terminal can hold: bytes that are not UTF-8 (names out of an old zip) and control characters are escaped."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], name.encode("utf-8", "backslashreplace").decode("utf-8"))

"""What goes out of a run folder: leftovers of a save that was cut off, what lies beyond the state that is gone on from, old weight files."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import CheckpointError
from . import sums
from .paths import split_name
from .runs import STATES, states

CKPTS, WEBUI = "ckpts", "webui"
_WRITTEN = re.compile(rf"({CKPTS}|{WEBUI})/[^/\\]+\.safetensors")
_EXPORTED = re.compile(r".+-([0-9]+)\.safetensors")
_LEFTOVER = re.compile(r"\..+\.\d+\.([0-9a-f]{8}|new|old)\.tmp")  # as write_atomic and save_state name them


def remove_leftovers(run: Path) -> int:
    """Deletes the temporary files and folders of saves that were cut off; their number comes back. No other process may be saving here."""
    found = [path for folder in (run, run / CKPTS, run / WEBUI, run / STATES) if folder.is_dir() for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]
    for path in found:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return len(found)


def set_aside(run: Path, step: int) -> tuple[Path, list[str]] | None:
    """Moves states and weight files of later steps than `step` into a folder of their own, `newer-than-<step>`: a run that goes on from `step` would
    write over them one by one, and a later resume would find states of two runs side by side. (that folder, what was moved), None if there is none.

    The newest go first, so that a run folder left in between still ends with a state that belongs to all before it.
    """
    newer = [(number, f"{STATES}/{number}") for number in states(run)] + _numbered(run)
    names = [name for number, name in sorted(newer, reverse=True) if number > step]
    if not names:
        return None
    folder = _free(run / f"newer-than-{step}")
    try:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(run / name, folder / name)
    except OSError as error:
        raise CheckpointError(f"{run / name} cannot be moved to {folder}: {error.strerror or error}.") from error
    return folder, names


def _numbered(run: Path) -> list[tuple[int, str]]:
    """(step, path below the run folder) of every weight file."""
    found = []
    for folder in (CKPTS, WEBUI):
        for path in (run / folder).iterdir() if (run / folder).is_dir() else ():
            known = _EXPORTED.fullmatch(path.name) if folder == WEBUI else split_name(path)
            found += [(int(known[1]), f"{folder}/{path.name}")] if known and known[1].isdigit() and path.is_file() else []
    return found


def _free(folder: Path) -> Path:
    number, path = 1, folder
    while path.exists():
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


def surplus(steps: Iterable[int], last: int | None, every: int | None, needed: Iterable[int]) -> list[int]:
    """Which of the steps' weight files may go: all but the newest `last`, every `every`-th step, and those in `needed`. None of them where `last` is None."""
    ordered = sorted(steps)
    if last is None:
        return []
    keep = {*ordered[-last:], *needed}
    return [step for step in ordered if step not in keep and not (every and step % every == 0)]


def drop_weights(run: Path, files: Mapping[str, str]) -> list[str]:
    """Deletes weight files (path below the run folder -> checksum). One that is not as the run wrote it is somebody else's and stays; so does one that
    cannot be deleted, and a line on it comes back."""
    problems = []
    for name, digest in files.items():
        if not _WRITTEN.fullmatch(name):  # a state may be a stranger's
            continue
        path = run / name
        try:
            if path.is_file() and sums.sha256_of(path) == digest:
                path.unlink()
        except (OSError, CheckpointError) as error:
            problems.append(f"warning: {path} is kept: it cannot be deleted ({error}).")
    return problems

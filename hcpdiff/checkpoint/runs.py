"""Which run folders hold training states, and which of them `train.resume` means: from names alone. Needs no torch, so that a mistake is told before it is loaded."""

import os
import re
from pathlib import Path

from ..errors import CheckpointError, ConfigError

STATES = "states"
SUMS = "SHA256SUMS"  # the list of checksums in a state's folder
JSON, TENSORS = "state.json", "state.safetensors"  # the state itself
FORMAT = 2  # of it


def states(run: Path) -> list[int]:
    """Steps of which a state is there, oldest first. CheckpointError where nobody can look."""
    folder = run / STATES
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be looked at: {error.strerror or error}.") from error
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and os.path.isfile(folder / name / SUMS))


def _hint(run: Path) -> str:
    """Where the state or the weights may be that somebody looks for in the wrong folder."""
    if run.name in (STATES, "ckpts") and states(run.absolute().parent):
        return f"; the run folder is {run.parent}"
    weights = sorted((run / "ckpts").glob("*.safetensors"))
    return f"; a new run can start from its weights with model.init_lora={weights[-1]}" if weights else ""


def some_states(run: Path) -> list[int]:
    """As `states`; ConfigError, which says where else to look, where there is none."""
    steps = states(run)
    if not steps:
        raise ConfigError(f"train.resume = {str(run)!r} holds no training state (states/<step>/). It was never saved, or this is no run folder{_hint(run)}.")
    return steps


def find_run(resume: str, root: Path = Path("exps")) -> tuple[Path, int | None]:
    """The run folder that `train.resume` names, and the step where it names one state in it; 'latest' is the run below `root` with the newest state.

    ConfigError where that is no run folder: then nothing has been written into it, not even a lock.
    """
    if resume != "latest":
        path = Path(resume)
        if re.fullmatch("[0-9]+", path.name) and path.parent.name == STATES:
            run, step = path.parent.parent, int(path.name)
            some_states(run)
            return run, step
        if not path.is_dir():
            raise ConfigError(f"train.resume = {resume!r}: there is no such folder. It takes a run folder, one of its states (<run folder>/states/<step>), or latest.")
        some_states(path)
        return path, None
    runs = [path for path in root.iterdir() if path.is_dir() and states(path)] if root.is_dir() else []
    if not runs:
        raise ConfigError(f"train.resume = latest: no run below {root}/ has a training state.")
    return max(runs, key=lambda run: (run / STATES / str(states(run)[-1])).stat().st_mtime_ns), None

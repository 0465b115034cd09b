"""Training states: a folder `states/<step>/` that is there whole or not at all, holding plain data only (JSON and safetensors)."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .io import read_tensors, save_tensors, write_atomic

FORMAT = 1
_TENSOR, _PAIRS, _TUPLE = "__tensor__", "__pairs__", "__tuple__"


def save_state(run: Path, step: int, tree: dict[str, Any], keep: int) -> Path:
    """Writes `tree` (nested dicts, lists, numbers, text, tensors) as the state of `step`, then drops all but the newest `keep` states."""
    folder = run / "states" / str(step)
    making = folder.with_name(f".{step}.{os.getpid()}.tmp")
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "step": step, "tree": _pack(tree, tensors, "state")}, indent=1)
    try:
        save_tensors(making / "state.safetensors", tensors, {"format": str(FORMAT), "step": str(step)})
        write_atomic(making / "state.json", lambda file: file.write(text.encode("utf-8")))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(making, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    for old in states(run)[:-keep]:
        shutil.rmtree(run / "states" / str(old))
    return folder


def states(run: Path) -> list[int]:
    """Steps of which a whole state is there, oldest first."""
    folder = run / "states"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit() and (folder / name / "state.json").is_file())


def load_state(run: Path) -> dict[str, Any]:
    """The newest state of a run folder, as it was given to `save_state`."""
    steps = states(run)
    if not steps:
        raise ConfigError(f"train.resume = {str(run)!r} holds no training state (states/<step>/). It was never saved, or this is no run folder.")
    folder = run / "states" / str(steps[-1])
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'state.json'} cannot be read: {error}. Remove {folder} to go on from the state before it.") from error
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {record.get('format')}, this version reads {FORMAT}: resume with the version that wrote it.")
    try:
        tensors, _ = read_tensors(folder / "state.safetensors")
    except CheckpointError as error:
        raise CheckpointError([*error.faults, f"Remove {folder} to go on from the state before it."]) from error
    return _unpack(record["tree"], tensors)


def find_run(resume: str, root: Path = Path("exps")) -> Path:
    """The run folder that `train.resume` names; 'latest' is the one below `root` with the newest state."""
    if resume != "latest":
        run = Path(resume)
        if not run.is_dir():
            raise ConfigError(f"train.resume = {resume!r}: there is no such folder. It takes a run folder, or latest.")
        return run
    runs = [path for path in root.iterdir() if path.is_dir() and states(path)] if root.is_dir() else []
    if not runs:
        raise ConfigError(f"train.resume = latest: no run below {root}/ has a training state.")
    return max(runs, key=lambda run: (run / "states" / str(states(run)[-1])).stat().st_mtime_ns)


def _pack(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """JSON form of a tree; tensors go to `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {_TENSOR: path}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _pack(item, tensors, f"{path}.{key}") for key, item in value.items()}
        return {_PAIRS: [[key, _pack(item, tensors, f"{path}.{key}")] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"a training state cannot hold {path}, a {type(value).__name__}: this optimizer cannot be resumed.")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _PAIRS in value:
        return {key: _unpack(item, tensors) for key, item in value[_PAIRS]}
    if _TUPLE in value:
        return tuple(_unpack(item, tensors) for item in value[_TUPLE])
    return {key: _unpack(item, tensors) for key, item in value.items()}

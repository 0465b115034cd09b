"""Training states: a folder `states/<step>/` that is there whole or not at all, holding plain data only (JSON and safetensors).

The folder is renamed into place after all else of its step is on the disk, so it is the mark that the step was saved whole.
Only states with their SHA256SUMS count, and only one whose files have the checksums in it is gone on from.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError
from . import sums
from .atomic import sync_folder, write_atomic
from .io import read_tensors, save_tensors
from .runs import FORMAT, JSON, STATES, TENSORS, some_states, states

_TENSOR, _PAIRS, _TUPLE = "__tensor__", "__pairs__", "__tuple__"
_ODD = (LookupError, TypeError, ValueError, AttributeError, RecursionError)  # what JSON that was not written here can lead to


def save_state(run: Path, step: int, tree: dict[str, Any], keep: int, weights: Mapping[str, str] | None = None) -> Path:
    """Writes `tree` (nested dicts, lists, numbers, text, tensors) as the state of `step`, then drops all but the newest `keep` states.

    weights: checksum of each weight file of the step, by its path below the run folder.
    """
    folder = run / STATES / str(step)
    making, old = (folder.with_name(f".{step}.{os.getpid()}.{what}.tmp") for what in ("new", "old"))
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "step": step, "tree": _pack(tree, tensors, "state")}, indent=1)
    try:
        digest = save_tensors(making / TENSORS, tensors, {"format": str(FORMAT), "step": str(step)})
        own = {TENSORS: digest, JSON: write_atomic(making / JSON, lambda file: file.write(text.encode("utf-8")))}
        sums.write_sums(making, {**{f"../../{name}": sha for name, sha in (weights or {}).items()}, **own})
        _put(making, folder, old)
        sync_folder(folder.parent)
    except CheckpointError as error:  # it names the temporary folder, which is no more
        raise CheckpointError([fault.replace(making.name, str(step)) for fault in error.faults]) from error
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    for number in states(run)[:-keep]:
        _drop(run / STATES / str(number))
    return folder


def _put(new: Path, folder: Path, old: Path) -> None:
    """Renames `new` to `folder`; what is there goes to `old`, and comes back if the renaming fails."""
    there = folder.exists()
    if there:
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if there:
            os.replace(old, folder)
        raise


def _drop(folder: Path) -> None:
    """Deletes a state: first its name, since half a state must not look like one. One that cannot go is no fault of the save: the next save tries again."""
    going = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    with contextlib.suppress(OSError):
        os.replace(folder, going)
        shutil.rmtree(going, ignore_errors=True)  # what is left goes at the next start


def load_state(run: Path, step: int | None = None, say: Callable[[str], Any] = lambda line: None) -> dict[str, Any]:
    """A state of a run folder, as it was given to `save_state`: that of `step`, or the newest one that is not damaged.

    What is passed over is told to `say`. A damaged state that was asked for by its step is a CheckpointError.
    """
    steps = some_states(run)
    if step is not None:
        return _asked_for(run, step, steps)
    damage: list[str] = []
    for number in reversed(steps):
        try:
            tree = _read(run / STATES / str(number))
        except sums.Damaged as error:
            damage += error.faults
            continue
        for line in damage:
            say(f"warning: {line} The run goes on from the state before: {run / STATES / str(number)}")
        return tree
    raise CheckpointError([*damage, f"train.resume = {str(run)!r}: none of its {len(steps)} states is whole. A new run can start from its weights: model.init_lora={run}/ckpts/..."])


def _asked_for(run: Path, step: int, steps: list[int]) -> dict[str, Any]:
    there = f"There {'are' if len(steps) > 1 else 'is'}: {', '.join(str(run / STATES / str(number)) for number in steps)}."
    if step not in steps:
        raise ConfigError(f"train.resume = {str(run / STATES / str(step))!r}: there is no such state. {there}")
    try:
        return _read(run / STATES / str(step))
    except sums.Damaged as error:
        raise CheckpointError(f"{' '.join(error.faults)} train.resume={run} takes the newest state that is whole. {there}") from error


def _read(folder: Path) -> dict[str, Any]:
    sums.check(folder, (TENSORS, JSON))
    try:
        record = json.loads((folder / JSON).read_text(encoding="utf-8"))
        version, packed = record["format"], record.get("tree")
    except _ODD as error:
        raise _stranger(folder) from error
    if version != FORMAT:
        raise CheckpointError(f"{folder} has format {version}, this version reads {FORMAT}: resume with the version that wrote it.")
    tensors, _ = read_tensors(folder / TENSORS)
    try:
        tree = _unpack(packed, tensors)
    except _ODD as error:
        raise _stranger(folder) from error
    if not isinstance(tree, dict) or type(tree.get("step")) is not int or tree["step"] != int(folder.name):
        raise _stranger(folder)
    return tree


def _stranger(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder / JSON} is no training state of step {folder.name}: it was changed, or is not from hcpdiff. Another state can be named: "
                           f"train.resume={folder.with_name('<step>')}")


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

"""What a saved state alone says against going on from it with a config: told before torch is read. All else is compared when the run has its model and data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import sums
from ..checkpoint.runs import FORMAT, JSON, STATES, TENSORS, states
from ..config.schema import TrainConfig
from ..errors import CheckpointError, HCPError
from .compare_config import Changes, compare_configs, compare_images_per_step, flat, is_done, ranks, refusals
from .form import HEAD

ALSO = "Base model and data have not been compared yet."


def check(train: TrainConfig, plain: Mapping[str, Any], run: Path, step: int | None, world: int, whole: bool = True) -> None:
    """HCPError where the state of `step` (None: the newest) of a run folder was saved with another config, or has no step left to do. `plain`: the config; where
    it is not `whole`, what it lacks is not compared.

    Nothing is said of a state that is damaged or cannot be read: that is told by who loads it, and another one may be taken in its place.
    """
    folder = run / STATES / str(states(run)[-1] if step is None else step)
    state = _peek(folder)
    if state is None:
        return
    saved = state["run"]["config"]
    if not whole:
        known = flat(plain)
        saved = {key: value for key, value in flat(saved).items() if key in known}
    faults = _differences(train, saved, plain, run, state["run"], world) or _length(train, run, state)
    if faults and _is_whole(folder):
        raise CheckpointError(faults)


def _peek(folder: Path) -> dict[str, Any] | None:
    """A state without its tensors; None where it is not one that can be understood here."""
    try:
        record = json.loads((folder / JSON).read_text(encoding="utf-8"))
        state = record["tree"]
        known = record["format"] == FORMAT and not HEAD(state)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return state if known else None


def _differences(train: TrainConfig, saved: Mapping[str, Any], plain: Mapping[str, Any], run: Path, described: Mapping[str, Any], world: int) -> list[str]:
    found = Changes()
    compare_images_per_step(described, {"world": world, "accumulation": train.gradient_accumulation_steps}, found)
    compare_configs(saved, plain, found)
    found.impossible += ranks(saved, plain)
    faults = refusals(train.resume, run, found.impossible, [] if train.resume_force else found.refused)
    return [*faults[:-1], f"{faults[-1]} {ALSO}"] if faults else []


def _length(train: TrainConfig, run: Path, state: Mapping[str, Any]) -> list[str]:
    """How many steps an epoch has is known without the data only where the saved run has come to the end of the last one."""
    step, epoch, total = state["step"], state["positions"][0][0], train.train_steps
    if total is None and not train.resume_force and epoch >= (train.train_epochs or epoch + 1):
        total = step
    return [is_done(run, step, total)] if total is not None and step >= total else []


def _is_whole(folder: Path) -> bool:
    try:
        sums.check(folder, (TENSORS, JSON))
    except HCPError:
        return False
    return True

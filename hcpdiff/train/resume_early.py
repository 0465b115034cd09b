"""What a saved state alone says against going on from it with a config: told before torch is read. All else is compared when the run has its model and data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import sums
from ..checkpoint.runs import FORMAT, JSON, STATES, TENSORS, states
from ..config.schema import RunConfig
from ..errors import CheckpointError, HCPError
from .compare_config import Changes, compare_configs, compare_images_per_step, is_done, refusals
from .form import HEAD

ALSO = "Base model and data have not been compared yet."


def check(cfg: RunConfig, plain: Mapping[str, Any], run: Path, step: int | None, world: int) -> None:
    """HCPError where the state of `step` (None: the newest) of a run folder was saved with another config, or has no step left to do.

    Nothing is said of a state that is damaged or cannot be read: that is told by who loads it, and another one may be taken in its place.
    """
    folder = run / STATES / str(states(run)[-1] if step is None else step)
    state = _peek(folder)
    if state is None:
        return
    faults = _differences(cfg, plain, run, state, world) or _length(cfg, run, state)
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


def _differences(cfg: RunConfig, plain: Mapping[str, Any], run: Path, state: Mapping[str, Any], world: int) -> list[str]:
    found, saved = Changes(), state["run"]
    compare_images_per_step(saved, {"world": world, "accumulation": cfg.train.gradient_accumulation_steps}, found)
    compare_configs(saved["config"], plain, found)
    faults = refusals(cfg.train.resume, run, found.impossible, [] if cfg.train.resume_force else found.refused)
    return [*faults[:-1], f"{faults[-1]} {ALSO}"] if faults else []


def _length(cfg: RunConfig, run: Path, state: Mapping[str, Any]) -> list[str]:
    """How many steps an epoch has is known without the data only where the saved run has come to the end of the last one."""
    step, epoch, total = state["step"], state["positions"][0][0], cfg.train.train_steps
    if total is None and not cfg.train.resume_force and epoch >= (cfg.train.train_epochs or epoch + 1):
        total = step
    return [is_done(run, step, total)] if total is not None and step >= total else []


def _is_whole(folder: Path) -> bool:
    try:
        sums.check(folder, (TENSORS, JSON))
    except HCPError:
        return False
    return True

"""The state that a resumed run goes on from: found and verified, compared with what is asked for now, and its folder made that of its step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import sums, tidy
from ..checkpoint.resume import load_state
from ..checkpoint.runs import JSON, STATES
from ..errors import CheckpointError
from .compare import compare
from .compare_config import refusals
from .state import FORM, misfits

_SHOWN = 5  # odd places of a state named in one message


class Resumed:
    """`state` as it was saved, in run folder `folder`: that of `step`, or the newest whole one. `asked` is what the config says; `notices` are for the log."""

    def __init__(self, asked: str, folder: Path, step: int | None):
        self.asked, self.folder, self.notices = asked, folder, []
        self.state = load_state(folder, step, self.notices.append)
        odd = FORM(self.state) or ["positions"] * (len(self.state["positions"]) != len(self.state["run"]["data"]))
        if odd:
            places = ", ".join(odd[:_SHOWN]) + (f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else "")
            file = folder / STATES / str(self.state["step"]) / JSON
            raise CheckpointError(f"train.resume = {asked!r}: {file} is no state of a training run: what is missing in it, or cannot be understood: {places}.")
        self.step: int = self.state["step"]
        mark = self.mark = self.folder / STATES / str(self.step)
        self.notices += [f"warning: {path} is not what was saved with {mark}. The state holds the weights itself; the run goes on from those." for path in sums.changed(mark)]

    def differences(self, now: Mapping[str, Any], trainables: Sequence, force: bool) -> list[str]:
        """Lines for the log on what has changed since. CheckpointError with all that has, where this would be another run (unless `force`) or cannot be."""
        changes = compare(self.state["run"], now)
        impossible, refused = [*changes.impossible, *misfits(trainables, self.state)], [] if force else changes.refused
        faults = refusals(self.asked, self.folder, impossible, refused)
        if faults:
            raise CheckpointError(faults)
        return [*(f"warning: train.resume_force: this is another run than the one that was saved: {line}" for line in changes.refused),
                *(f"note: changed since the state was saved: {line}" for line in changes.notes)]

    def placed(self, names: Sequence[str], start: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The state with a position for each dataset of now: `start` for one that is new, as there may be where resume_force was given."""
        places = dict(zip(self.state["run"]["data"], self.state["positions"], strict=True))
        return {**self.state, "positions": [places.get(name, list(place)) for name, place in zip(names, start, strict=True)]}

    def tidy(self) -> list[str]:
        """Makes the folder that of its state: no leftovers, nothing of a later step. Lines for the log. Only one process may do this, after all have read."""
        lines, count = [], tidy.remove_leftovers(self.folder)
        if count:
            lines.append(f"note: {count} unfinished files of a save that was cut off were removed")
        moved = tidy.set_aside(self.folder, self.step)
        if moved:
            lines.append(f"note: {len(moved[1])} files and states of later steps than {self.step} were moved to {moved[0]}, such as {moved[1][0]}")
        return lines

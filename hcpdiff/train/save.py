"""Saving: weight files for users in ckpts/, then the state to resume from, whose appearing marks the step as saved; then what is old goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.format import save_lora
from ..checkpoint.resume import save_state
from ..checkpoint.runs import states
from ..checkpoint.tidy import CKPTS, drop_weights, surplus
from ..errors import CheckpointError, NonFiniteError
from ..lora_tensors import LoraTensors
from .export import WebuiExport
from .hooks import LogHook, Periodic
from .optim import weights_for_use
from .state import training_state
from .trainer import Trainer


@dataclass(frozen=True)
class SavePolicy:
    """When to save, in what form, what to keep, and whether a run goes on when it cannot save. The fields are keys of `train`."""

    save_step: int | None = None
    save_dtype: torch.dtype = torch.float32
    keep_states: int = 2
    keep_last: int | None = None
    keep_every: int | None = None
    on_save_error: str = "stop"


class SaveHook(Periodic):
    """Every `save_step` steps, at the end, when a signal came, and when a batch cannot be made. Rank 0 writes; nobody waits.

    `written` are the weight files that this run made and has not deleted: step -> path below the run folder -> checksum. It is part of
    every state, so that a resumed run deletes what the one before it wrote and nothing else.
    """

    def __init__(self, run: Path, trainables: Sequence, metadata: Mapping[str, str], policy: SavePolicy, described: Mapping[str, Any], log: LogHook,
                 written: Mapping[str, Mapping[str, str]] | None = None, export: WebuiExport | None = None):
        """export: writes a file for webui beside the others, if there is one."""
        super().__init__(policy.save_step)
        self.run, self.trainables, self.metadata, self.policy = run, trainables, metadata, policy
        self.described, self.log, self.export, self.ending = described, log, export, False
        self.written = {int(step): dict(files) for step, files in (written or {}).items()}

    def on_stop(self, trainer: Trainer) -> None:
        self._last(trainer)

    def on_fault(self, trainer: Trainer) -> None:
        self._last(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._last(trainer)

    def _last(self, trainer: Trainer) -> None:
        """A save that must succeed, whatever on_save_error says: after it there is no other."""
        self.ending = True
        self._once(trainer)

    def act(self, trainer: Trainer) -> bool:
        """Writes the checkpoint and the state of the step that is done. While steps change nothing there is nothing new, and older states are not to be pushed out;
        but a run that ends is to be found at its last step."""
        if trainer.state.skipped_in_row and not self.ending:
            self._pass_over(trainer)
            return False
        self.log.flush(trainer)
        self.log.logger.flush()  # before the mark: a run killed right after it goes on with the next step and would never log these
        try:
            paths = self._save(trainer)
        except CheckpointError as error:
            self.written = {step: files for step, files in self.written.items() if files}
            fault = f"step {trainer.state.step} could not be saved: {' '.join(error.faults)}"
            if self.ending or self.policy.on_save_error == "stop":
                raise CheckpointError(f"{fault} {self._what_is_there()}") from error
            self.log.logger.say(f"warning: {fault} Training goes on (train.on_save_error: continue). {self._what_is_there()}")
            return False
        self.log.logger.say(f"saved {', '.join(str(path) for path in paths)}")
        for line in [*(self.export.take_notices() if self.export else ()), *self._drop_old()]:
            self.log.logger.say(line)
        return True

    def _pass_over(self, trainer: Trainer) -> None:
        self._exports(trainer)  # if the weights are the cause, the run ends here
        step, skipped = trainer.state.step, trainer.state.skipped_in_row
        if step < trainer.total_steps and not trainer.stopping:  # else it is about to be saved as the last one
            self.log.logger.say(f"step {step} is not saved: loss or gradient was not finite in the last {skipped} steps, which changed nothing")

    def _what_is_there(self) -> str:
        try:
            there = states(self.run)
        except CheckpointError as error:
            return f"What was saved before was not touched. {error}"
        return f"What was saved before is whole; the newest state is {self.run / 'states' / str(there[-1])}." if there else "No state was saved before."

    def _save(self, trainer: Trainer) -> list[Path]:
        step, exports = trainer.state.step, self._exports(trainer)
        files = self.written.setdefault(step, {})
        for trainable, layers in exports.items():
            name = f"{CKPTS}/{trainable.component.file_stem}-{step}.safetensors"
            files[name] = save_lora(self.run / name, layers, {**self.metadata, "step": str(step), "component": trainable.component.name}, dtype=self.policy.save_dtype)
        if self.export:
            name, digest = self.export.write(step, {trainable.component.name: layers for trainable, layers in exports.items()})
            files[name] = digest
        tree = training_state(trainer, self.trainables) | {"run": self.described, "weights": {str(step): dict(files) for step, files in self.written.items()}}
        save_state(self.run, step, tree, self.policy.keep_states, files)
        return [self.run / name for name in files]

    def _exports(self, trainer: Trainer) -> dict[Any, dict[str, LoraTensors]]:
        with weights_for_use(trainer.optimizer):
            exports = {trainable: trainable.export() for trainable in self.trainables}
        self._check_finite(trainer.state.step, exports)
        return exports

    def _check_finite(self, step: int, exports: Mapping[Any, Mapping[str, LoraTensors]]) -> None:
        """Weights that are not finite are no result; those that only the file's number format cannot hold are a fault of the save."""
        factors = [(path, tensor) for layers in exports.values() for path, lora in layers.items() for tensor in (lora.down, lora.up)]
        factors += [(path, tensor) for t in self.trainables for path, lora in t.adapters.items() for tensor in (lora.down, lora.up)]  # what the state holds
        bad = dict.fromkeys(path for path, tensor in factors if not torch.isfinite(tensor).all())
        if bad:
            raise NonFiniteError(f"step {step} is not saved: {len(bad)} layers hold NaN or infinity, such as {next(iter(bad))}. {self._what_is_there()} "
                                 f"Go on from there with a lower lr.")
        dtype = self.policy.save_dtype
        large = dict.fromkeys(path for path, tensor in factors if not torch.isfinite(tensor.to(dtype)).all())
        if large:
            raise CheckpointError(f"{len(large)} layers, such as {next(iter(large))}, hold numbers beyond {torch.finfo(dtype).max:g}, the largest of train.save_dtype; set it to fp32.")

    def _drop_old(self) -> list[str]:
        policy, problems = self.policy, []
        for step in surplus(self.written, policy.keep_last, policy.keep_every, states(self.run)):
            problems += drop_weights(self.run, self.written.pop(step))
        return problems

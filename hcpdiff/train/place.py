"""Where a run is at home: its folder found or made, locked, and brought to the state that is gone on from."""

import json
import re
from pathlib import Path

from ..checkpoint.atomic import write_atomic
from ..checkpoint.runs import find_run, states
from ..config.load import Loaded
from ..config.schema import RunConfig
from ..errors import ConfigError
from . import folder
from .lock import RunLock
from .parallel import Parallel
from .resumed import Resumed


class RunPlace:
    """`folder` is None until it is found (that of a resumed run) or made; `resumed` is the state that is gone on from, None in a new run; `notices` are for
    the log."""

    def __init__(self, loaded: Loaded[RunConfig], parallel: Parallel):
        self.loaded, self.parallel, self.automatic = loaded, parallel, "exp_dir" in loaded.timed
        self.exp_dir, self.resume = loaded.config.exp_dir, loaded.config.train.resume
        self.folder: Path | None = None
        self.resumed: Resumed | None = None
        self.lock: RunLock | None = None
        self.notices: list[str] = []

    def find(self) -> None:
        """Finds, locks and reads what is gone on from, or looks whether a new folder can be made. HCPError where that is not so; nothing is written."""
        if not self.resume:
            folder.check(self.exp_dir, self.automatic)
            return
        self.folder, step = find_run(self.resume)
        if self.parallel.main:
            self._hold(RunLock(self.folder))
        self.resumed = Resumed(self.resume, self.folder, step)
        if not self.automatic and Path(self.exp_dir).resolve() != self.folder.resolve():
            self.notices.append(f"exp_dir = {self.exp_dir!r} is not used: the run goes on in {self.folder}")
        self.notices += self.resumed.notices

    def _hold(self, lock: RunLock) -> None:
        self.lock = lock
        self.notices += [lock.note] if lock.note else []

    def take_notices(self) -> list[str]:
        """The notices since the last call."""
        notices, self.notices = self.notices, []
        return notices

    def make(self, step: int) -> None:
        """The folder as the first step after `step` needs it: made, or free of what is newer than its state; the config is written into it."""
        if not self.resumed:
            if self.parallel.main:
                self.folder, held = folder.claim(self.exp_dir, self.automatic)
                self._hold(held)
            self.folder = Path(self.parallel.share(str(self.folder)))
        elif len(set(self.parallel.gather((str(self.folder), step)))) > 1:  # no process changes the folder before all have read it
            raise ConfigError(f"train.resume: the processes found different newest states in {self.folder}. Is it on a file system that they share?")
        if self.parallel.main:
            self._write_config(step)
            self.notices += self.resumed.tidy() if self.resumed else []

    def _write_config(self, step: int) -> None:
        name, text = "cfg.yaml" if not self.resumed else f"cfg-resumed-{step}.yaml", self.loaded.yaml
        if str(self.folder) != self.exp_dir:  # the name was taken and got a suffix
            text = re.sub(r"^exp_dir:.*$", lambda _: f"exp_dir: {json.dumps(str(self.folder))}", text, flags=re.MULTILINE)
        write_atomic(self.folder / name, lambda file: file.write(text.encode("utf-8")))

    def how_to_go_on(self, mended: bool = False) -> str:
        """For a run that ends early: what is there, and the command. mended: whether what ended it has to be mended before."""
        if self.folder is None:
            return "No run folder was made; latents in a disk cache are kept."
        saved = states(self.folder)
        if not saved:
            return f"Nothing was saved yet: {self.folder} may be removed." if self.parallel.main else f"Nothing was saved yet in {self.folder}."  # the first process may be about to
        return f"Saved up to step {saved[-1]}; to go on: {'mend it and start ' if mended else ''}the same command with train.resume={self.folder}"

    def release(self) -> None:
        """Lets the lock go."""
        if self.lock is not None:
            self.lock.release()

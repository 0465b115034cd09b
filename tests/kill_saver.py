"""Kills a saver at its system calls, one after the other, and looks at what each kill leaves: `python tests/kill_saver.py FOLDER [--stride 1]`.

A process that saves a step is forked, run under ptrace to its n-th stop (before or after a system call) and killed there by SIGKILL; so for every n.
Each stop is also what another process could see of the folder at that moment. Linux only; prints one JSON object.
"""

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from test_save import Place, saver
from test_trainer import StopRequest

from hcpdiff.checkpoint.format import load_lora
from hcpdiff.checkpoint.resume import load_state
from hcpdiff.checkpoint.runs import states
from hcpdiff.checkpoint.tidy import CKPTS, remove_leftovers, set_aside
from hcpdiff.train.state import restore

TRACEME, SYSCALL, SETOPTIONS, TRACESYSGOOD = 0, 24, 0x4200, 1
POLICY = {"keep_last": 1, "keep_states": 1, "stems": ("unet", "text_encoder")}
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes, libc.ptrace.restype = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p), ctypes.c_long


def ptrace(request: int, pid: int, data: int = 0) -> None:
    """One call; OSError where it is refused."""
    if libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace: {os.strerror(ctypes.get_errno())}")


def saved_until(run: Path, step: int) -> None:
    """A run folder that trained and saved every second step up to `step`."""
    trainer, _, _ = saver(run, steps=step, **POLICY)
    trainer.fit(StopRequest())


def go_on(run: Path, step: int) -> None:
    """Resumes as a run does, and trains to `step`."""
    state = load_state(run)
    remove_leftovers(run)
    set_aside(run, state["step"])
    trainer, _, trainables = saver(run, steps=step, written=state["weights"], **POLICY)
    restore(trainer, trainables, state, Place)
    if state["step"] < step:
        trainer.fit(StopRequest())


def killed_at(stop: int, work) -> int | None:
    """Forks, runs `work` to its `stop`-th stop and kills it there: None. If it ended before: its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            ptrace(TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    ptrace(SETOPTIONS, pid, TRACESYSGOOD)
    seen, pending = 0, 0
    while True:
        ptrace(SYSCALL, pid, pending)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        at_call = os.WSTOPSIG(status) == signal.SIGTRAP | 0x80
        pending = 0 if at_call else os.WSTOPSIG(status)
        seen += at_call
        if seen == stop:
            os.kill(pid, signal.SIGKILL)
            while not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
                pass
            return None


def content(run: Path) -> dict[str, str]:
    """Digest of every file of a run folder, but for what was set aside."""
    files = (path for path in run.rglob("*") if path.is_file() and not path.relative_to(run).parts[0].startswith("newer-than-"))
    return {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensors(run: Path) -> dict[str, str]:
    """Digests of what is the same however often a run was killed: state.json lists the files that are still to be deleted."""
    return {name: digest for name, digest in content(run).items() if name.endswith(".safetensors")}


def look(run: Path, before: dict[str, str], after: dict[str, str]) -> str:
    """Checks what a reader sees after a kill; says which state is there. AssertionError if anything is half."""
    for path in (run / CKPTS).glob("*.safetensors"):
        load_lora(path)
        name = path.relative_to(run).as_posix()
        assert hashlib.sha256(path.read_bytes()).hexdigest() in (before.get(name), after.get(name)), f"{name} is neither the old file nor the new"
    said: list[str] = []
    step = load_state(run, say=said.append)["step"]
    assert not said and step in (4, 6), (step, said)
    for name in (name for name in before if name.startswith(f"{CKPTS}/") and step == 4):
        assert (run / name).is_file(), f"{name} was deleted before the new state was there"
    assert all(load_state(run, number)["step"] == number for number in states(run))
    return {4: "the state before", 6: "the new state"}[step]


def main(folder: Path, stride: int) -> dict:
    """Kills at stops stride, 2 * stride ... until the saver ends by itself; what was found."""
    torch.set_num_threads(1)
    old, new, run = folder / "old", folder / "new", folder / "run"
    saved_until(old, 4)
    before = content(old)
    shutil.copytree(old, new)
    go_on(new, 6)
    after, found, leftovers, kills = content(new), Counter(), 0, 0
    go_on(new, 8)
    end = tensors(new)
    while True:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(old, run)
        code = killed_at((kills + 1) * stride, lambda: go_on(run, 6))
        found[look(run, before, after)] += 1
        if code is not None:
            assert code == 0 and content(run) == after, code
            return {"kills": kills, "found": dict(found), "leftovers": leftovers, "heavy": [name for name in ("diffusers", "transformers") if name in sys.modules]}
        kills += 1
        leftovers += any(path.name.endswith(".tmp") for path in run.rglob("*"))
        go_on(run, 8)
        assert tensors(run) == end and content(run).keys() == content(new).keys(), sorted(content(run).keys() ^ content(new).keys())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--stride", type=int, default=1, help="kill at every so manieth stop")
    print(json.dumps(main(**vars(parser.parse_args()))))

"""Kills whole training runs at random moments and goes on with them, until as many are dead as asked for: `python tests/kill_runs.py FOLDER [--kills 100]`.

Each run is a process that is forked from this one, which has libraries and model loaded, and ends by SIGKILL. In the end the run
must be, bit for bit, the one that was never killed. Before that, the same is asked of a run of two processes that is stopped and resumed. Prints one JSON
object. Linux only.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import group
import scenarios
import torch
from run_help import Stoppable, age, assert_same_run, images, run
from test_resume_exact import CONFIG, STEPS, WORKERS, overrides
from tiny import make_tiny_sd

from hcpdiff.checkpoint.io import read_tensors
from hcpdiff.checkpoint.resume import load_state
from hcpdiff.checkpoint.runs import states

ARGUMENTS = [*overrides({**WORKERS, "latents": "disk", "accumulation": 1}), "train.save_step=1", "train.log_step=2", "train.keep_last=2", "train.keep_every=4"]
REMEASURED = 20  # kills after which the length of a run is measured anew


def forked(work, seconds: float | None = None) -> int:
    """Runs `work` in a process of its own; kills it after `seconds`. Its exit code, -9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
                work()
            code = 0
        finally:
            os._exit(code)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            end = None
        else:
            time.sleep(0.002)


def go(name: str) -> None:
    """Starts the run, or goes on with it."""
    there = states(Path(name)) if Path(name).is_dir() else []
    if there:
        age(Path(name))
    run("cfg.yaml", *([f"train.resume={name}"] if there else [f"exp_dir={name}"]), *ARGUMENTS)


def clear(name: str) -> None:
    """Takes a run folder away that was never saved: no run can go on in it."""
    for path in sorted(Path(name).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def check(run_folder: Path) -> int:
    """What a reader sees after a kill is whole; the step of the newest state, 0 if there is none."""
    for path in (run_folder / "ckpts").glob("[!.]*.safetensors"):
        read_tensors(path)
    if not states(run_folder):
        return 0
    said: list[str] = []
    step = load_state(run_folder, say=said.append)["step"]
    assert not said, said
    return step


def two_processes(place: Path) -> None:
    """A run of two processes, and one that is stopped inside an epoch and resumed by two."""
    def work(name: str, stop: int | None):
        def member(rank: int) -> None:
            os.chdir(place)
            resumed = (place / name).is_dir()
            run("cfg.yaml", f"train.resume={name}" if resumed else f"exp_dir={name}", *ARGUMENTS, stop=stop)
        return member

    for number, (name, stop) in enumerate([("whole-two", None), ("parts-two", 2), ("parts-two", None)]):
        if number == 2:
            age(place / name)
        scenarios.ALL[f"two-{number}"] = (2, work(name, stop), None)
        group.run(f"two-{number}", place / f"two-{number}")
        codes, said = json.loads((place / f"two-{number}" / "codes.json").read_text()), [(place / f"two-{number}" / f"{rank}.txt").read_text() for rank in (0, 1)]
        assert codes == [0, 0], (codes, said)
        assert "2 processes" in said[0] and "saved" not in said[1]
    assert_same_run(place / "whole-two", place / "parts-two", STEPS)


def length(name: str) -> float:
    """Seconds that a whole run takes now."""
    started = time.monotonic()
    assert forked(lambda: go(name)) == 0
    return time.monotonic() - started


def main(folder: Path, kills: int, seed: int) -> dict:
    """Kills so many runs; at which steps they were found, how often a finished one had to start anew. Every failure names the seed."""
    print(f"seed {seed}", file=sys.stderr, flush=True)
    found: list[int] = []
    try:
        rounds = kill(folder, kills, random.Random(seed), found)
    except BaseException as error:
        error.add_note(f"seed {seed}, after {len(found)} kills")
        raise
    return {"kills": len(found), "found at step": found, "rounds": rounds, "seed": seed, "platform": sys.platform}


def kill(folder: Path, kills: int, rng: random.Random, found: list[int]) -> int:
    """Kills runs until `found` has as many steps as asked for; how many runs were begun for that."""
    torch.set_num_threads(1)
    images(folder / "images")
    model = folder / "model"
    assert forked(lambda: make_tiny_sd(model)) == 0
    (folder / "cfg.yaml").write_text(CONFIG.format(model=model), encoding="utf-8")
    os.chdir(folder)
    first = Stoppable("cfg.yaml", [*ARGUMENTS, "exp_dir=whole"], None, False)  # the forked ones find the model read, so most kills meet them at work
    first._read_inputs()
    first._load_model()
    gc.freeze()  # the collector, which each run calls, need not look through what is imported
    two_processes(folder)
    lasts, measured, rounds = length("whole"), 0, 1
    while len(found) < kills:
        if len(found) >= measured + REMEASURED:  # the machine may have become slower or faster since
            measured = len(found)
            lasts = length(f"measured-{measured}")
        code = forked(lambda: go("parts"), rng.uniform(0.2, 1.0) * lasts)
        if code == 0:  # it was faster than the kill: a new round
            assert_same_run(Path("whole"), Path("parts"), STEPS)
            os.rename("parts", f"round-{rounds}")
            rounds += 1
            continue
        assert code == -signal.SIGKILL, code
        found.append(check(Path("parts")))
        if not found[-1] and Path("parts").is_dir():
            clear("parts")
    assert forked(lambda: go("parts")) == 0
    assert_same_run(Path("whole"), Path("parts"), STEPS)
    names = sorted(path.name for path in Path("parts").iterdir())
    assert not [path for path in Path("parts").rglob("*.tmp")], names
    return rounds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    print(json.dumps(main(**vars(parser.parse_args()))))

"""Groups of real processes, forked from one that has imported everything: `python tests/group.py FOLDER NAME...` runs each scenario of that name (scenarios.py).

It does what torchrun does: it holds the store, and ends the other processes when one has failed. Exit codes go to FOLDER/NAME/codes.json, what process R says
to FOLDER/NAME/R.txt. No process outlives it.
"""

import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import hydra  # noqa: F401
import scenarios
import torch.distributed as dist
from accelerate import PartialState
from one_tokenizer import one_tokenizer
from torch.utils import tensorboard  # noqa: F401

from hcpdiff import cli
from hcpdiff.families import detect
from hcpdiff.families.place import open_place
from hcpdiff.train import peers, signals

LIMIT = 120.0  # seconds that a scenario may take
PR_SET_PDEATHSIG = 1


def _member(rank: int, folder: Path, work, world: int, port: int, parent: int) -> None:
    """One process of a group; its end is that of a command line."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(9)
    out = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1), os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": folder.name}
    os.environ.update({name: str(value) for name, value in names.items()})
    PartialState._reset_state()
    signals.TICK, signals.UNWIND, peers.GRACE = 0.2, 4.0, 0.5
    os.chdir(folder)
    code = 1
    try:
        cli.run(lambda args: work(rank), cli.Parser(), [])
    except SystemExit as ending:
        code = ending.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def run(name: str, folder: Path) -> None:
    """One scenario to its end."""
    world, work, after = scenarios.ALL[name]
    folder.mkdir()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=30))
    fork = multiprocessing.get_context("fork")
    members = [fork.Process(target=_member, args=(rank, folder, work, world, store.port, os.getpid())) for rank in range(world)]
    for member in members:
        member.start()
    start, failed = time.monotonic(), None
    try:
        if after is not None:
            after(folder, [member.pid for member in members])
        while any(member.is_alive() for member in members):
            time.sleep(0.02)
            now = time.monotonic()
            if failed is None and any(member.exitcode for member in members):
                failed = now
                for member in members:
                    member.terminate() if member.is_alive() else None
            if now - start > LIMIT or failed and now - failed > 15:
                break
    finally:
        left = [member for member in members if member.is_alive()]
        for member in left:
            member.kill()
        for member in members:
            member.join(10)
    codes = [None if member in left else member.exitcode for member in members]  # None: it hung
    (folder / "codes.json").write_text(json.dumps(codes))


def main(folder: Path, names: list[str]) -> None:
    """The scenarios, one after the other; their processes find the models' tokenizers read and everything imported."""
    with one_tokenizer():
        for model in (os.environ[name] for name in ("GROUP_MODEL", "GROUP_SDXL") if name in os.environ):
            place = open_place(Path(model))
            detect(place).load(place, "")
        gc.freeze()  # the collector, which each run calls, need not look through all that in each process
        for name in names:
            run(name, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(scenarios.ALL))

"""Ends from outside: a launcher that dies, a closed terminal, a reader that leaves, a folder that another run has. Small processes, without torch."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hcpdiff.errors import ConfigError
from hcpdiff.train import launcher
from hcpdiff.train.folder import check, claim
from hcpdiff.train.lock import RunLock

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and parents are POSIX's here")
HOUSE = Path(__file__).parents[1]

TRAINER = """
import sys, time
from pathlib import Path
from hcpdiff import cli
from hcpdiff.train import launcher, signals
signals.TICK = 0.1
sys.stdout = cli.Steady(sys.stdout)
with signals.StopRequest() as stop, stop.patiently():
    if launcher.launcher_command():
        stop.looks.append(signals.orphaned(stop, launcher.PARENT))
    Path("started").write_text(str(launcher.PARENT))
    for step in range(100):
        print("step", step, flush=True)
        if stop.signal:
            break
        if Path("enough").exists():
            sys.exit(0)
        time.sleep(0.2)
Path("saved").write_text(str(stop.signal))
sys.exit(stop.exit_code)
"""
PARENT = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "trainer.py"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
print(process.pid, flush=True)
process.wait()
"""


@pytest.fixture
def place(tmp_path):
    for name, text in (("trainer.py", TRAINER), ("accelerate", PARENT), ("anything", PARENT)):
        (tmp_path / name).write_text(text)
    return tmp_path


def start(place, *command, **more):
    environment = {**os.environ, "PYTHONPATH": f"{HOUSE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen([*command], cwd=place, env=environment, text=True, **more)


def appears(path: Path) -> bool:
    for _ in range(1500):
        if path.exists() and path.read_text():
            return True
        time.sleep(0.02)
    return False


def gone(pid: int) -> bool:
    for _ in range(1500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and ") Z " in stat.read_text():
            return True  # nobody has asked for its exit code: its parent is dead
        time.sleep(0.02)
    return False


def parent_dies(place, name):
    """Starts the trainer below a parent of that name, kills the parent, and returns the trainer's pid."""
    parent = start(place, sys.executable, name, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    assert appears(place / "started")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    return pid


def test_a_run_whose_launcher_is_killed_saves_and_ends(place):
    pid = parent_dies(place, "accelerate")
    assert gone(pid) and (place / "saved").read_text() == str(int(signal.SIGTERM))


def test_a_run_whose_shell_or_script_ends_goes_on(place):
    pid = parent_dies(place, "anything")
    time.sleep(0.5)
    os.kill(pid, 0)
    (place / "enough").write_text("now")
    assert gone(pid) and not (place / "saved").exists()


@pytest.mark.parametrize("ignored, code", [(False, 128 + signal.SIGHUP), (True, 0)], ids=["closed", "nohup"])
def test_a_closed_terminal_is_a_wish_to_stop_unless_nohup_was_used(place, ignored, code):
    process = start(place, sys.executable, "trainer.py", stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL))
    assert appears(place / "started")
    process.stdout.close()  # nobody reads what it says any more
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    (place / "enough").write_text("now") if ignored else None
    assert process.wait(30) == code and (place / "saved").exists() == (not ignored)


def test_only_launchers_count_and_what_they_were_asked_is_read():
    assert not launcher.launcher_command(os.getpid()) and not launcher.command_of(2**22 + 1)
    words = ["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "hcpdiff.train_ac", "--cfg", "a"]
    assert launcher.asked_processes(words) == 2 and launcher.asked_processes([*words[:4], "--num-processes=3"]) == 3
    assert launcher.asked_processes([*words[:4], *words[6:], "--num_processes", "7"]) is None


HOLDER = "import sys, time; from pathlib import Path; from hcpdiff.train.lock import RunLock; lock = RunLock(Path('run')); print('held', flush=True); time.sleep(60)"


def test_a_folder_of_a_living_run_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    (tmp_path / "run").mkdir()
    holder = start(tmp_path, sys.executable, "-c", HOLDER, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == "held\n"
        for refused in (lambda: RunLock(tmp_path / "run"), lambda: check(str(tmp_path / "run"), automatic=False), lambda: claim(str(tmp_path / "run"), automatic=False)):
            with pytest.raises(ConfigError, match=f"a run is at work .*process {holder.pid} on {socket.gethostname()}"):
                refused()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    folder, lock = claim(str(tmp_path / "run"), automatic=False)
    lock.release()
    assert (folder / ".lock").read_bytes() == b""


@pytest.mark.parametrize("automatic", [True, False])
def test_runs_that_start_in_one_second_never_share_a_folder(tmp_path, automatic):
    def one(number):
        try:
            return claim(str(tmp_path / "exps" / "now"), automatic)
        except ConfigError:
            return None

    with ThreadPoolExecutor(16) as pool:
        got = [pair for pair in pool.map(one, range(16)) if pair]
    assert len({folder for folder, _ in got}) == len(got) == (16 if automatic else 1)
    for _, lock in got:
        lock.release()

"""Whole runs that are killed at random moments can be gone on from, and end in the bits of one that was not; so does a run of two processes that is stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has torch")


def kill_runs(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, str(HERE / "kill_runs.py"), *map(str, arguments)], capture_output=True, text=True, encoding="utf-8", timeout=6000, env=environment)


def test_the_seed_is_told_first_and_with_every_failure(tmp_path):
    (tmp_path / "images").write_text("in the way")
    done = kill_runs(tmp_path, "--seed", 1234)
    assert done.returncode == 1 and "seed 1234" in done.stderr.split("Traceback")[0] and done.stderr.rstrip().endswith("seed 1234, after 0 kills"), done.stderr


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.long)])
def test_runs_killed_at_random_end_as_one_that_was_not(tmp_path, kills):
    done = kill_runs(tmp_path, "--kills", kills)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == kills

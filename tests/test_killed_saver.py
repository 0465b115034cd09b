"""A saver that is killed at any of its system calls leaves a folder that can be gone on from, and never half a file under a name that is read."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="ptrace as it is used here is Linux's, on x86-64 and aarch64")


def kills(folder: Path, stride: int) -> dict:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(HERE / "kill_saver.py"), str(folder), "--stride", str(stride)], capture_output=True, text=True, encoding="utf-8", timeout=3000,
                          env=environment)
    if "ptrace: " in done.stderr and "AssertionError" not in done.stderr:
        pytest.skip(f"ptrace is not allowed here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(found: dict, least: int) -> None:
    assert found["kills"] >= least and found["heavy"] == []
    assert min(found["found"].values()) >= least / 20 and len(found["found"]) == 2  # kills before the mark and after it
    assert found["leftovers"] >= least / 20  # and some that left half a file under a temporary name


def test_a_saver_killed_at_a_hundred_places_can_always_be_gone_on_from(tmp_path):
    check(kills(tmp_path, 4), 100)


@pytest.mark.long
def test_a_saver_killed_before_and_after_each_system_call_can_always_be_gone_on_from(tmp_path):
    check(kills(tmp_path, 1), 400)

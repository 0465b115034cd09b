"""Several processes of one run end together, whichever of them fails or is told to stop, and one of them says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hcpdiff.train.parallel import WAIT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has torch, and ties it to its parent")


class Ended:
    """Of one scenario: exit codes and outputs by rank, and what stands in its folder."""

    def __init__(self, folder: Path):
        self.folder, self.codes = folder, json.loads((folder / "codes.json").read_text())
        self.said = [(folder / f"{rank}.txt").read_text() for rank in range(len(self.codes))]

    def ends_with(self, code: int, text: str) -> bool:
        """All processes have the exit code, one has said the text, once, and the others nothing at all."""
        return self.codes == [code] * len(self.codes) and "".join(self.said).count(text) == 1 and sum(map(bool, self.said)) == 1

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(here / "group.py"), str(folder)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return lambda name: Ended(folder / name)


def test_a_run_that_goes_well_ends_in_all_and_each_draws_its_share_of_the_previews(ended):
    well = ended("well")
    assert well.codes == [0, 0, 0] and well.said == ["ended at 6\n"] * 3
    assert [well.read(f"previews/6-{n}.png") for n in range(4)] == ["0", "1", "2", "3"]  # in the order of the prompts


def test_a_fault_of_the_inputs_is_told_once_and_says_whose_it_is(ended):
    assert ended("config").ends_with(2, "error: 2 faults\n  - the same key\n  - process 1: only here\n")


@pytest.mark.parametrize("name, code, text", [
    ("data", 2, "error: images/3.png is damaged"), ("memory", 2, "error: out of memory in a training step"), ("nan", 3, "error: loss or gradient was not finite"),
    ("bug", 1, "ZeroDivisionError"), ("saving", 2, "error: ckpts/unet-2.safetensors cannot be written"), ("drawing_bug", 1, "ZeroDivisionError"),
    ("encoding", 2, "error: images/7.png cannot be read"), ("config", 2, "error: 2 faults")])
def test_a_fault_in_one_ends_all_with_its_message_once(ended, name, code, text):
    assert ended(name).ends_with(code, text), ended(name).said


def test_the_loss_of_one_ends_the_others_with_a_code_of_its_own(ended):
    killed = ended("killed")
    assert killed.codes == [4, -9, 4] and "".join(killed.said).count("has ended without a word") == 1 and "Traceback" not in "".join(killed.said)


def test_a_preview_that_fails_in_one_is_said_by_the_first_and_ends_nothing(ended):
    drawing = ended("drawing")
    assert drawing.codes == [0, 0] and drawing.said[0].count("warning: the preview of step 6 could not be drawn: no memory") == 1
    assert drawing.said[1] == "ended at 6\n" and not (drawing.folder / "previews").exists()


@pytest.mark.parametrize("name, code", [("sigterm_one", 143), ("sigint_all", 130)])
def test_a_signal_to_some_stops_all_at_one_step_that_is_saved(ended, name, code):
    group = ended(name)
    assert set(group.codes) == {code} and set(group.said) == {f"ended at {group.read('saved')}\n"}  # copies from a launcher changed nothing


def test_a_second_signal_ends_a_process_that_waits_for_another(ended):
    assert ended("stuck").codes[0] == 143 and ended("stuck").said[0].startswith("ended: what was under way did not end within")


def test_the_patience_with_another_process_is_longer_than_a_save_or_a_share_of_the_latents():
    assert WAIT.total_seconds() >= 3600

"""Several processes of one run end together, whichever of them fails or is told to stop, and one of them says why."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hcpdiff.train.parallel import WAIT
from hcpdiff.train.peers import Peers

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has torch, and ties it to its parent")


def test_a_store_that_ends_between_two_questions_ends_the_process_and_no_thread():
    def gone(key):
        raise RuntimeError("Connection reset by peer")

    peers, left = Peers.__new__(Peers), []
    peers.ended, peers.store_gone, peers.key, peers.store = False, False, "run", SimpleNamespace(check=lambda keys: True, get=gone)
    peers.look(SimpleNamespace(leave=left.append))
    assert left == [4] and peers.ended


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
def ended(tmp_path_factory, tiny_sd1, tiny_sdxl):
    folder, images = tmp_path_factory.mktemp("groups"), tmp_path_factory.mktemp("images")
    for i in range(7):
        Image.effect_noise((100, 60) if i % 3 else (64, 80), 20 * i + 10).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"red, blue, number {i}", encoding="utf-8")
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1",
                   "GROUP_MODEL": str(tiny_sd1), "GROUP_SDXL": str(tiny_sdxl), "GROUP_IMAGES": str(images)}
    done = subprocess.run([sys.executable, str(here / "group.py"), str(folder)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return lambda name: Ended(folder / name)


def test_a_run_that_goes_well_ends_in_all_and_each_draws_its_share_of_the_previews(ended):
    well = ended("well")
    assert well.codes == [0, 0, 0] and well.said[1:] == ["ended at 6\n"] * 2
    assert re.fullmatch("".join(rf"previews of step {step}: 4 pictures in \d+\.\d s\n" for step in (2, 4, 6)) + "ended at 6\n", well.said[0])
    assert [well.read(f"previews/6-{n}.png") for n in range(4)] == ["0", "1", "2", "3"]  # in the order of the prompts


def test_a_fault_of_the_inputs_is_told_once_and_says_whose_it_is(ended):
    assert ended("config").ends_with(2, "error: 2 faults\n  - the same key\n  - process 1: only here\n")


@pytest.mark.parametrize("name, code, text", [
    ("data", 2, "error: images/3.png is damaged"), ("memory", 2, "error: out of memory in a training step"), ("nan", 3, "error: loss or gradient was not finite"),
    ("bug", 1, "ZeroDivisionError"), ("saving", 2, "error: ckpts/unet-2.safetensors cannot be written"), ("drawing_bug", 1, "ZeroDivisionError"),
    ("encoding", 2, "error: images/7.png cannot be read"), ("config", 2, "error: 2 faults")])
def test_a_fault_in_one_ends_all_with_its_message_once(ended, name, code, text):
    assert ended(name).ends_with(code, text), ended(name).said


@pytest.mark.parametrize("name, step", [("lost_other", 3), ("lost_both", 3), ("lost_lag", 3), ("lost_last", 5), ("lost_stopped", 3)])
def test_a_batch_that_one_cannot_make_ends_all_after_the_first_has_saved_what_was_done(ended, name, step):
    group = ended(name)
    said = "".join(group.said)
    assert group.codes == [2] * len(group.codes) and said.count("error: images/5.png: the file is gone\n") == 1 and said.count("error") == 1, group.said
    assert group.read("saved") == str(step) and "Traceback" not in said


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


def scalars(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tblog"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def test_two_processes_stopped_and_resumed_train_what_one_does_with_accumulation(ended):
    """Text encoder and UNet, dropout, no cache and a disk cache, tags shuffled."""
    one, parts, resumed = ended("one"), ended("parts"), ended("resumed")
    assert one.codes == [0] and parts.codes == resumed.codes == [0, 0], (one.said, parts.said, resumed.said)
    losses = [scalars(group.folder / "run") for group in (one, parts)]
    assert losses[0].keys() == losses[1].keys() == {1, 2, 3, 4, 5}
    assert list(losses[1].values()) == pytest.approx(list(losses[0].values()), rel=1e-5)
    for stem in ("unet", "text_encoder"):
        a, b = (load_file(group.folder / "run" / "ckpts" / f"{stem}-5.safetensors") for group in (one, parts))
        assert a.keys() == b.keys() and max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4, stem
        assert all(torch.isfinite(b[key]).all() for key in b)
    assert not parts.said[1] and not resumed.said[1] and sorted(path.name for path in (parts.folder / "run" / "states").iterdir()) == ["3", "5"]  # rank 0 speaks and writes


def test_a_batch_that_one_cannot_make_by_a_fault_of_ours_costs_no_step_and_shows_its_traceback(ended):
    group = ended("lost_bug")
    assert group.codes == [1, 1] and not group.said[0] and group.said[1].count("Traceback") == 1 and "ZeroDivisionError: of ours" in group.said[1], group.said
    assert group.read("saved") == "3"


def test_a_save_that_fails_for_want_of_a_batch_elsewhere_gives_all_its_exit_code(ended):
    group = ended("lost_full")
    said = "".join(group.said)
    assert group.codes == [3, 3] and said.count("images/5.png: the file is gone") == said.count("step 3 is not saved") == 1, group.said


def test_a_save_that_breaks_for_want_of_a_batch_elsewhere_is_told_with_why_there_was_none(ended):
    group = ended("lost_disk")
    said = "".join(group.said)
    assert group.ends_with(1, "OSError: the disk is gone") and said.count("FeedError: images/5.png: the file is gone") == 1, group.said


@pytest.mark.parametrize("precision,most", [("", 1e-5), ("_bf16", 0.0)])
def test_the_gradients_of_two_processes_are_those_of_one_over_their_joint_batch(ended, precision, most):
    """fp32: two batches of seven against one of all fourteen samples. bf16, with half-precision copies: two batches, at a time or one after the other, for rounding may depend on
    a batch's size."""
    joint, halves = ended(f"joint{precision}"), ended(f"halves{precision}")
    assert joint.codes == [0] and halves.codes == [0, 0], (joint.said, halves.said)
    (one, copies, alone), (two, others, sums) = (torch.load(group.folder / "noted.pt") for group in (joint, halves))
    assert copies == others == [torch.bfloat16] * (2 if precision else 0)
    assert not alone and len(sums) == len(two) == 2 and all(count >= part.numel() for count, part in zip(sums, two))  # each step's gradients at once
    for a, b in zip(one, two, strict=True):
        assert 0 < a.norm() and (a - b).norm() <= most * a.norm()


def test_two_processes_of_sdxl_stopped_and_resumed_train_what_one_does_with_accumulation(ended):
    one, two, resumed = ended("sdxl_one"), ended("sdxl_parts"), ended("sdxl_resumed")
    assert one.codes == [0] and two.codes == resumed.codes == [0, 0], (one.said, two.said, resumed.said)
    assert sorted(path.name for path in (two.folder / "run" / "states").iterdir()) == ["3", "5"]
    for part in ("unet", "text_encoder", "text_encoder_2"):
        a, b = (load_file(group.folder / "run" / "ckpts" / f"{part}-5.safetensors") for group in (one, two))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
        learnt = [tensor.any() for key, tensor in a.items() if "lora_up" in key]  # zero as they begin
        assert learnt and sum(learnt) >= len(learnt) / 2, part  # the last layer of the first text encoder is not used, and learns nothing


def test_the_one_device_command_under_two_trains_alone_and_says_so(ended):
    alone = ended("alone")
    assert alone.codes == [0, 0] and not alone.said[1]
    assert "train_ac_single uses one device" in alone.said[0] and "1 process\n" in re.sub(r" +.?\n", "\n", alone.said[0].replace("│", ""))


def test_the_patience_with_another_process_is_longer_than_a_save_or_a_share_of_the_latents():
    assert WAIT.total_seconds() >= 3600


def test_what_the_text_encoders_of_some_processes_have_no_room_for_is_said_by_the_first(ended):
    """Others than the first have no place to say it: each of their steps in which it happened is told, with their numbers."""
    first, others = ended("crowded_first"), ended("crowded_others")
    assert first.codes == [0, 0] and others.codes == [0, 0, 0], (first.said, others.said)
    assert first.read("run/train.log").count("warning: cpu has no room left for the text encoders") == len(first.read("crowded0").split()) > 1 and not first.said[1]
    steps = [set(others.read(f"crowded{rank}").split()) for rank in (1, 2)]
    told = re.findall(r"warning: the devices? of process(?:es)? ([\d, ]+) ha(?:s|ve) no room left for the text encoders", others.read("run/train.log"))
    assert len(told) == len(steps[0] | steps[1]) > 1 and [sum(str(rank) in line.split(", ") for line in told) for rank in (1, 2)] == [len(own) for own in steps]
    assert not others.said[1] and not others.said[2]

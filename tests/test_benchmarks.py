"""How the benchmarks judge what they measured. Seconds are not looked at here."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import Figure, hide_gpus, in_turn, turned
from ways import WAYS, Batch

RUN = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))  # the name `run` may be another module's


def step(batch: int, seconds: float, more: str = "", family: str = "sd1 512 px") -> Figure:
    return Figure(f"step, {family} batch {batch} bf16{more}", "floor", [1.1], 1.4, values={"ours s": seconds, "floor s": seconds / 1.1})


@pytest.mark.parametrize("ratios, every, verdict", [([0.8, 0.9, 1.2], False, "hit"), ([0.8, 0.9, 1.2], True, "missed"), ([0.8, 0.9, 0.99], True, "hit"),
                                                    ([0.8, 0.9, 1.0], True, "missed"), ([1.1, 0.9, 1.2], False, "missed"), ([], True, "open")])
def test_a_figure_is_judged_by_its_median_or_by_every_pair(ratios, every, verdict):
    figure = Figure("step", "loop", ratios, 1.0, every=every, note="it does not fit")
    assert figure.verdict == verdict and figure.cells()[3] == ("< 1 in every pair" if every else "≤ 1")
    assert ratios or figure.cells()[2] == "it does not fit"


def test_what_should_be_at_least_something_is_judged_from_below():
    judged = [Figure("x", "y", ratios, 1.5, at_least=True, every=every).verdict for ratios, every in (([1.4, 1.6, 1.7], False), ([1.4, 1.6], True), ([1.6], True))]
    assert judged == ["hit", "missed", "hit"]
    assert Figure("x", "y", [3.0]).verdict == ""


def test_images_a_second_have_a_goal_where_the_issue_has_one():
    steps = [step(1, 0.09), step(8, 0.16), step(1, 0.04, " compiled"), step(8, 0.1, " compiled"), step(1, 1.0, family="sdxl 1024 px"), step(8, 4.0, family="sdxl 1024 px")]
    assert [(figure.what.removeprefix("images a second, "), round(figure.median, 6), figure.bound) for figure in RUN["derived"](steps)] == [
        ("sd1 512 px batch 8 bf16", 4.5, 4.0), ("sd1 512 px batch 8 bf16 compiled", 3.2, None), ("sdxl 1024 px batch 8 bf16", 2.0, None)]


@pytest.mark.parametrize("given, lacking", [([step(1, 0.09)], "batch 8"), ([step(8, 0.16)], "batch 1"),
                                            ([step(1, 0.09), Figure("step, sd1 512 px batch 8 bf16", "floor", [], 1.12, note="ours: does not fit")], "batch 8")])
def test_a_figure_whose_partner_is_missing_is_open_and_names_it(given, lacking):
    (found,) = RUN["derived"](given)
    assert found.verdict == "open" and lacking in found.note
    assert not RUN["derived"]([step(1, 1.0, family="sdxl 1024 px"), Figure("step, sd1 512 px batch 4 fp32", "floor", [1.0], 1.08, values={"ours s": 50.0})])


def test_every_work_begins_once_and_has_a_time_for_each_round():
    calls = []
    seconds = in_turn({name: lambda name=name: calls.append(name) for name in "abc"}, 2, warm=1, each=2)
    assert calls == [*"ccaabb", *"aabbcc", *"bbccaa"] and {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 2)
    assert turned("abc", 4) == ["b", "c", "a"]


def test_a_benchmark_without_a_gpu_in_its_command_sees_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    hide_gpus(["--device", "cuda", "--rounds", "3"])
    hide_gpus(["--rounds=3", "--device=cuda"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    hide_gpus(["--pixels", "64"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_all_ways_train_as_many_numbers():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ROOT / "demo" / "model" / "unet")).requires_grad_(False)
        batch = Batch(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 77, 64), torch.zeros(2, 4, 8, 8))
    trained = {}
    for name, way in WAYS.items():
        with way(unet, batch, 8) as step:
            trained[name] = step.trained
    assert trained.pop("floor") == 0 and len(set(trained.values())) == 1 and trained["ours"] > 10_000

"""The proof that training learns: the demo's LoRA on the shipped model, on pictures that it never saw, and two controls that must fail.

The bar is demo/measure.py's; docs/en/demo.md has what five seeds of the whole training give. Here it is shorter: what is shown shows early.
"""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.run import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

import measure as program
from measure import ROOT, RUNS, Measure

SHORT = ["train.train_steps=60", "train.save_step=null", "train.cpu_threads=1", "seed=7", "data.dataset1.batch_size=4", "data.known_styles.batch_size=8",
         "model.gradient_checkpointing=false", "data.dataset1.cache_latents=disk", "data.known_styles.cache_latents=disk"]  # a step without it is the same, and sooner done
SHORTER = {"known-style": ["train.train_steps=10"]}  # what it fails by is there at once


def train(out: Path, *words: str, by_command: bool = False) -> Path:
    """demo/measure.py's `train`, in this process unless `by_command`; the runs beside each other share the latents."""
    words = (*SHORT, *(f"data.{name}.cache_dir={out.parent / 'cache'}" for name in ("dataset1", "known_styles")), *words)
    if by_command:
        return program.train(out, *words)
    with contextlib.chdir(ROOT):
        assert Run(load("demo/lora.yaml", [f"exp_dir={out}", *words], RunConfig), Parallel()).train() == 0
    return max((out / "ckpts").glob("unet-*.safetensors"), key=lambda path: int(path.stem.split("-")[1]))


@pytest.fixture(scope="module")
def measure():
    return Measure(timesteps=range(60, 1000, 250))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return {name: train(out / name, *SHORTER.get(name, ()), *own, by_command=name == "lr-0") for name, own in RUNS.items()}


@pytest.fixture(scope="module")
def result(measure, files):
    return measure.result(files["concept"])


def test_the_concept_is_learned_and_shows_on_things_that_were_not_in_the_folder(result):
    assert result.improved >= 14 and result.change <= -0.15, result


def test_the_styles_that_the_model_knew_are_kept(result):
    assert result.base_change < 0.15, result
    assert result.passes()


@pytest.mark.parametrize("control", ["known-style", "lr-0"])
def test_controls_fail_the_same_check(measure, files, control):
    assert not measure.result(files[control]).passes()


def test_strength_zero_is_the_base_model_bit_for_bit_and_taking_the_lora_away_too(measure, files):
    before = measure.losses(measure.concept, measure.triggered)
    measure.attach(files["concept"], strength=0.0)
    at_zero = measure.losses(measure.concept, measure.triggered)
    measure.detach()
    assert torch.equal(before, at_zero)
    measure.attach(files["concept"])
    assert not torch.equal(before, measure.losses(measure.concept, measure.triggered))
    measure.detach()
    assert torch.equal(before, measure.losses(measure.concept, measure.triggered))


@pytest.mark.long
@pytest.mark.parametrize("code,share", [("int8", 0.98), ("nf4", 0.95)])
def test_what_is_learned_on_a_quantized_base_holds_on_the_plain_one(measure, files, result, tmp_path, code, share):
    quantized = measure.result(train(tmp_path / "run", f"model.quantize={code}"))
    assert quantized.passes() and quantized.change < share * result.change, (quantized, result)

"""What the start of a run shows, and what a resume says of what changed."""

import io

import pytest
from rich.console import Console
from tiny import make_unet

from hcpdiff.adapters.select import select
from hcpdiff.config.schema import LoraGroup
from hcpdiff.errors import CheckpointError
from hcpdiff.families.base import Models
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.train.report import facts_table, layers_table
from hcpdiff.train.state import resume_notes
from hcpdiff.trainables.lora import LoraTrainable


def shown(renderable) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=200).print(renderable)
    return buffer.getvalue()


def test_brackets_in_patterns_and_paths_are_shown_as_they_are():
    trainable = LoraTrainable(StableDiffusion.components[0], [LoraGroup(lr=1e-3, rank=2, layers=[r"re:.*attn2\.to_[kv]$", r"re:.*attn1\.to_q[/]?$"])], "lora_unet")
    trainable.attach(Models(StableDiffusion(), None, "tiny", {"unet": make_unet()}, {}, {}), 0)
    text = shown(layers_table([trainable]))
    assert r"attn2\.to_[kv]$" in text and "to_q[/]?$" in text and "lora_unet[0]" in text
    assert "my [bold] folder" in shown(facts_table("run", {"folder": "my [bold] folder"}))


def test_the_table_counts_layers_after_exclude():
    (selection,) = select(make_unet(), [LoraGroup(lr=1, layers=[r"re:.*\.attn.?$"], exclude=[r"re:.*to_out"])], "lora_unet")
    assert selection.per_pattern == {r"re:.*\.attn.?$": 96} and len(selection.paths) == 96


SAVED = {"base_mark": "a", "world": 1, "versions": {"torch": "2.13"}, "config": {"seed": 1, "exp_dir": "x", "train": {"resume": None, "train_steps": 5, "optimizer": {"_target_": "A"}}}}


def test_a_resume_says_what_changed():
    now = {**SAVED, "world": 2, "config": {**SAVED["config"], "exp_dir": "y", "train": {**SAVED["config"]["train"], "train_steps": 9, "resume": "x"}}}
    assert resume_notes(SAVED, now) == ["resumed with another train.train_steps: 5 before, 9 now", "resumed with another world: 1 before, 2 now"]
    assert resume_notes(SAVED, SAVED) == []


def test_another_model_optimizer_or_seed_is_refused():
    now = {**SAVED, "base_mark": "b", "config": {**SAVED["config"], "seed": 2, "train": {"optimizer": {"_target_": "B"}}}}
    with pytest.raises(CheckpointError) as caught:
        resume_notes(SAVED, now)
    assert len(caught.value.faults) == 3 and "train.optimizer._target_ 'A', now it is 'B'" in str(caught.value)

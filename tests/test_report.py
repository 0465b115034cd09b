"""What the start of a run shows."""

import io

from rich.console import Console
from tiny import make_unet

from hcpdiff.adapters.select import select
from hcpdiff.config.schema import LoraGroup
from hcpdiff.families.base import Models
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.train.report import facts_table, layers_table
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

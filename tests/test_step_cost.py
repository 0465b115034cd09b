"""What a step costs, in exact counts: they guard against a slower step where seconds would not be exact."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from ways import WAYS, Batch

RANK = 8


def make(family: str, pixels: int) -> tuple[UNet2DConditionModel, Batch]:
    """The released architecture and a batch for it, without numbers (meta device)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ROOT / "hcpdiff" / "assets" / "base_models" / family / "unet")).requires_grad_(False).train()
        latents, added = torch.randn(1, 4, pixels // 8, pixels // 8), None
        if family == "sdxl":
            added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.ones(1, 6)}
        return unet, Batch(latents, torch.ones(1, dtype=torch.int64), torch.randn(1, 77, unet.config.cross_attention_dim), latents, added)


def flops(way: str, unet, batch: Batch) -> int:
    """Of forward and backward. Clipping and the optimizer multiply no matrices, so they do not count; a loop's need numbers, so only ours and the floor run without."""
    with WAYS[way](unet, batch, RANK) as step, FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "pixels"), [("sd1", 512), pytest.param("sdxl", 1024, marks=pytest.mark.long)])
def test_a_step_has_at_most_two_percent_more_flops_than_the_frozen_models_own(family, pixels):
    unet, batch = make(family, pixels)
    bare, lora = flops("floor", unet, batch), flops("ours", unet, batch)
    assert 1 < lora / bare <= 1.02


def test_checkpointing_costs_one_forward_and_no_more():
    unet, batch = make("sd1", 512)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        batch.loss(unet)
    plain = flops("ours", unet, batch)
    unet.enable_gradient_checkpointing()
    assert flops("ours", unet, batch) <= plain + 1.02 * forward.get_total_flops()


def test_no_frozen_parameter_gets_a_gradient():
    unet, batch = make("sd1", 64)
    with WAYS["ours"](unet, batch, RANK) as step:
        step()
        frozen = [name for name, p in unet.named_parameters() if ".adapter." not in name]
        assert frozen and not [name for name, p in unet.named_parameters() if name in frozen and (p.grad is not None or p.requires_grad)]
        assert all(p.grad is not None for name, p in unet.named_parameters() if ".adapter." in name)

"""What a step costs, in exact counts: they guard against a slower step where seconds would not be exact."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from ways import WAYS, Batch, targets

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


Storages = dict[int, torch.UntypedStorage]


def kept(way: str, unet, batch: Batch) -> tuple[Storages, Storages, int]:
    """What a step's forward keeps for its backward beside the model's parameters, the inputs of what would be trained (distinct storages), and how many rows all
    those layers get."""
    held, inputs, rows = {}, {}, []

    def note(place: Storages, tensor: torch.Tensor) -> torch.Tensor:
        place[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def look(layer, args) -> None:
        rows.append(note(inputs, args[0]).numel() // layer.in_features)

    with WAYS[way](unet, batch, RANK) as step:
        own = {tensor.untyped_storage()._cdata for tensor in (*unet.parameters(), *unet.buffers())}
        marks = [layer.register_forward_pre_hook(look) for layer in targets(unet).values()]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: note(held, tensor), lambda tensor: tensor):
            step()
        for mark in marks:
            mark.remove()
    return {key: storage for key, storage in held.items() if key not in own}, inputs, sum(rows)


def size(storages: Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_keeps_each_input_once_and_rank_numbers_a_row_and_nothing_else(dtype):
    """Layers that read the same tensor keep it together; in half precision all factors of the model are one copy."""
    unet, batch = make("sd1", 512)
    unet.to(dtype)
    batch.noisy, batch.hidden = batch.noisy.to(dtype), batch.hidden.to(dtype)
    (bare, _, _), (ours, inputs, rows), layers = kept("floor", unet, batch), kept("ours", unet, batch), targets(unet).values()
    copy = 2 * sum(64 * -(-RANK * width // 64) for layer in layers for width in layer.weight.shape) if dtype == torch.bfloat16 else 0
    assert (len(layers), len(inputs)) == (160, 16 * 6 + 1)
    assert len(ours) == len(bare) + len(inputs) + len(layers) + (copy > 0)
    assert size(ours) == size(bare) + size(inputs) + rows * RANK * dtype.itemsize + copy


def test_checkpointing_keeps_no_more_with_a_lora_than_without():
    unet, batch = make("sd1", 512)
    unet.enable_gradient_checkpointing()
    bare, ours = kept("floor", unet, batch)[0], kept("ours", unet, batch)[0]
    assert (len(ours), size(ours)) == (len(bare), size(bare))


def test_no_frozen_parameter_gets_a_gradient():
    unet, batch = make("sd1", 64)
    with WAYS["ours"](unet, batch, RANK) as step:
        step()
        frozen = [name for name, p in unet.named_parameters() if ".adapter." not in name]
        assert frozen and not [name for name, p in unet.named_parameters() if name in frozen and (p.grad is not None or p.requires_grad)]
        assert all(p.grad is not None for name, p in unet.named_parameters() if ".adapter." in name)

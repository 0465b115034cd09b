"""What a step costs, in exact counts: they guard against a slower step where seconds would not be exact."""

import functools
import sys
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import run_help
import torch
from diffusers import UNet2DConditionModel
from test_adapters import IN_PLACE
from test_run import CONFIG
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from ways import TARGETS, WAYS, Batch, targets

from hcpdiff.adapters.base import detach
from hcpdiff.adapters.lora import Lora
from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.families.base import Models
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.families.sdxl import StableDiffusionXL
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.run import Run

RANK = 8
FAMILIES = {"sd1": StableDiffusion, "sdxl": StableDiffusionXL}


@functools.cache
def make(family: str, pixels: int) -> tuple[UNet2DConditionModel, Batch]:
    """The released architecture and a batch for it, without numbers (meta device)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ROOT / "hcpdiff" / "assets" / "base_models" / family / "unet")).requires_grad_(False).train()
        latents, added = torch.randn(1, 4, pixels // 8, pixels // 8), None
        if family == "sdxl":
            added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.ones(1, 6)}
        return unet, Batch(latents, torch.ones(1, dtype=torch.int64), torch.randn(1, 77, unet.config.cross_attention_dim), latents, added)


def models_of(unet: UNet2DConditionModel, family: str) -> Models:
    """What a family needs to know of it."""
    return Models(FAMILIES[family](), None, family, {"unet": unet}, {}, {})


@contextmanager
def checkpointing(family: str, pixels: int):
    """A UNet as a run checkpoints it, and a batch; afterwards it is as it was."""
    unet, batch = make(family, pixels)
    FAMILIES[family]().checkpointing(models_of(unet, family), "unet")
    try:
        yield unet, batch
    finally:
        unet.disable_gradient_checkpointing()


def convolutions(unet: UNet2DConditionModel) -> dict[str, torch.nn.Conv2d]:
    """Path -> layer: 3 x 3 of the resnets, 1 x 1 before the transformers."""
    return {path: layer for path, layer in unet.named_modules() if path.endswith(("conv1", "conv2", "proj_in"))}


@functools.cache
def flops(way: str, family: str, pixels: int, trained=targets) -> tuple[int, int]:
    """(of forward and backward, of the low-rank products) of a step. Clipping and the optimizer multiply no matrices, so they do not count.

    Of N rows, a layer's LoRA multiplies down and up in the forward pass, the gradients of both and of what is between them in the backward pass, and the gradient of
    the input where something before it is trained.
    """
    (unet, batch), low = make(family, pixels), []

    def look(layer, args, result) -> None:
        wide, out = layer.weight[0].numel(), layer.weight.shape[0]  # a convolution's row is a pixel that it makes, out of all that it looks at
        low.append(2 * (result.numel() // out) * RANK * ((2 + args[0].requires_grad) * wide + 3 * out))

    with mock.patch("ways.targets", trained), WAYS[way](unet, batch, RANK) as step:
        marks = [layer.register_forward_hook(look) for layer in trained(unet).values()]
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            step()
        for mark in marks:
            mark.remove()
    return counter.get_total_flops(), sum(low)


@functools.cache
def forward(family: str, pixels: int) -> int:
    """FLOPs of the frozen model's forward pass."""
    unet, batch = make(family, pixels)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        batch.loss(unet)
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "pixels"), [("sd1", 512), pytest.param("sdxl", 1024, marks=pytest.mark.long)])
def test_the_extra_flops_are_the_low_rank_products_and_nothing_else(family, pixels):
    (bare, _), (lora, low) = flops("floor", family, pixels), flops("ours", family, pixels)
    assert 1.8 * forward(family, pixels) < bare < 2.2 * forward(family, pixels)  # no gradients of frozen weights; attention's backward is 2.5 forwards
    assert lora - bare == low and 1 < lora / bare <= 1.02


def test_of_convolutions_too():
    (bare, _), (lora, low) = flops("floor", "sd1", 512, convolutions), flops("ours", "sd1", 512, convolutions)
    assert lora - bare == low and 1 < lora / bare <= 1.02


def computed_again(unet: UNet2DConditionModel, batch: Batch, family: str) -> int:
    """FLOPs of what checkpointing computes a second time, told by a run without it: of each transformer block and resnet all but the last layer's output, which
    nothing in the block reads. diffusers computes the middle's first resnet once, and a resnet before all that is trained keeps nothing, so needs nothing.
    """
    blocks, names, leaves = FAMILIES[family]().regions(models_of(unet, family), "unet"), {module: name for name, module in unet.named_modules()}, []
    learning = {}
    marks = [block.register_forward_hook(lambda block, args, out: learning.update({block: out.requires_grad})) for block in blocks]
    marks += [layer.register_forward_hook(lambda layer, args, out: leaves.append((layer, out))) for layer in names if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        batch.loss(unet)
    for mark in marks:
        mark.remove()
    counts = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    total = 0
    for block in blocks:
        inside = f"{names[block]}."
        if learning[block] and inside != "mid_block.resnets.0.":
            last, out = [pair for pair in leaves if names[pair[0]].startswith(inside)][-1]
            factors = last.weight[0].numel() + RANK * isinstance(getattr(last, "adapter", None), Lora)  # the base's product, and h up^T
            total += counts[f"{type(unet).__name__}.{names[block]}"] - 2 * out.numel() * factors
    return total


@pytest.mark.parametrize("way", ["floor", "ours"])
@pytest.mark.parametrize(("family", "pixels", "share"), [("sd1", 512, 0.74), pytest.param("sdxl", 1024, 0.76, marks=pytest.mark.long)])
def test_checkpointing_computes_each_block_again_but_for_its_last_product(way, family, pixels, share):
    """So less than a forward pass. With a LoRA in the last layer only its rank numbers a row come again: so the layer must keep them before it multiplies."""
    with checkpointing(family, pixels) as (unet, batch), WAYS[way](unet, batch, RANK) as step:
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            step()
        unet.disable_gradient_checkpointing()
        again = computed_again(unet, batch, family)
    assert counter.get_total_flops() - flops(way, family, pixels)[0] == again and abs(again / forward(family, pixels) - share) < 0.02


Storages = dict[int, torch.UntypedStorage]


def kept(way: str, unet, batch: Batch, trained=targets) -> tuple[Storages, Storages, int]:
    """What a step's forward keeps for its backward beside the model's parameters, the inputs of what would be trained (distinct storages), and how many rows all
    those layers get."""
    held, inputs, rows = {}, {}, []

    def note(place: Storages, tensor: torch.Tensor) -> torch.Tensor:
        place[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def look(layer, args, result) -> None:
        note(inputs, args[0])
        rows.append(result.numel() // layer.weight.shape[0])

    with mock.patch("ways.targets", trained), WAYS[way](unet, batch, RANK) as step:
        own = {tensor.untyped_storage()._cdata for tensor in (*unet.parameters(), *unet.buffers())}
        marks = [layer.register_forward_hook(look) for layer in trained(unet).values()]
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
    unet, batch = deepcopy(unet).to(dtype), replace(batch, noisy=batch.noisy.to(dtype), hidden=batch.hidden.to(dtype))
    (bare, _, _), (ours, inputs, rows), layers = kept("floor", unet, batch), kept("ours", unet, batch), targets(unet).values()
    copy = 2 * sum(64 * -(-RANK * width // 64) for layer in layers for width in layer.weight.shape) if dtype == torch.bfloat16 else 0
    assert (len(layers), len(inputs)) == (160, 16 * 6 + 1)
    assert len(ours) == len(bare) + len(inputs) + len(layers) + (copy > 0)
    assert size(ours) == size(bare) + size(inputs) + rows * RANK * dtype.itemsize + copy


def test_a_lora_of_a_convolution_keeps_rank_numbers_a_pixel_and_nothing_else():
    """Pixels are what it makes. Its input the floor keeps too, for the norm before it."""
    made = make("sd1", 512)
    (bare, _, _), (ours, inputs, rows) = kept("floor", *made, convolutions), kept("ours", *made, convolutions)
    first = next(iter(inputs.values()))  # nothing before the first of them learns, so the floor has not kept it
    assert len(ours) == len(bare) + len(convolutions(made[0])) + 1
    assert size(ours) == size(bare) + rows * RANK * 4 + first.nbytes()


class Written(TorchDispatchMode):
    """Counts the bytes of what operations make, views left out."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, made = ([tensor for tensor in tree_leaves(part) if isinstance(tensor, torch.Tensor)] for part in ((args, kwargs), out))
        places = {tensor.untyped_storage()._cdata for tensor in read}
        self.bytes += sum(tensor.nbytes for tensor in made if tensor.untyped_storage()._cdata not in places)
        return out


def test_a_step_writes_and_keeps_less_than_pefts():
    """On a device that waits for its memory, a step takes as long as that."""
    written, held = {}, {}
    unet, batch = make("sd1", 512)
    for way in ("floor", "ours", "loop"):
        storages = {}
        with WAYS[way](unet, batch, RANK) as step:
            own = {tensor.untyped_storage()._cdata for tensor in (*unet.parameters(), *unet.buffers())}

            def keep(tensor, storages=storages):
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Written() as counter:
                step()
        written[way], held[way] = counter.bytes, size({key: storage for key, storage in storages.items() if key not in own})
    assert written["floor"] < written["ours"] < written["floor"] + 0.1 * (written["loop"] - written["floor"])
    assert held["floor"] < held["ours"] <= held["loop"]


def test_checkpointing_keeps_no_more_with_a_lora_than_without():
    with checkpointing("sd1", 512) as checkpointed:
        bare, ours = kept("floor", *checkpointed)[0], kept("ours", *checkpointed)[0]
    assert (len(ours), size(ours)) == (len(bare), size(bare))


def test_no_frozen_parameter_gets_a_gradient():
    unet, batch = make("sd1", 64)
    with WAYS["ours"](unet, batch, RANK) as step:
        step()
        frozen = [name for name, p in unet.named_parameters() if ".adapter." not in name]
        assert frozen and not [name for name, p in unet.named_parameters() if name in frozen and (p.grad is not None or p.requires_grad)]
        assert all(p.grad is not None for name, p in unet.named_parameters() if ".adapter." in name)


class Costed(Run):
    """Counts the FLOPs of its steps, and looks at who has a gradient after the last one."""

    def _build_trainer(self):
        trainer = super()._build_trainer()
        step, self.flops = trainer._step, []

        def counted(*args):
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
                step(*args)
            self.flops.append(counter.get_total_flops())
            self.graded = {(part, name) for part, module in self.models.modules.items() for name, p in module.named_parameters() if p.grad is not None}

        trainer._step = counted
        return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_a_real_run_costs_what_the_step_that_is_measured_here_costs(tmp_path, monkeypatch, tiny_sd1, checkpointing):
    """To the FLOP, and gives nothing but the LoRA's weights a gradient: so what holds above holds for a run."""
    monkeypatch.chdir(tmp_path)
    run_help.images(tmp_path / "images", count=2, sizes=((64, 64),))
    Path("cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
    layers = [f"re:.*attentions.*{name}$" for name in TARGETS]
    words = ["exp_dir=run", f"model.gradient_checkpointing={checkpointing}", f"lora_unet=[{{lr: 1e-3, rank: {RANK}, layers: {layers}}}]"]
    run = Costed(load("cfg.yaml", words, RunConfig), Parallel())
    assert run.train() == 0
    unet = run.models.unet
    adapters = {("unet", name) for name, _ in unet.named_parameters() if ".adapter." in name}
    assert len(adapters) == 2 * 160 and run.graded == adapters
    detach(unet)
    latents = torch.randn(2, 4, 8, 8)
    batch = Batch(latents, torch.ones(2, dtype=torch.int64), torch.randn(2, 77, unet.config.cross_attention_dim), latents)
    with WAYS["ours"](unet, batch, RANK) as step, FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        step()
    assert run.flops == [counter.get_total_flops()] * 2

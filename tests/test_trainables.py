"""LoRA groups from config to parameters: ranks, alphas, starting points, names in files."""

import pytest
import torch
from tiny import make_text_encoder, make_unet

from hcpdiff.config.schema import LoraGroup
from hcpdiff.errors import CheckpointError
from hcpdiff.families.base import Models
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.lora_tensors import LoraTensors
from hcpdiff.trainables.lora import LoraTrainable

FAMILY = StableDiffusion()


def make(component: int, *groups: LoraGroup, seed: int = 0) -> LoraTrainable:
    torch.manual_seed(0)
    models = Models(FAMILY, None, "tiny", {"unet": make_unet(), "text_encoder": make_text_encoder()}, {}, {})
    trainable = LoraTrainable(FAMILY.components[component], list(groups), FAMILY.components[component].config_key)
    trainable.attach(models, seed)
    return trainable


def group(*layers: str, **keys) -> LoraGroup:
    return LoraGroup(**{"lr": 1e-3, "layers": list(layers), **keys})


def test_groups_have_their_own_rank_alpha_dropout_and_rate():
    trainable = make(0, group(r"re:.*attn1$", rank=2, alpha=1, dropout=0.1), group(r"re:.*attn2$", rank=5, lr=2e-3))
    first, second = ([lora for path, lora in trainable.adapters.items() if key in path] for key in ("attn1", "attn2"))
    assert {(lora.rank, lora.scale, lora.dropout) for lora in first} == {(2, 0.5, 0.1)} and {(lora.rank, lora.scale, lora.dropout) for lora in second} == {(5, 1.0, 0.0)}
    assert [(g.name, g.lr, len(g.parameters)) for g in trainable.param_groups()] == [("unet-0", 1e-3, 128), ("unet-1", 2e-3, 128)]


@pytest.mark.parametrize("rank,expected", [(0.25, {8, 16}), (4.0, {4}), (0.001, {1})])
def test_a_rank_below_one_is_a_share_of_the_output_width(rank, expected):
    trainable = make(0, group(r"re:.*attn1\.to_q$", rank=rank))
    assert {lora.rank for lora in trainable.adapters.values()} == expected


def test_the_start_is_a_function_of_the_seed_and_changes_nothing():
    first, same, other = (make(0, group("mid_block"), seed=seed).export() for seed in (1, 1, 2))
    path = next(iter(first))
    assert torch.equal(first[path].down, same[path].down) and not torch.equal(first[path].down, other[path].down)
    assert all(tensors.up.abs().sum() == 0 and tensors.down.abs().max() <= tensors.down[0].numel() ** -0.5 for tensors in first.values())


def test_text_encoder_files_carry_the_prefix():
    assert all(path.startswith("text_model.encoder.layers.") for path in make(1, group("re:.*self_attn$")).export())


def test_a_starting_point_keeps_its_effect_whatever_its_alpha():
    trainable = make(0, group("mid_block", rank=2, alpha=1))
    file = {path: LoraTensors(torch.randn(t.down.shape), torch.randn(t.up.shape), 3.0) for path, t in trainable.export().items()}
    trainable.load(file, "x.safetensors")
    for path, tensors in trainable.export().items():
        torch.testing.assert_close(tensors.delta(), file[path].delta(), rtol=1e-5, atol=1e-5)
        assert tensors.alpha == 1


def test_a_starting_point_that_does_not_fit_is_refused_with_every_reason():
    trainable = make(0, group(r"re:.*attn1\.to_q$", rank=2))
    good = trainable.export()
    path = next(iter(good))
    wrong = {path: LoraTensors(torch.randn(3, 32), torch.randn(32, 3), 3.0), "mid_block.resnets.0.conv1": good[path]}
    with pytest.raises(CheckpointError) as caught:
        trainable.load(wrong, "x.safetensors")
    assert "rank 3" in str(caught.value) and "gives 2" in str(caught.value) and "mid_block.resnets.0.conv1 is not among the layers" in str(caught.value)
    for rank, way in ((3, True), (1, False)):  # a file can be cut to a lower rank, not made of a higher one
        with pytest.raises(CheckpointError) as caught:
            trainable.load({path: LoraTensors(torch.randn(rank, 32), torch.randn(32, rank), 3.0) for path in good}, "x.safetensors")
        [fault] = caught.value.faults
        assert f"16 layers have rank {rank}, such as {path}, and lora_unet[0].rank gives 2" in fault and ("lora_resize" in fault) == way
    (note,) = trainable.load({path: good[path]}, "x.safetensors")
    assert "1 layers loaded, 15 layers of lora_unet are not in it" in note

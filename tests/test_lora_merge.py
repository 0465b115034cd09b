"""lora_algebra and lora_merge: sums and approximations against dense float64 ones, peft's own way of adding adapters up, and the command as users run it."""

import json

import pytest
import torch
from lora_help import SD1, SDXL, command, fails, random_lora, sd1_layers, webui_file
from tiny import make_unet

from hcpdiff.checkpoint.convert import faults_of
from hcpdiff.checkpoint.export import write_peft
from hcpdiff.checkpoint.format import load_lora
from hcpdiff.checkpoint.io import read_tensors, save_tensors
from hcpdiff.lora_tensors import LoraTensors
from hcpdiff.lora_tools.algebra import Limit, concatenated, nearest, norm, truncated
from hcpdiff.tools import lora_merge

SHAPES = [(6, 5), (5, 9), (8, 4, 1, 1), (4, 6, 3, 3)]
D = torch.float64


def dense_sum(terms):
    return sum(weight * lora.delta(D) for lora, weight in terms)


# --- the algebra against dense matrices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.8, -0.5), (-2.0, 0.0), (1e-3, 30.0)], ids=str)
def test_concatenation_is_the_weighted_sum(shape, weights):
    terms = [(random_lora(shape, 1, rank=2, alpha=3.0), weights[0]), (random_lora(shape, 2, rank=4, alpha=1.0, dtype=torch.float16), weights[1])]
    found, wanted = concatenated(terms), dense_sum(terms)
    assert (found.delta(D) - wanted).norm() <= 2e-7 * wanted.norm()
    assert found.rank == sum(lora.rank for lora, weight in terms if weight) and found.scale > 0
    assert found.down.dim() == len(shape) and found.delta().shape == shape


def test_concatenation_keeps_the_bits_of_lora_with_one_scale():
    first, second = random_lora((6, 5), 1, rank=2, alpha=1.0), random_lora((6, 5), 2, rank=4, alpha=2.0)
    found = concatenated([(first, 1.0), (second, -1.0)])
    assert torch.equal(found.down, torch.cat([first.down, second.down])) and torch.equal(found.up, torch.cat([first.up, -second.up], 1))
    assert found.scale == 0.5


def test_a_matrix_and_a_1x1_convolution_of_one_layer_add_up():
    conv, flat = random_lora((8, 4, 1, 1), 1), random_lora((8, 4), 2)
    found = concatenated([(flat, 1.0), (conv, 0.5)])
    assert found.down.shape == (4, 4, 1, 1) and found.up.shape == (8, 4, 1, 1)
    assert torch.allclose(found.delta(D).flatten(1), flat.delta(D) + 0.5 * conv.delta(D).flatten(1), atol=1e-8)


def test_terms_without_effect_leave_nothing():
    assert concatenated([(random_lora((6, 5), 1), 0.0), (random_lora((6, 5), 1, alpha=0.0), 2.0)]) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truncation_is_the_best_of_its_rank(shape):
    """Against the dense SVD: the residual is the root of the squares of the singular values that were left out (Eckart and Young)."""
    lora = random_lora(shape, 3, rank=4, alpha=2.0)
    sigma = torch.linalg.svdvals(lora.delta(D).flatten(1))
    for rank in (1, 2, 3):
        for found in (truncated(lora, Limit(rank)), nearest(lora.delta(D), Limit(rank))):
            assert found.rank == rank
            left = float((found.delta(D) - lora.delta(D)).norm())
            assert left == pytest.approx(float(sigma[rank:].norm()), rel=1e-5)
    assert truncated(lora, Limit(2)).scale == pytest.approx(lora.scale)


def test_a_rank_that_is_high_enough_loses_only_rounding():
    twice = concatenated([(random_lora((9, 7), 4, rank=3), 1.0)] * 2)
    found = truncated(twice, Limit(64))
    assert twice.rank == 6 and found.rank == 3  # the second copy adds no direction
    assert (found.delta(D) - twice.delta(D)).norm() <= 3e-7 * twice.delta(D).norm()


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_keeps_the_fewest_that_hold_the_share(energy):
    lora = random_lora((12, 10), 5, rank=6)
    squares = torch.linalg.svdvals(lora.delta(D)).square()
    rank = truncated(lora, Limit(energy=energy)).rank
    assert squares[:rank].sum() >= (energy - 1e-9) * squares.sum()
    assert rank == 6 if energy == 1 else squares[:rank - 1].sum() < energy * squares.sum()
    assert truncated(lora, Limit(2, energy)).rank <= 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_from_factors_is_that_of_the_delta(shape):
    lora = random_lora(shape, 6, rank=3, alpha=-2.0)
    assert norm(lora) == pytest.approx(float(lora.delta(D).norm()), rel=1e-6)


def test_merging_is_what_peft_makes_of_two_adapters():
    """peft's add_weighted_adapter(combination_type="cat") on a tiny UNet, weight by weight."""
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(make_unet("sd1"), peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights=False), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False))
    layers = {name.removeprefix("base_model.model."): module for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}
    pairs = {name: [LoraTensors(m.lora_A[a].weight.detach(), m.lora_B[a].weight.detach(), alpha) for a, alpha in (("one", 2.0), ("two", 6.0))] for name, m in layers.items()}
    model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", combination_type="cat")
    assert len(pairs) == 54
    for name, (one, two) in pairs.items():
        theirs = layers[name].get_delta_weight("both").detach()
        assert torch.allclose(concatenated([(one, 0.7), (two, 0.4)]).delta(), theirs, atol=1e-6), name


# --- the command ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def merge(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *args: command(lora_merge, capsys, *args)


def test_two_lora_become_one_with_a_weight_for_each_and_for_text(merge):
    one, two = sd1_layers(1, alpha=2.0), sd1_layers(2, text=True, rank=3)
    webui_file("one.safetensors", one)
    webui_file("two.safetensors", two)
    code, out, err = merge("--lora_path", "one.safetensors", "two.safetensors", "--alpha", "0.5", "-0.7", "--alpha_TE", "1", "2", "--dump_path", "new/both.safetensors")
    assert code == 0, err
    found = load_lora("new/both.safetensors")
    for component, layers in {**one, **two}.items():
        for path in layers:
            weights = (0.5, -0.7) if component == "unet" else (1.0, 2.0)
            terms = [(source[component][path], weight) for source, weight in zip((one, two), weights) if path in source.get(component, {})]
            assert torch.allclose(found.layers[component][path].delta(D), dense_sum(terms), atol=1e-7), path
    assert "residual" in out and "checked by reading it back: 24 layers" in out
    made = json.loads(found.metadata["hcpdiff.made_from"])
    assert [(entry["file"], entry["weight"], entry["weight_TE"]) for entry in made] == [("one.safetensors", 0.5, 1.0), ("two.safetensors", -0.7, 2.0)]
    assert found.metadata["ss_base_model_version"] == "sd_v1" and found.metadata["ss_output_name"] == "both"


def test_half_precision_stays_where_it_is_exact_and_becomes_float32_where_not(merge):
    webui_file("one.safetensors", sd1_layers(1, dtype=torch.float16))
    webui_file("two.safetensors", sd1_layers(2, dtype=torch.float16))
    for weight, dtype in (("-0.5", torch.float16), ("0.3", torch.float32)):
        assert merge("--lora_path", "one.safetensors", "two.safetensors", "--alpha", "1", weight, "--dump_path", "both")[0] == 0
        tensors, _ = read_tensors("both.safetensors")
        assert {tensor.dtype for key, tensor in tensors.items() if "lora_" in key.split(".", 1)[1]} == {dtype}
    assert merge("--lora_path", "one.safetensors", "two.safetensors", "--alpha", "1", "0.3", "--save_dtype", "bf16", "--dump_path", "both")[0] == 0


def test_the_printed_residual_is_that_of_the_dense_difference(merge):
    one, two = sd1_layers(1), sd1_layers(2)
    webui_file("one.safetensors", one)
    webui_file("two.safetensors", two)
    code, out, _ = merge("--lora_path", "one.safetensors", "two.safetensors", "--rank", "2", "--save_dtype", "fp16", "--dump_path", "both.safetensors")
    found, wanted = load_lora("both.safetensors").layers["unet"], {path: one["unet"][path].delta(D) + two["unet"][path].delta(D) for path in one["unet"]}
    lost = sum((found[path].delta(D) - delta).norm() ** 2 for path, delta in wanted.items()) / sum(delta.norm() ** 2 for delta in wanted.values())
    assert code == 0 and f"{100 * float(lost) ** 0.5:.3g} %" in out and {lora.rank for lora in found.values()} == {2}


def test_a_folder_of_peft_stands_for_its_parts(merge, tmp_path):
    write_peft(tmp_path / "p", sd1_layers(1, text=True), SD1, "sd_v1", name="p", kept={})
    code, out, _ = merge("--lora_path", "p", "--dump_path", "x.safetensors")
    assert code == 0 and "p: a PEFT folder, unet/adapter_model.safetensors, text_encoder/adapter_model.safetensors" in out
    assert faults_of(load_lora("x.safetensors").layers, sd1_layers(1, text=True)) == []


def test_mistakes_are_named_together_and_nothing_is_written(merge, tmp_path):
    webui_file("one.safetensors", sd1_layers(1))
    webui_file("xl.safetensors", {"unet": {path: random_lora((640, 2048), 1) for path in ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",)}})
    webui_file("mine.safetensors", sd1_layers(3))
    tensors, _ = read_tensors(webui_file("unsaid.safetensors", {"unet": {"down_blocks.3.resnets.0.conv1": random_lora((64, 64, 3, 3), 1)}}))
    save_tensors("unsaid.safetensors", tensors, {})  # SD1 or SD2, nothing says which
    webui_file("true_xl.safetensors", {"unet": {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": random_lora((640, 2048), 1)}}, SDXL, "sdxl_base_v1-0")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    fails(merge(), "--lora_path is missing", "--dump_path is missing")
    fails(merge("--lora_path", "one.safetensors", "--alpha", "1", "2", "nan", "--rank", "0", "--energy", "1.5", "--metadata", "x=y", "--metadata", "modelspec.hash_sha256=0x12", "--dump_path", "x.ckpt"),
          "7 faults", "modelspec.hash_sha256: hashes are computed from the file", "3 numbers for 1 LoRA", "nan", "--rank 0", "--energy 1.5", "is a pickle", "--metadata 'x=y'")
    fails(merge("--lora_path", "on.safetensors", "--dump_path", "x"), "does not exist", "one.safetensors")
    fails(merge("--lora_path", "one.safetensors", "xl.safetensors", "--dump_path", "x"), "for different base models")
    fails(merge("--lora_path", "true_xl.safetensors", "unsaid.safetensors", "--dump_path", "x"), "for different base models", "has no unet down_blocks.3.resnets.0.conv1")
    fails(merge("--lora_path", "one.safetensors", "--alpha", "0", "--dump_path", "x"), "nothing is left")
    fails(merge("--lora_path", "one.safetensors", "--dump_path", "one.safetensors", "--overwrite"), "is a file that is read")
    fails(merge("--lora_path", "one.safetensors", "--dump_path", "mine.safetensors"), "exists and was not made by this command", "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert merge("--lora_path", "one.safetensors", "--dump_path", "mine.safetensors", "--overwrite")[0] == 0
    first = (tmp_path / "mine.safetensors").read_bytes()
    assert merge("--lora_path", "one.safetensors", "--dump_path", "mine.safetensors")[0] == 0 and (tmp_path / "mine.safetensors").read_bytes() == first

"""Our LoRA files, and every other spelling, as they are read; and what is refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcpdiff.checkpoint.format import META_COMPONENT, META_FORMAT, load_lora, save_lora
from hcpdiff.checkpoint.io import read_tensors, save_tensors
from hcpdiff.checkpoint.lora_parse import parse
from hcpdiff.errors import CheckpointError
from hcpdiff.lora_tensors import LoraTensors

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
TE_Q = "text_model.encoder.layers.0.self_attn.q_proj"
FC1 = "text_model.encoder.layers.1.mlp.fc1"
DOWN, UP = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), torch.randn(5, 2, generator=torch.Generator().manual_seed(2))


def lora(alpha=4.0, dtype=torch.float32):
    return LoraTensors(DOWN.to(dtype), UP.to(dtype), alpha)


def write(path, tensors, metadata=None):
    save_tensors(path, tensors, metadata or {})
    return path


def test_our_file_comes_back_as_it_was(tmp_path):
    layers = {Q: lora(), OUT: lora(0.1, torch.bfloat16)}
    save_lora(tmp_path / "unet-1.safetensors", layers, {"component": "unet", "step": "1"})
    file = load_lora(tmp_path / "unet-1.safetensors")
    assert file.spelling == "hcpdiff" and set(file.layers) == {"unet"} and file.count == 2
    for path, expected in layers.items():
        got = file.layers["unet"][path]
        assert torch.equal(got.down, expected.down) and torch.equal(got.up, expected.up) and got.alpha == pytest.approx(expected.alpha, rel=1e-7)
    tensors, metadata = read_tensors(tmp_path / "unet-1.safetensors")
    assert set(tensors) == {f"{path}.{part}" for path in layers for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert metadata == {META_FORMAT: "1", META_COMPONENT: "unet", "hcpdiff.step": "1"}


def test_factors_may_be_stored_in_half_precision_with_alpha_kept(tmp_path):
    save_lora(tmp_path / "a", {Q: lora(1 / 3)}, {"component": "unet"}, dtype=torch.bfloat16)
    tensors, _ = read_tensors(tmp_path / "a")
    assert tensors[f"{Q}.lora_down.weight"].dtype == torch.bfloat16 and tensors[f"{Q}.alpha"].dtype == torch.float32


@pytest.mark.parametrize("path", [TE_Q, TE_Q.removeprefix("text_model.")])
def test_text_encoder_paths_are_stored_with_text_model_whatever_transformers_calls_them(tmp_path, path):
    save_lora(tmp_path / "a", {path: lora()}, {"component": "text_encoder"})
    assert f"{TE_Q}.alpha" in read_tensors(tmp_path / "a")[0]
    assert list(load_lora(tmp_path / "a").layers["text_encoder"]) == [TE_Q]


def test_the_second_text_encoder_is_known_by_the_header(tmp_path):
    save_lora(tmp_path / "a", {TE_Q: lora()}, {"component": "text_encoder_2"})
    assert set(load_lora(tmp_path / "a").layers) == {"text_encoder_2"}


UNET_SPELLINGS = {
    "webui": f"lora_unet_{Q.replace('.', '_')}.lora_{{}}.weight",
    "webui-ldm": "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_{}.weight",
    "lycoris": f"lycoris_{Q.replace('.', '_')}.lora_{{}}.weight",
    "hcpdiff": f"{Q}.lora_{{}}.weight",
    "peft": (f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"),
    "peft default": (f"base_model.model.{Q}.lora_A.default.weight", f"base_model.model.{Q}.lora_B.default.weight"),
    "peft diffusers": (f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight"),
    "old-diffusers processor": f"unet.{Q.replace('attn1.', 'attn1.processor.')}_lora.{{}}.weight",
    "old-diffusers attn_procs": f"{Q.replace('attn1.', 'attn1.processor.')}_lora.{{}}.weight",
    "old-diffusers lora": f"unet.{Q}.lora.{{}}.weight",
    "old-diffusers linear": f"unet.{Q}.lora_linear_layer.{{}}.weight",
    "ancestor": f"lora:{Q}.___.layer.W_{{}}",
    "ancestor old": f"lora:{Q}.___.layer.lora_{{}}.weight",
    "ancestor plugin": f"plugin:{Q}.___.layer.W_{{}}",
    "ancestor ema": f"lora_ema:{Q}.___.layer.W_{{}}",
    "ancestor 2.6": f"base:denoiser.{Q}.___.layer.W_{{}}",
}
TEXT_SPELLINGS = {
    "webui": "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
    "webui te1": "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
    "webui flat": "lora_te_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
    "lycoris": "lycoris_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
    "hcpdiff": f"{TE_Q}.lora_{{}}.weight",
    "hcpdiff flat": "encoder.layers.0.self_attn.q_proj.lora_{}.weight",
    "peft": (f"base_model.model.{TE_Q}.lora_A.weight", f"base_model.model.{TE_Q}.lora_B.weight"),
    "peft flat": ("base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "base_model.model.encoder.layers.0.self_attn.q_proj.lora_B.weight"),
    "peft diffusers": (f"text_encoder.{TE_Q}.lora_A.weight", f"text_encoder.{TE_Q}.lora_B.weight"),
    "old-diffusers": "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.{}.weight",
    "old-diffusers linear": f"text_encoder.{TE_Q}.lora_linear_layer.{{}}.weight",
    "ancestor": f"lora:{TE_Q}.___.layer.W_{{}}",
    "ancestor 2.6": f"base:TE.{TE_Q}.___.layer.W_{{}}",
}


def pair(spelling):
    return spelling if isinstance(spelling, tuple) else (spelling.format("down"), spelling.format("up"))


@pytest.mark.parametrize(("component", "path", "name"), [("unet", Q, name) for name in UNET_SPELLINGS] + [("text_encoder", TE_Q, name) for name in TEXT_SPELLINGS])
def test_every_spelling_is_read_as_the_same_layer_of_scale_one_without_alpha(tmp_path, component, path, name):
    down, up = pair((UNET_SPELLINGS if component == "unet" else TEXT_SPELLINGS)[name])
    file = load_lora(write(tmp_path / "a", {down: DOWN, up: UP}))
    assert file.spelling == name.split()[0]
    assert {c: list(layers) for c, layers in file.layers.items()} == {component: [path]}
    got = file.layers[component][path]
    assert torch.equal(got.down, DOWN) and torch.equal(got.up, UP) and got.scale == 1


@pytest.mark.parametrize(("down", "path"), [
    (f"unet.{OUT.removesuffix('.0').replace('attn1.', 'attn1.processor.')}_lora.down.weight", OUT),
    ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight", TE_Q.replace("q_proj", "out_proj")),
    ("lora_te2_text_model_encoder_layers_1_mlp_fc1.lora_down.weight", FC1),
    ("lora:clip_bigG.text_model.encoder.layers.1.mlp.fc1.___.layer.W_down", FC1)])
def test_names_that_other_programs_shorten_are_found(tmp_path, down, path):
    up = down.replace("lora_down", "lora_up").replace("W_down", "W_up").replace("_lora.down", "_lora.up")
    file = load_lora(write(tmp_path / "a", {down: DOWN, up: UP}))
    component = "unet" if path == OUT else "text_encoder_2" if path == FC1 else "text_encoder"
    assert {c: list(layers) for c, layers in file.layers.items()} == {component: [path]}


def test_alpha_of_old_diffusers_files_belongs_to_its_layer(tmp_path):
    base = f"unet.{Q.replace('attn1.', 'attn1.processor.')}_lora"
    file = load_lora(write(tmp_path / "a", {f"{base}.down.weight": DOWN, f"{base}.up.weight": UP, f"{base}.alpha": torch.tensor(1.0)}))
    assert {path: lora.scale for path, lora in file.layers["unet"].items()} == {Q: 0.5}


def test_alpha_of_webui_is_divided_by_rank_and_the_ancestors_already_is(tmp_path):
    webui = f"lora_unet_{Q.replace('.', '_')}"
    file = load_lora(write(tmp_path / "a", {f"{webui}.lora_down.weight": DOWN, f"{webui}.lora_up.weight": UP, f"{webui}.alpha": torch.tensor(1.0)}))
    assert file.layers["unet"][Q].scale == 0.5
    old = f"lora:{Q}.___"
    file = load_lora(write(tmp_path / "b", {f"{old}.layer.W_down": DOWN, f"{old}.layer.W_up": UP, f"{old}.alpha": torch.tensor(0.25)}))
    assert file.layers["unet"][Q].scale == 0.25 and file.layers["unet"][Q].alpha == 0.5


def test_averaged_copies_of_the_ancestor_are_left_out_and_said(tmp_path):
    keys = {f"{group}:{Q}.___.layer.W_{part}": t for group in ("lora", "lora_ema") for part, t in (("down", DOWN if group == "lora" else DOWN + 1), ("up", UP))}
    file = load_lora(write(tmp_path / "a", keys))
    assert torch.equal(file.layers["unet"][Q].down, DOWN) and "EMA" in file.notices[0]


def peft_file(folder, config, metadata=None, name="adapter_model.safetensors"):
    path = write(folder / name, {f"base_model.model.{Q}.lora_A.weight": DOWN, f"base_model.model.{Q}.lora_B.weight": UP}, metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(("config", "scale"), [
    ({"r": 2, "lora_alpha": 3}, 1.5), ({"r": 2, "lora_alpha": 3, "use_rslora": True}, 3 / 2**0.5),
    ({"r": 8, "lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {Q: 5}}, 2.5), ({"r": 8, "lora_alpha": 4, "alpha_pattern": {"to_k": 5}}, 0.5)])
def test_alpha_of_peft_comes_from_its_config(tmp_path, config, scale):
    file = load_lora(peft_file(tmp_path, config))
    assert file.layers["unet"][Q].scale == pytest.approx(scale, rel=1e-12) and "adapter_config.json" in file.notices[0]
    packed = {f"unet.{key}": value for key, value in config.items()}
    file = load_lora(peft_file(tmp_path, None, {"lora_adapter_metadata": json.dumps(packed)}, "other.safetensors"))
    assert file.layers["unet"][Q].scale == pytest.approx(scale, rel=1e-12)


def test_peft_without_a_config_is_taken_at_scale_one_and_said(tmp_path):
    assert "scale 1" in load_lora(peft_file(tmp_path, None)).notices[0]


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("[]", "not a map"), ('{"use_dora": true}', "DoRA"),
                                              ('{"r": 2, "lora_alpha": -1}', "not two positive"), ('{"r": 2, "lora_alpha": 1e999}', "not two positive"),
                                              ('{"r": "2", "lora_alpha": 1}', "not two positive"), ('{"r": 2, "lora_alpha": 2, "alpha_pattern": {"(a+)+$": 1}}', "plain layer names")])
def test_a_peft_config_that_is_not_understood_is_refused(tmp_path, text, words):
    with pytest.raises(CheckpointError, match=words):
        load_lora(peft_file(tmp_path, None, {"lora_adapter_metadata": text}, "other.safetensors"))


def test_tucker_factors_are_folded_exactly(tmp_path):
    base = "lora_unet_down_blocks_0_resnets_0_conv1"
    g = torch.Generator().manual_seed(3)
    down, mid, up = torch.randn(3, 6, 1, 1, generator=g), torch.randn(3, 3, 3, 3, generator=g), torch.randn(5, 3, 1, 1, generator=g)
    file = load_lora(write(tmp_path / "a", {f"{base}.lora_down.weight": down, f"{base}.lora_mid.weight": mid, f"{base}.lora_up.weight": up,
                                            f"{base}.alpha": torch.tensor(1.5)}))
    x = torch.randn(1, 6, 8, 8, generator=g)
    expected = 0.5 * torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    got = torch.conv2d(x, file.layers["unet"]["down_blocks.0.resnets.0.conv1"].delta(), padding=1)
    assert torch.allclose(got, expected, atol=1e-5)


W = "lora_unet_mid_block_attentions_0_proj_in"
GOOD = {f"{W}.lora_down.weight": DOWN, f"{W}.lora_up.weight": UP}
REFUSED = {
    "DoRA": ({f"{W}.dora_scale": torch.ones(1, 6)}, r"DoRA.*'lora_unet_mid_block_attentions_0_proj_in.dora_scale'"),
    "PEFT's DoRA": ({"base_model.model.a.lora_magnitude_vector.default.weight": torch.ones(5)}, "DoRA"),
    "LoHa": ({f"{W}.hada_w1_a": UP}, "LoHa"), "LoKr": ({f"{W}.lokr_w1": UP}, "LoKr"), "diff": ({f"{W}.diff": UP}, "full difference"),
    "diff_b": ({f"{W}.diff_b": UP}, "full difference"), "OFT": ({f"{W}.oft_blocks": UP}, "OFT"), "GLoRA": ({f"{W}.a1.weight": UP}, "GLoRA"),
    "norm": ({f"{W}.w_norm": UP}, "norm"), "bias": ({f"{W}.lora_up.bias": torch.ones(5)}, "bias"),
    "ancestor's bias": ({f"lora:{Q}.___.layer.bias": torch.ones(5)}, "bias"), "ancestor's weights": ({"base:conv_in.weight": torch.ones(5)}, "full weights"),
    "full model": ({"model.diffusion_model.out.2.weight": UP}, "1 of 3 keys cannot be read .*'model.diffusion_model.out.2.weight'"),
    "unknown name": ({"lora_unet_nope.lora_down.weight": DOWN}, "no layer of Stable Diffusion.*'lora_unet_nope.lora_down.weight'"),
    "other family": ({"lora_transformer_single_blocks_0_linear1.lora_down.weight": DOWN}, "no layer of Stable Diffusion"),
    "half a pair": ({"lora_unet_conv_in.lora_up.weight": UP}, "the down factor is missing: 'lora_unet_conv_in.lora_up.weight'"),
    "only alpha": ({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "missing: 'lora_unet_conv_in.alpha'"),
    "same layer twice": ({"lora_unet_middle_block_1_proj_in.lora_down.weight": DOWN}, "the same part of unet mid_block.attentions.0.proj_in"),
    "ranks": ({"lora_unet_conv_in.lora_down.weight": DOWN, "lora_unet_conv_in.lora_up.weight": UP[:, :1]}, r"do not fit each other, down \(2, 6\) and up \(5, 1\)"),
    "dimensions": ({"lora_unet_conv_in.lora_down.weight": DOWN[0], "lora_unet_conv_in.lora_up.weight": UP}, "do not fit each other"),
    "not finite": ({"lora_unet_conv_in.lora_down.weight": DOWN * float("nan"), "lora_unet_conv_in.lora_up.weight": UP}, "not finite"),
    "infinite alpha": ({f"{W}.alpha": torch.tensor(float("inf"))}, "not finite"), "two alphas": ({f"{W}.alpha": torch.ones(2)}, "alpha is not one number"),
    "empty": ({"lora_unet_conv_in.lora_down.weight": torch.ones(0, 6), "lora_unet_conv_in.lora_up.weight": torch.ones(5, 0)}, "an empty tensor"),
    "integers": ({"lora_unet_conv_in.lora_down.weight": DOWN.to(torch.int8), "lora_unet_conv_in.lora_up.weight": UP}, "stored as int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_is_refused_by_name(tmp_path, case):
    extra, words = REFUSED[case]
    with pytest.raises(CheckpointError, match=words):
        load_lora(write(tmp_path / "a", GOOD | extra))


def test_all_faults_come_at_once(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_lora(write(tmp_path / "a", {f"{W}.dora_scale": UP, "x.hada_w1_a": UP, "lora_unet_conv_in.lora_up.weight": UP}))
    assert len(caught.value.faults) == 3


def test_files_of_a_later_format_and_empty_ones_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="format '2' of hcpdiff; this version reads format 1"):
        load_lora(write(tmp_path / "a", GOOD, {META_FORMAT: "2"}))
    with pytest.raises(CheckpointError, match="component 'unicorn'"):
        load_lora(write(tmp_path / "a", GOOD, {META_COMPONENT: "unicorn"}))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_lora(write(tmp_path / "a", {}))


_stem = st.lists(st.sampled_from(["lora:", "unet", "text_encoder", "base_model", "model", "attn1", "to_q", "processor", "self_attn", "___", "layer", "lora_unet_conv_in",
                                  "lora_te_", "lycoris_", "denoiser", "clip_bigG", ""]), min_size=1, max_size=6).map(".".join)
_end = st.sampled_from([".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".alpha", ".lora_A.x.weight", ".lora_B.weight", "_lora.down.weight", ".W_up", ".W_down", ".bias", ""])
_tensor = st.tuples(st.lists(st.integers(0, 3), max_size=5), st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])).map(lambda t: torch.ones(t[0], dtype=t[1]))


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.tuples(_stem, _end).map("".join), _tensor, max_size=4), st.sampled_from([None, "unet", "text_encoder_2"]), st.text(max_size=20))
def test_no_keys_and_shapes_raise_anything_but_our_error(tmp_path_factory, tensors, component, config):
    try:
        layers, _, _ = parse(tensors, {"lora_adapter_metadata": config}, component, tmp_path_factory.getbasetemp() / "fuzz")
    except CheckpointError as error:
        assert error.faults
    else:
        assert all(lora.delta().isfinite().all() for named in layers.values() for lora in named.values())

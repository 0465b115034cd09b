"""The traps of other people's LoRA formats, where converters fail: what a file must be so that no loader passes over it in silence, and what is read right.

webui is played by `webui_merges`, written here from the facts about its loader: how it names modules, scales, which files it discards whole and which layers it passes over.

| trap | test |
|---|---|
| webui's names of every layer, SDXL by LDM path, `lora_te_` / `lora_te1_` / `lora_te2_` | test_webui_makes_of_a_file_what_the_lora_does |
| `text_model_` in names although transformers 5 has none; diffusers loads such files all the same | test_names_without_text_model_would_be_passed_over_by_webui_alone, test_convert.test_text_encoder_names_carry_text_model_and_never_te1 |
| LDM upsamplers' index, add_embedding: diffusers' names of them mean nothing to webui on SDXL | test_sdxl_layers_that_webui_does_not_know_by_diffusers_names |
| LDM names against the original checkpoints; counts 192 + 72, 192 + 138, 722 + 72 + 192, LoCon + 86 | test_checkpoint_names |
| names with `_` of their own: `_` is never turned into `.` | test_names_are_looked_up_and_not_rewritten |
| scale = alpha / rank of the file; alpha missing: scale 1; alpha 0: no effect | test_alpha_says_the_scale_in_every_form |
| a base with anything but a whole pair discards the whole file | test_every_base_has_a_whole_pair, test_checkpoint_format.test_what_is_no_lora_is_refused_by_name |
| attention of SD2 and of te2 only with q, k, v and out_proj | test_attention_of_open_clip_is_complete, test_convert.test_sd2_attention_is_completed_with_zero_effect_since_webui_wants_all_four |
| convolutions of 1x1 are 4-D (diffusers), Linear 2-D | test_convert.test_projections_are_4d_where_the_layer_is_a_convolution_and_2d_where_it_is_linear |
| fp32, fp16, bf16 load; float64 is not expected; factors of two types | test_factors_have_one_type_that_loaders_know |
| `lora_mid` is rejected by diffusers | test_tucker_goes_out_as_a_plain_locon |
| LoHa, LoKr, GLoRA, OFT, full differences | test_checkpoint_format.test_what_is_no_lora_is_refused_by_name |
| DoRA of either axis, in every spelling | test_dora_is_never_taken_for_a_lora |
| alphas that differ, in diffusers | test_convert_targets.test_diffusers_makes_of_its_file_what_the_lora_does_also_where_alphas_are_mixed |
| an SDXL file without `sdxl_` vanishes from webui's tab | test_webui_files_a_lora_under_its_own_family |
| metadata: all strings, JSON where JSON is read, a float where a float is | test_export.test_each_save_writes_what_was_trained_with_true_metadata, test_metadata_is_text_that_others_read |
| hashes of the final bytes, never copied | test_a_hash_is_that_of_the_file_it_stands_in |
| every spelling on import | test_checkpoint_format.test_every_spelling_is_read_as_the_same_layer_of_scale_one_without_alpha |
| the ancestor stores alpha / rank | test_the_ancestors_scale_reaches_every_target |
"""

import copy
import hashlib
import json
import re

import pytest
import safetensors
import torch
from real_configs import kohya_targets, locon_targets
from test_convert import SD1, SD2, SDXL, merged_by_hand, random_lora, text_targets
from tiny import make_sdxl_unet, make_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hcpdiff.checkpoint.convert import faults_of, find_family, to_webui
from hcpdiff.checkpoint.export import write_diffusers, write_ours, write_peft, write_webui
from hcpdiff.checkpoint.format import load_lora
from hcpdiff.checkpoint.io import read_tensors, save_tensors
from hcpdiff.errors import CheckpointError
from hcpdiff.families.unet_names import text_path
from hcpdiff.lora_tensors import LoraTensors

VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WQ = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


# --- webui, played by hand ------------------------------------------------------------------------------------------------------------------


def ldm_path(path: str) -> str:
    """A UNet's path in the original spelling, by the table of the format: SDXL, whose blocks 0 (down) and 2 (up) have no attention."""
    resnet = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    whole = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    if path in whole:
        return whole[path]
    mid = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path)
    if mid:
        return f"middle_block.{2 * int(mid[2])}.{resnet[mid[3]]}" if mid[1] == "resnets" else f"middle_block.1.{mid[3]}"
    side, block, kind, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", path).groups()
    b, i = int(block), int(number)
    if kind == "downsamplers":
        return f"input_blocks.{3 * b + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * b + 2}.2.conv"
    place = f"input_blocks.{1 + 3 * b + i}" if side == "down" else f"output_blocks.{3 * b + i}"
    return f"{place}.0.{resnet[rest]}" if kind == "resnets" else f"{place}.1.{rest}"


def webui_names(models: dict, family) -> dict[str, tuple[str, str]]:
    """Base of a key -> (component, module path) of these models, as webui numbers them."""
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if family is SDXL else "lora_te", "text_encoder_2": "lora_te2"}
    names = {}
    for component, model in models.items():
        for path, module in model.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                body = path if component != "unet" else ldm_path(path) if family is SDXL else path
                body = body if component == "unet" or body.startswith("text_model.") else f"text_model.{body}"
                names[f"{prefix[component]}_{body.replace('.', '_')}"] = (component, path)
    return names


class Discarded(Exception):
    """webui takes nothing of the file."""


def webui_merges(file, models: dict, family) -> tuple[dict, list[str]]:
    """(models with the file's LoRA in their weights, bases that were passed over)."""
    tensors, names = read_tensors(file)[0], webui_names(models, family)
    found: dict[str, dict] = {}
    for key, tensor in tensors.items():
        base, part = key.split(".", 1)
        found.setdefault(base, {})[part] = tensor
    passed, merged = [base for base in found if base not in names], copy.deepcopy(models)
    for base in [base for base in found if base in names]:
        parts, (component, path) = found[base], names[base]
        if not {"lora_up.weight", "lora_down.weight"} <= parts.keys():
            raise Discarded(base)
        if family.fused and component == family.fused[0] and ".self_attn." in f".{path}":
            parent = base.rsplit("_self_attn_", 1)[0]
            if not all(f"{parent}_self_attn_{name}_proj" in found for name in ("q", "k", "v", "out")):
                passed.append(base)
                continue
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
        weight = merged[component].get_submodule(path).weight
        weight.data += (scale * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return merged, passed


def encoder(kind=CLIPTextModel):
    """A text encoder's layers, with few words: their table would take most of the time."""
    return kind(CLIPTextConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=24))


MODELS = {"sd1": (SD1, lambda: {"unet": make_unet("sd1"), "text_encoder": encoder()}), "sd2": (SD2, lambda: {"unet": make_unet("sd2"), "text_encoder": encoder()}),
          "sdxl": (SDXL, lambda: {"unet": make_sdxl_unet(), "text_encoder": encoder(), "text_encoder_2": encoder(CLIPTextModelWithProjection)})}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """(family, small models of its architecture, LoRA of mixed ranks and alphas on every layer that kohya's networks and LoCon adapt, and on more convolutions)."""
    family, make = MODELS[request.param]
    torch.manual_seed(0)
    models = make()
    return family, models, lora_on(models, family)


def lora_on(models: dict, family) -> dict:
    """LoRA of mixed ranks and alphas on all these layers."""
    layers = {}
    for component, model in models.items():
        more = ["conv_in", "conv_out", "time_embedding.linear_1", *(["add_embedding.linear_1"] if family is SDXL else [])]
        paths = [*kohya_targets(model), *locon_targets(model), *more] if component == "unet" else text_targets(model)
        layers[component] = {path if component == "unet" else text_path(path): random_lora(tuple(model.get_submodule(path).weight.shape), number, rank=1 + number % 3,
                                                                                          alpha=(0.5, 3.0)[number % 2]) for number, path in enumerate(paths)}
    return layers


def same(got: dict, expected: dict) -> bool:
    """Whether models have equal weights, within fp32's rounding."""
    pairs = [(weight, expected[component].get_parameter(key)) for component, model in got.items() for key, weight in model.named_parameters()]
    return all(torch.equal(a, b) or torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_webui_makes_of_a_file_what_the_lora_does(case, tmp_path):
    family, models, layers = case
    write_webui(tmp_path / "w.safetensors", layers, family, VERSIONS[family.name], name="w", kept={})
    merged, passed = webui_merges(tmp_path / "w.safetensors", models, family)
    assert passed == []
    expected = {component: merged_by_hand(copy.deepcopy(model), layers[component]) for component, model in models.items()}
    assert same(merged, expected) and not same(models, expected)


def test_diffusers_makes_of_its_sdxl_file_what_the_lora_does(tiny_sdxl, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    before = {name: copy.deepcopy(getattr(pipe, name)) for name in ("unet", "text_encoder", "text_encoder_2")}
    layers = lora_on(before, SDXL)
    write_diffusers(tmp_path / "pytorch_lora_weights.safetensors", layers, SDXL, VERSIONS["sdxl"], name="x", kept={})
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora(components=list(layers))
    pipe.unload_lora_weights()
    assert same({name: getattr(pipe, name) for name in layers}, {name: merged_by_hand(copy.deepcopy(model), layers[name]) for name, model in before.items()})


def test_names_without_text_model_would_be_passed_over_by_webui_alone(case, tmp_path):
    family, models, layers = case
    tensors = to_webui({"text_encoder": layers["text_encoder"]}, family).tensors
    save_tensors(tmp_path / "flat.safetensors", {key.replace("_text_model_", "_"): tensor for key, tensor in tensors.items()}, {})
    merged, passed = webui_merges(tmp_path / "flat.safetensors", models, family)
    assert len(passed) == len(layers["text_encoder"]) and same(merged, models)  # what the exporter must not write
    assert faults_of(load_lora(tmp_path / "flat.safetensors").layers, {"text_encoder": layers["text_encoder"]}) == []  # and what is read all the same


@pytest.mark.parametrize(("path", "name"), [("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"), ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
                                            ("add_embedding.linear_1", "label_emb_0_0"), ("add_embedding.linear_2", "label_emb_0_2"),
                                            ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"), ("time_embedding.linear_2", "time_embed_2")])
def test_sdxl_layers_that_webui_does_not_know_by_diffusers_names(path, name):
    assert SDXL.webui_base("unet", path) == f"lora_unet_{name}"


def test_names_are_looked_up_and_not_rewritten(case, tmp_path):
    family, _, layers = case
    paths = [path for path in layers["unet"] if re.search(r"time_emb_proj|conv_shortcut|to_out\.0|ff\.net\.0\.proj|transformer_blocks|time_embedding", path)]
    write_webui(tmp_path / "w.safetensors", {"unet": {path: layers["unet"][path] for path in paths}}, family, VERSIONS[family.name], name="w", kept={})
    assert list(load_lora(tmp_path / "w.safetensors").layers["unet"]) != [] and set(load_lora(tmp_path / "w.safetensors").layers["unet"]) == set(paths)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 0.0), (4.0, 1.0), (1.0, 0.25), (-2.0, -0.5), (0.3, 0.075)])
def test_alpha_says_the_scale_in_every_form(tmp_path, alpha, scale):
    lora = random_lora((6, 6), 0, rank=4)
    tensors = {f"{WQ}.lora_down.weight": lora.down, f"{WQ}.lora_up.weight": lora.up} | ({} if alpha is None else {f"{WQ}.alpha": torch.tensor(alpha)})
    save_tensors(tmp_path / "in.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    layers = load_lora(tmp_path / "in.safetensors").layers
    expected = scale * lora.up @ lora.down
    write_webui(tmp_path / "w.safetensors", layers, SD1, "sd_v1", name="w", kept={})
    write_diffusers(tmp_path / "d.safetensors", layers, SD1, "sd_v1", name="d", kept={})
    paths = [tmp_path / "in.safetensors", tmp_path / "w.safetensors", tmp_path / "d.safetensors", *write_peft(tmp_path / "p", layers, SD1, "sd_v1", name="p", kept={}),
             *write_ours(tmp_path / "o", layers, "sd_v1", name="1", kept={})]
    for path in paths:
        assert torch.allclose(load_lora(path).layers["unet"][Q].delta(), expected, rtol=1e-6, atol=1e-8), path
    written = read_tensors(tmp_path / "w.safetensors")[0]
    assert float(written[f"{WQ}.alpha"]) == pytest.approx(4 * scale, rel=1e-6)


def test_every_base_has_a_whole_pair(case):
    family, _, layers = case
    parts: dict[str, set] = {}
    for key in to_webui(layers, family).tensors:
        base, part = key.split(".", 1)
        parts.setdefault(base, set()).add(part)
    assert all(found == {"lora_down.weight", "lora_up.weight", "alpha"} for found in parts.values()) and len(parts) == sum(map(len, layers.values()))


@pytest.mark.parametrize(("family", "component"), [(SD2, "text_encoder"), (SDXL, "text_encoder_2"), (SDXL, "text_encoder"), (SD1, "text_encoder")])
def test_attention_of_open_clip_is_complete(family, component, tmp_path):
    models = {component: encoder(CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel)}
    paths = [path for path in text_targets(models[component]) if path.endswith(("q_proj", "v_proj"))]
    layers = {component: {text_path(path): random_lora(tuple(models[component].get_submodule(path).weight.shape), number) for number, path in enumerate(paths)}}
    lora = write_webui(tmp_path / "w.safetensors", layers, family, VERSIONS[family.name], name="w", kept={})
    assert len(lora.completed) == (len(paths) if component in family.fused else 0)
    merged, passed = webui_merges(tmp_path / "w.safetensors", models, family)
    assert passed == [] and same({component: merged[component]}, {component: merged_by_hand(copy.deepcopy(models[component]), layers[component])})
    save_tensors(tmp_path / "as_it_was.safetensors", {key: t for key, t in lora.tensors.items() if re.search(r"_[qv]_proj\.", key)}, {})
    assert len(webui_merges(tmp_path / "as_it_was.safetensors", models, family)[1]) == (len(paths) if component in family.fused else 0)  # what would have had no effect


@pytest.mark.parametrize(("down", "up", "stored"), [(torch.float64, torch.float64, torch.float32), (torch.float32, torch.float16, torch.float32), (torch.float16, torch.bfloat16, torch.float32),
                                                    (torch.bfloat16, torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16, torch.float16)])
def test_factors_have_one_type_that_loaders_know(tmp_path, down, up, stored):
    lora = random_lora((6, 6), 0)
    layers = {"unet": {Q: LoraTensors(lora.down.to(down), lora.up.to(up), 2.0)}}
    write_webui(tmp_path / "w.safetensors", layers, SD1, "sd_v1", name="w", kept={})
    write_diffusers(tmp_path / "d.safetensors", layers, SD1, "sd_v1", name="d", kept={})
    for path in (tmp_path / "w.safetensors", tmp_path / "d.safetensors", *write_peft(tmp_path / "p", layers, SD1, "sd_v1", name="p", kept={})):
        assert {t.dtype for key, t in read_tensors(path)[0].items() if not key.endswith("alpha")} == {stored}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tucker_goes_out_as_a_plain_locon(tmp_path, dtype):
    base, path = "lora_unet_input_blocks_4_0_in_layers_2", "down_blocks.1.resnets.0.conv1"
    g = torch.Generator().manual_seed(1)
    down, mid, up = (torch.randn(*shape, generator=g).to(dtype) for shape in ((3, 6, 1, 1), (3, 3, 3, 3), (5, 3, 1, 1)))
    save_tensors(tmp_path / "t.safetensors", {f"{base}.lora_{part}.weight": t for part, t in (("down", down), ("mid", mid), ("up", up))} | {f"{base}.alpha": torch.tensor(1.5)}, {})
    layers = load_lora(tmp_path / "t.safetensors").layers
    x = torch.randn(1, 6, 8, 8, generator=g, dtype=torch.float64)
    expected = 0.5 * torch.conv2d(torch.conv2d(torch.conv2d(x, down.double()), mid.double(), padding=1), up.double())
    write_webui(tmp_path / "w.safetensors", layers, SDXL, "sdxl_base_v1-0", name="w", kept={})
    write_diffusers(tmp_path / "d.safetensors", layers, SDXL, "sdxl_base_v1-0", name="d", kept={})
    for file in (tmp_path / "w.safetensors", tmp_path / "d.safetensors", *write_peft(tmp_path / "p", layers, SDXL, "sdxl_base_v1-0", name="p", kept={})):
        assert not [key for key in read_tensors(file)[0] if "mid" in key.rsplit(".lora_", 1)[-1]]
        got = torch.conv2d(x, load_lora(file).layers["unet"][path].delta(torch.float64), padding=1)
        assert float((got - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (2, 2, 1, 1), (2, 2), (3, 2, 3, 3)])
def test_tucker_factors_that_do_not_fit_are_refused(tmp_path, shape):
    base = "lora_unet_mid_block_resnets_0_conv1"
    parts = {"down": torch.ones(2, 6, 1, 1), "mid": torch.ones(*shape), "up": torch.ones(5, 2, 1, 1)}
    save_tensors(tmp_path / "t.safetensors", {f"{base}.lora_{part}.weight": t for part, t in parts.items()}, {})
    with pytest.raises(CheckpointError, match=r"do not fit each other, mid|conv1: factors with a kernel of \(1, 1\) do not fit this layer"):
        to_webui(load_lora(tmp_path / "t.safetensors").layers, SD1)


@pytest.mark.parametrize("extra", [f"{WQ}.dora_scale", "base_model.model.x.lora_magnitude_vector", "base_model.model.x.lora_magnitude_vector.default.weight", f"lycoris_{Q.replace('.', '_')}.dora_scale"])
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (6,)])
def test_dora_is_never_taken_for_a_lora(tmp_path, extra, shape):
    lora = random_lora((6, 6), 0)
    save_tensors(tmp_path / "x.safetensors", {f"{WQ}.lora_down.weight": lora.down, f"{WQ}.lora_up.weight": lora.up, extra: torch.ones(*shape)}, {})
    with pytest.raises(CheckpointError, match="DoRA: its magnitude has no place in a LoRA"):
        load_lora(tmp_path / "x.safetensors")


def test_webui_files_a_lora_under_its_own_family(case, tmp_path):
    family, _, layers = case
    write_webui(tmp_path / "w.safetensors", layers, family, VERSIONS[family.name], name="w", kept={"ss_base_model_version": "flux", "ss_v2": "True", "ss_output_name": "old"})
    said = read_tensors(tmp_path / "w.safetensors")[1]
    # SDXL by "sdxl_", SD2 by ss_v2, SD1 whatever else there is
    assert {"sdxl_": "sdxl", "True": "sd2"}.get(said["ss_base_model_version"][:5] if said["ss_base_model_version"].startswith("sdxl_") else said["ss_v2"], "sd1") == family.name
    assert said["ss_output_name"] == "w" and find_family(load_lora(tmp_path / "w.safetensors").layers, said).family is family


def test_metadata_is_text_that_others_read(case, tmp_path):
    family, _, layers = case
    write_webui(tmp_path / "w.safetensors", layers, family, VERSIONS[family.name], name="ünï", kept={"hcpdiff.step": "3", "hcpdiff.prediction_type": "v_prediction"})
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        said = file.metadata()
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in said.items()) and said["ss_output_name"] == "ünï"
    assert said["ss_network_dim"] == said["ss_network_alpha"] == "Dynamic" and said["modelspec.prediction_type"] == "v" and said["ss_v2"] in ("True", "False")


def test_a_hash_is_that_of_the_file_it_stands_in(tmp_path):
    layers = {"unet": {Q: random_lora((6, 6), 0)}}
    false = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "modelspec.hash_sha256": "0x0"}
    write_webui(tmp_path / "a.safetensors", layers, SD1, "sd_v1", name="a", kept=false, extra={"modelspec.author": "somebody with a long name", **false})
    save_tensors(tmp_path / "b.safetensors", read_tensors(tmp_path / "a.safetensors")[0], {**read_tensors(tmp_path / "a.safetensors")[1], **false})
    write_webui(tmp_path / "c.safetensors", load_lora(tmp_path / "b.safetensors").layers, SD1, "sd_v1", name="c", kept={})
    for name in "ac":
        raw = (tmp_path / f"{name}.safetensors").read_bytes()
        header = int.from_bytes(raw[:8], "little")
        said = json.loads(raw[8 : 8 + header])["__metadata__"]
        digest = hashlib.sha256(raw[8 + header :]).hexdigest()
        assert said["sshs_model_hash"] == digest and said["modelspec.hash_sha256"] == f"0x{digest}" and "sshs_legacy_hash" not in said


@pytest.mark.parametrize("parts", [("layer.W_down", "layer.W_up"), ("layer.lora_down.weight", "layer.lora_up.weight")])
@pytest.mark.parametrize("stem", [f"lora:{Q}", f"plugin:{Q}", f"base:denoiser.{Q}", f"lora_ema:{Q}"])
def test_the_ancestors_scale_reaches_every_target(tmp_path, stem, parts):
    lora, stored = random_lora((6, 6), 0, rank=4), 0.125
    save_tensors(tmp_path / "a.safetensors", {f"{stem}.___.{parts[0]}": lora.down, f"{stem}.___.{parts[1]}": lora.up, f"{stem}.___.alpha": torch.tensor(stored)}, {})
    layers = load_lora(tmp_path / "a.safetensors").layers
    write_webui(tmp_path / "w.safetensors", layers, SD1, "sd_v1", name="w", kept={})
    write_diffusers(tmp_path / "d.safetensors", layers, SD1, "sd_v1", name="d", kept={})
    for path in (tmp_path / "w.safetensors", tmp_path / "d.safetensors", *write_peft(tmp_path / "p", layers, SD1, "sd_v1", name="p", kept={}),
                 *write_ours(tmp_path / "o", layers, "sd_v1", name="1", kept={})):
        assert torch.allclose(load_lora(path).layers["unet"][Q].delta(), stored * lora.up @ lora.down, rtol=1e-6, atol=1e-8)
    assert float(read_tensors(tmp_path / "w.safetensors")[0][f"{WQ}.alpha"]) == stored * 4

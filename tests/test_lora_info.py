"""lora_info: what it shows of files of every spelling, sound and spoilt, and whether they fit a model."""

import json

import pytest
import torch
from lora_help import command, fails, random_lora, sd1_layers, webui_file

from hcpdiff.checkpoint.format import save_lora
from hcpdiff.checkpoint.io import read_tensors, save_tensors
from hcpdiff.lora_tools.base_model import open_model
from hcpdiff.tools import lora_info


@pytest.fixture
def info(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *args: command(lora_info, capsys, "--lora_path", *args)


def test_numbers_are_those_of_the_dense_deltas(info):
    layers = sd1_layers(1, text=True, alpha=3.0)
    webui_file("cat.safetensors", layers)
    code, out, err = info("cat.safetensors", "--json")
    (found,) = json.loads(out)
    assert code == 0 and found["family"] == "Stable Diffusion 1.x" and found["version"] == "sd_v1" and found["spelling"] == "webui" and not found["faults"], err
    assert len(found["layers"]) == 24
    for layer in found["layers"]:
        lora = layers[layer["component"]][layer["path"]]
        assert (layer["rank"], layer["alpha"]) == (lora.rank, lora.alpha) and layer["norm"] == pytest.approx(float(lora.delta(torch.float64).norm()), rel=1e-6)
    kinds = {layer["path"].rsplit(".", 1)[1]: layer["kind"] for layer in found["layers"]}
    assert (kinds["conv1"], kinds["proj_in"], kinds["to_k"]) == ("3x3", "1x1", "Linear")


def test_the_page_for_readers(info):
    webui_file("cat.safetensors", sd1_layers(1, text=True, alpha=3.0), extra={"ss_tag_frequency": json.dumps({"5_cat": {"cat": 9, "sofa": 2}}), "ss_note": "\x1b[31mred", "ssmd_cover_images": f'["{"QUJD" * 1000}"]',
                                                                                   "modelspec.thumbnail": f"data:image/jpeg;base64,{'QUJD' * 1000}"})
    code, out, _ = info("cat.safetensors", "--layers")
    assert code == 0
    assert "ssmd_cover_images: (picture, 3.0 kB)" in out and "modelspec.thumbnail: (picture, 3.0 kB)" in out and "QUJD" not in out
    assert "QUJD" * 1000 in info("cat.safetensors", "--all_metadata")[1]
    for words in ("cat.safetensors: ", "72 tensors", "AutoV2", "AutoV3", "family: Stable Diffusion 1.x (sd_v1)", "text_encoder", "unet down_blocks.0.resnets.0.conv1", "ss_tag_frequency: cat 9, sofa 2"):
        assert words in out, words
    assert "\x1b" not in out  # a stranger's file does not steer the terminal


def test_webuis_own_short_hashes_are_shown_and_a_false_one_is_told(info):
    import hashlib

    path = webui_file("cat.safetensors", sd1_layers(1))
    raw = path.read_bytes()
    code, out, _ = info("cat.safetensors")
    body = raw[8 + int.from_bytes(raw[:8], "little"):]
    assert f"AutoV2 {hashlib.sha256(raw).hexdigest()[:10]}, AutoV3 {hashlib.sha256(body).hexdigest()[:12]}" in out and "warning" not in out
    tensors, metadata = read_tensors(path)
    key = next(iter(tensors))
    save_tensors("changed.safetensors", {**tensors, key: tensors[key] + 1}, metadata)
    code, out, _ = info("changed.safetensors")
    assert code == 0 and "warning: sshs_model_hash in the metadata is" in out


def test_a_run_folder_shows_each_part(info):
    layers = sd1_layers(1, text=True)
    for component, named in layers.items():
        save_lora(f"run/ckpts/{component}-20.safetensors", named, {"component": component, "step": "20", "base_version": "sd_v1"})
    code, out, _ = info("run")
    assert code == 0 and out.count("spelling: hcpdiff") == 2 and "hcpdiff.step: 20" in out
    for words, times in (("hcpdiff.step: 20", 1), ("hcpdiff.component: unet", 1), ("metadata of all 2 files:", 1), ("hcpdiff.base_version", 1)):
        assert out.count(words) == times, words


def test_what_changes_nothing_is_told(info):
    layers = sd1_layers(1)
    path = next(iter(layers["unet"]))
    layers["unet"][path] = random_lora((16, 768), 1, scale=0.0)
    webui_file("a.safetensors", layers)
    assert "warning: 1 of 12 layers change nothing (unet 1)" in info("a.safetensors")[1]
    webui_file("b.safetensors", {"unet": {path: layers["unet"][path]}})
    assert "this LoRA changes nothing" in info("b.safetensors")[1]


def test_values_that_are_not_finite_are_counted_and_the_rest_is_shown(info):
    tensors, metadata = read_tensors(webui_file("a.safetensors", sd1_layers(1)))
    name = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[name][0, 0], tensors[name][1, 1] = float("nan"), float("inf")
    save_tensors("bad.safetensors", tensors, metadata)
    result = info("bad.safetensors", "a.safetensors")
    fails(result, "2 values in 1 of 36 tensors are inf or nan", "bad.safetensors", name)
    assert "a.safetensors: " in result[1] and result[1].count("unet ") >= 2


def test_what_is_no_lora_is_named(info):
    save_tensors("loha.safetensors", {f"lora_unet_mid_block_attentions_0_proj_in.hada_w{n}_{x}": torch.ones(2, 2) for n in (1, 2) for x in "ab"}, {})
    fails(info("loha.safetensors"), "loha.safetensors", "LoHa (LyCORIS)")
    fails(info("nowhere.safetensors"), "does not exist")


@pytest.mark.parametrize("name, what", [
    ("model.diffusion_model.input_blocks.0.0.weight", "a whole model (Stable Diffusion 1.x), not a LoRA: name it as the base model"),
    ("down_blocks.0.resnets.0.conv1.weight", "the weights of a UNet, not a LoRA"), ("encoder.conv_in.weight", "a VAE, not a LoRA"),
    ("state.adapters.unet.mid_block.attentions.0.proj_in.down", "a training state, not a LoRA: the LoRA of that step are in ckpts/"),
    ("control_model.input_hint_block.0.weight", "a ControlNet, not a LoRA"), ("emb_params", "it belongs into the visualizer's emb_dir"),
    ("double_blocks.0.img_attn.qkv.weight", "a FLUX model or one built like it, which is not supported; it is not a LoRA")])
def test_what_a_file_is_instead_is_told_in_one_line(info, name, what):
    save_tensors("x.safetensors", {name: torch.ones(4, 4, 3, 3), f"{name[:-3]}2.weight": torch.ones(2)}, {})
    result = info("x.safetensors")
    fails(result, f"x.safetensors is {what}" if not what.startswith("it") else what)
    assert "cannot be read" not in result[2] and "faults" not in result[2]


def test_whether_it_fits_a_model_is_said(info, tiny_sd1, tiny_sd2):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet")
    weights = dict(unet.named_parameters())
    paths = [name.removesuffix(".weight") for name in weights if name.endswith((".to_k.weight", ".conv1.weight", ".proj_in.weight"))]
    webui_file("fits.safetensors", {"unet": {path: random_lora(tuple(weights[f"{path}.weight"].shape), n) for n, path in enumerate(paths)}})
    code, out, err = info("fits.safetensors", "--base_model", str(tiny_sd1))
    assert code == 0 and out.splitlines()[-1].startswith(f"fits model: each of the {len(paths)} layers"), err
    result = info("fits.safetensors", "fits.safetensors", "--base_model", "fits.safetensors")
    fails(result, "error: fits.safetensors is a LoRA, not a base model")
    assert len(result[2].splitlines()) == 1 and "family" in result[1]
    webui_file("other.safetensors", {"unet": {path: random_lora((32, 7), n) for n, path in enumerate(paths) if path.endswith("to_k")}})
    fails(info("other.safetensors", "--base_model", str(tiny_sd1)), "does not fit model", "layers have another shape", "(32, 32) in the model, (32, 7) in the LoRA")
    webui_file("deep.safetensors", {"unet": {"down_blocks.0.attentions.0.transformer_blocks.9.attn1.to_q": random_lora((32, 32), 1)}}, family=sdxl())
    fails(info("deep.safetensors", "--base_model", str(tiny_sd1)), "1 of 1 layers of unet are not in model")


def sdxl():
    from dataclasses import replace

    from hcpdiff.families import unet_names
    from lora_help import SDXL

    return replace(SDXL, plan=unet_names.ANY)


def test_every_layer_of_a_folder_is_found(tiny_sd1):
    model = open_model(str(tiny_sd1), "--base_model")
    found = {(component, path) for component, path, _ in model.layers()}
    from diffusers import UNet2DConditionModel

    unet = {name for name, module in UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet").named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    assert {path for component, path in found if component == "unet"} == unet
    assert sum(component == "text_encoder" for component, _ in found) == 18


def test_what_other_programs_would_do_wrong_with_it_is_told(info):
    """Each trap of the loaders that shows in a file: names without text_model_, half an attention in SD2, SDXL that webui hides, strengths that differ, PEFT names."""
    from hcpdiff.families.unet_names import clip_modules

    from lora_help import SD2, SDXL

    tensors, _ = read_tensors(webui_file("a.safetensors", sd1_layers(1, text=True)))
    assert "warning" not in info("a.safetensors")[1]
    save_tensors("bare.safetensors", {key.replace("text_model_", ""): tensor for key, tensor in tensors.items()}, {})
    assert "pass over 36 text-encoder tensors, whose names lack text_model_" in info("bare.safetensors")[1]
    mixed = sd1_layers(1)
    mixed["unet"][next(iter(mixed["unet"]))] = random_lora((16, 768), 1, alpha=7.0)
    webui_file("mixed.safetensors", mixed)
    assert "the layers of unet have different strengths" in info("mixed.safetensors")[1]
    queries = {path: random_lora((1024, 1024), 1) for path in clip_modules(2) if path.endswith("q_proj")}
    tensors, metadata = read_tensors(webui_file("sd2.safetensors", {"text_encoder": queries}, SD2, "sd_v2"))
    save_tensors("half.safetensors", {key: tensor for key, tensor in tensors.items() if "q_proj" in key}, metadata)
    assert "passes over 2 text-encoder attentions" in info("half.safetensors")[1] and "passes over" not in info("sd2.safetensors")[1]
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors, metadata = read_tensors(webui_file("xl.safetensors", {"unet": {path: random_lora((640, 2048), 1)}}, SDXL, "sdxl_base_v1-0"))
    save_tensors("hidden.safetensors", tensors, {"ss_note": "x"})
    assert "hides it while an SDXL model is loaded" in info("hidden.safetensors")[1] and "warning" not in info("xl.safetensors")[1]
    save_lora("unet-1.safetensors", {path: random_lora((640, 2048), 1)}, {"component": "unet"})
    assert "want another spelling: lora_convert --to_webui" in info("unet-1.safetensors")[1]

"""Base models as single files: what they are taken for, that every weight arrives, and what is refused by name."""

import json
import math
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from hcpdiff.errors import HCPError
from hcpdiff.families import detect, quick_faults
from hcpdiff.families.place import open_place
from tests.single_models import PARTS, ldm_state, make_parts, save_folder, save_single


@pytest.fixture(scope="module")
def singles(tmp_path_factory, one_tokenizer):
    """kind -> (parts, file); one small model of each kind."""
    made = {}
    for kind in PARTS:
        parts = make_parts(kind)
        metadata = {"modelspec.prediction_type": "epsilon"} if kind == "sd2" else None
        made[kind] = parts, save_single(tmp_path_factory.mktemp(kind) / f"{kind}.safetensors", kind, parts, metadata)
    return made


def whole(outline):
    module, read = outline
    return read(module)


@pytest.mark.parametrize("kind", PARTS)
def test_every_weight_of_a_file_arrives(singles, kind):
    parts, path = singles[kind]
    place = open_place(path)
    assert place.kind.name == kind
    place.check(place.parts())
    for name, part in parts.items():
        read = whole(place.outline(type(part), name, torch.float32))
        wanted = part.state_dict()
        assert read.state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in read.state_dict().items())
        assert not any(tensor.is_meta for tensor in (*read.parameters(), *read.buffers())) and not read.training


UNET, CLIP = "model.diffusion_model.", "cond_stage_model.transformer.text_model."


def header_file(path, shapes, metadata=None):
    """A file with these names and shapes and nothing but holes for values."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + end)
    return path


@pytest.fixture(scope="module")
def shapes(singles):
    """kind -> name -> shape of its file."""
    return {kind: dict(open_place(path).shapes) for kind, (_, path) in singles.items()}


@pytest.fixture
def said(tmp_path, shapes):
    """What is said, without torch, of a file of a kind with names changed (None: taken away); '' where nothing is wrong."""
    def say(kind, changes=(), metadata=None, key="model.pretrained_model_name_or_path", **options):
        names = {**shapes[kind], **dict(changes)} if kind else dict(changes)
        path = header_file(tmp_path / "m.safetensors", {name: shape for name, shape in names.items() if shape is not None}, metadata)
        return "\n".join(quick_faults(str(path), key, **options))

    return say


def without(shapes, prefix):
    return {name: None for name in shapes if name.startswith(prefix)}


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_whole_file_has_no_faults(said, kind):
    assert said(kind) == ""


@pytest.mark.parametrize("kind, changes, words", [
    ("sd1", {f"{UNET}input_blocks.0.0.weight": (32, 9, 3, 3)}, "is an inpainting model (its UNet takes 9 channels), which is not supported"),
    ("sd1", {f"{UNET}input_blocks.0.0.weight": (32, 8, 3, 3)}, "InstructPix2Pix"),
    ("sd2", {f"{UNET}input_blocks.0.0.weight": (32, 5, 3, 3)}, "depth-to-image"),
    ("sd1", {"control_model.input_blocks.0.0.weight": (1,)}, "is a ControlNet"),
    ("sdxl", {"edm_mean": (4,)}, "is Playground v2.5"),
    ("sdxl", {"edm_vpred.sigma_max": (1,)}, "CosXL"),
    ("sdxl", {"model.diffusion_model.input_blocks.1.1.time_stack.0.weight": (1,)}, "video model"),
    (None, {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1,)}, "is a Stable Diffusion 3 model"),
    (None, {"double_blocks.0.img_attn.qkv.weight": (1,)}, "is a FLUX model"),
    (None, {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (1,)}, "is a LoRA, not a base model: it can be model.init_lora"),
    (None, {"down_blocks.0.resnets.0.norm1.weight": (1,), "conv_in.weight": (1,)}, "name the folder that holds model_index.json"),
    (None, {"decoder.conv_in.weight": (1,)}, "is a VAE alone, not a base model: it can be model.vae"),
    (None, {"text_model.encoder.layers.0.mlp.fc1.weight": (1,)}, "is a text encoder alone"),
    (None, {"emb_params": (1,)}, "is a textual-inversion embedding"),
    (None, {"clip_l": (1,), "clip_g": (1,)}, "is a textual-inversion embedding"),
    (None, {"weight": (1,)}, "is no Stable Diffusion model: no name in it begins with model.diffusion_model. (it holds weight)"),
    (None, {}, "it holds no tensors"),
    ("sd1", {"surprise.weight": (1,)}, "1 of its tensors belong to no part of Stable Diffusion 1.x, such as surprise.weight"),
])
def test_what_is_no_base_model_is_refused_by_name(said, kind, changes, words):
    assert words in said(kind, changes)


def test_the_refiner_is_refused_by_name(said, shapes):
    only_first = without(shapes["sdxl"], "conditioner.embedders.0.") | without(shapes["sdxl"], "conditioner.embedders.1.")
    assert "is the refiner of Stable Diffusion XL" in said("sdxl", only_first | {"conditioner.embedders.0.model.ln_final.weight": (1,)})


@pytest.mark.parametrize("kind, prefix, words", [
    ("sd1", "cond_stage_model.", "holds no text_encoder: no name in it begins with cond_stage_model.transformer."),
    ("sdxl", "conditioner.embedders.1.", "holds no text_encoder_2: no name in it begins with conditioner.embedders.1.model."),
    ("sdxl", "conditioner.embedders.0.", "holds no text_encoder: no name in it begins with conditioner.embedders.0."), ("sd1", "first_stage_model.", "Name one in model.vae."),
])
def test_a_part_that_a_file_lacks_is_named(said, shapes, kind, prefix, words):
    assert words in said(kind, without(shapes[kind], prefix))


def test_a_part_that_is_replaced_may_be_missing(said, shapes):
    assert said("sd1", without(shapes["sd1"], "first_stage_model."), without=("vae",)) == ""
    assert "Name one in vae." in said("sd1", without(shapes["sd1"], "first_stage_model."), key="pretrained_model")


def test_all_faults_of_a_file_come_together(said, shapes):
    text = said("sd2", {"surprise": (1,)} | without(shapes["sd2"], "first_stage_model."))
    assert "surprise" in text and "model.vae" in text and "model.prediction_type=v_prediction or model.prediction_type=epsilon" in text


def test_sd2_is_asked_what_it_predicts_and_file_or_user_settle_it(said, tmp_path):
    assert "whether it predicts epsilon" in said("sd2") and "prediction_type=epsilon" in said("sd2", key="pretrained_model")
    assert said("sd2", prediction="v_prediction") == ""
    path = tmp_path / "m.safetensors"
    for metadata, more, expected in (({"modelspec.prediction_type": "v"}, {}, "v_prediction"), ({"modelspec.prediction_type": "epsilon"}, {}, "epsilon"),
                                     ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, "v_prediction"), ({}, {"v_pred": ()}, "v_prediction")):
        assert said("sd2", more, metadata) == ""
        place = open_place(path)
        assert place.config("scheduler")["prediction_type"] == expected and place.config("unet")["sample_size"] == (96 if expected == "v_prediction" else 64)


def test_marks_of_sdxl_files_reach_the_schedule(said, tmp_path):
    def schedule():
        return open_place(tmp_path / "m.safetensors").config("scheduler")

    assert said("sdxl") == "" and schedule()["prediction_type"] == "epsilon" and "rescale_betas_zero_snr" not in schedule()
    assert said("sdxl", {"v_pred": ()}) == "" and schedule()["prediction_type"] == "v_prediction"
    assert said("sdxl", {"v_pred": (), "ztsnr": ()}) == "" and schedule()["rescale_betas_zero_snr"] and schedule()["timestep_spacing"] == "trailing"
    assert "its key v_pred, zero terminal SNR by its key ztsnr" in open_place(tmp_path / "m.safetensors").notices[0]
    assert open_place(tmp_path / "m.safetensors", prediction="epsilon").config("scheduler")["prediction_type"] == "epsilon"


def test_copies_and_buffers_are_not_taken_for_weights(said, tmp_path, shapes):
    more = {"model_ema.diffusion_modelinput_blocks00weight": (1,), "betas": (1000,), f"{CLIP}embeddings.position_ids": (1, 77), "cond_stage_model.logit_scale": (),
            "first_stage_model.loss.logvar": ()}
    assert said("sd1", more) == ""
    place = open_place(tmp_path / "m.safetensors")
    assert "1 weights of its averaged copy (EMA) are not used" in place.notices[1]
    assert set(place.names("text_encoder").values()) == {name for name in shapes["sd1"] if name.startswith(CLIP)}


@pytest.mark.parametrize("kind, more, words", [
    ("sd1", ["cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias"],
     "spells its text_encoder in two ways: 52 names begin with cond_stage_model.transformer.text_model., 1 do not, such as cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias"),
    ("sdxl", ["conditioner.embedders.1.transformer.text_model.final_layer_norm.bias", "conditioner.embedders.0.transformer.final_layer_norm.bias"],
     "spells its text_encoder_2 in two ways: 41 names begin with conditioner.embedders.1.model., 1 do not, such as conditioner.embedders.1.transformer.text_model."),
])
def test_a_part_in_two_spellings_is_refused_and_buffers_in_another_are_not(said, kind, more, words):
    assert words in said(kind, dict.fromkeys(more, (1,)))
    assert said(kind, dict.fromkeys(more, (1,))).count("in two ways") == len(more)
    assert said("sd1", {"cond_stage_model.transformer.embeddings.position_ids": (1, 77)}) == ""


def load_fault(path, part, kind, **options) -> str:
    with pytest.raises(HCPError) as caught:
        whole(open_place(path, **options).outline(type(make_parts(kind)[part]) if isinstance(kind, str) else kind, part, torch.float32))
    return "\n".join(caught.value.faults)


def test_weights_that_are_missing_left_over_or_misshapen_are_named(singles, tmp_path):
    parts, _ = singles["sd1"]
    state = ldm_state("sd1", parts)
    gone = state.pop(f"{UNET}middle_block.0.in_layers.2.bias")
    save_file(state | {f"{UNET}middle_block.9.weight": gone}, tmp_path / "m.safetensors")
    told = load_fault(tmp_path / "m.safetensors", "unet", type(parts["unet"]))
    assert "1 weights of UNet2DConditionModel are missing, such as middle_block.0.in_layers.2.bias" in told
    assert "1 tensors belong to no weight of UNet2DConditionModel, such as middle_block.9.weight" in told
    save_file(state | {f"{UNET}middle_block.0.in_layers.2.bias": torch.zeros(5)}, tmp_path / "m.safetensors")
    assert "mid_block.resnets.0.conv1.bias is 5 in the file, 64 by its config" in load_fault(tmp_path / "m.safetensors", "unet", type(parts["unet"]))


def test_a_cut_file_and_one_with_a_nameless_header_are_told(singles, tmp_path):
    _, path = singles["sd1"]
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:10_000_000])
    assert "cut.safetensors is cut short" in "\n".join(quick_faults(str(tmp_path / "cut.safetensors")))


def test_a_ckpt_of_tensors_is_read_and_one_that_runs_code_is_not(singles, tmp_path):
    parts, path = singles["sd1"]
    torch.save({"state_dict": ldm_state("sd1", parts), "global_step": 7}, tmp_path / "m.ckpt")
    place = open_place(tmp_path / "m.ckpt")
    place.check(place.parts())
    read = whole(place.outline(type(parts["vae"]), "vae", torch.float32))
    assert all(torch.equal(tensor, parts["vae"].state_dict()[name]) for name, tensor in read.state_dict().items())
    marks = place.mark("vae"), place.mark("unet")
    assert marks[0] != marks[1] and place.mark("vae") == marks[0]

    torch.save({"state_dict": ldm_state("sd1", parts), "callback": Hostile()}, tmp_path / "bad.ckpt")
    with pytest.raises(HCPError, match="only tensors are taken from one"):
        detect(tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()


class Hostile:
    """A pickle that would make a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_older_and_rarer_spellings_of_text_encoders_are_read(singles, tmp_path):
    parts, _ = singles["sd1"]
    flat = {name.replace("text_model.", "") if name.startswith("cond") else name: tensor for name, tensor in ldm_state("sd1", parts).items()}
    save_file(flat, tmp_path / "flat.safetensors")
    read = whole(open_place(tmp_path / "flat.safetensors").outline(type(parts["text_encoder"]), "text_encoder", torch.float32))
    assert torch.equal(read.embeddings.token_embedding.weight, parts["text_encoder"].embeddings.token_embedding.weight)
    parts, _ = singles["sdxl"]
    comfy = ldm_state("sdxl", parts)
    comfy["conditioner.embedders.1.model.text_projection.weight"] = comfy.pop("conditioner.embedders.1.model.text_projection").T.contiguous()
    save_file(comfy, tmp_path / "comfy.safetensors")
    place = open_place(tmp_path / "comfy.safetensors")
    assert place.config("unet")["addition_time_embed_dim"] == 8
    read = whole(place.outline(type(parts["text_encoder_2"]), "text_encoder_2", torch.float32))
    assert torch.equal(read.text_projection.weight, parts["text_encoder_2"].text_projection.weight)


def test_the_last_layer_of_sd2s_text_encoder_is_left_out(tmp_path):
    """As in the released files: 24 layers in the file, 23 in diffusers' model."""
    from transformers import CLIPTextConfig, CLIPTextModel

    parts = {"text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=24, num_attention_heads=1, hidden_act="gelu"))}
    save_file(ldm_state("sd2", parts) | {f"{UNET}input_blocks.1.1.proj_in.weight": torch.zeros(2, 2)}, tmp_path / "m.safetensors", {"modelspec.prediction_type": "v"})
    place = open_place(tmp_path / "m.safetensors")
    assert place.kind.name == "sd2" and place.config("text_encoder")["num_hidden_layers"] == 23
    read = whole(place.outline(CLIPTextModel, "text_encoder", torch.float32))
    assert len(read.encoder.layers) == 23 and torch.equal(read.encoder.layers[22].mlp.fc1.weight, parts["text_encoder"].encoder.layers[22].mlp.fc1.weight)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_and_eighth_precision_files_are_read_as_they_are(singles, tmp_path, stored):
    parts, _ = singles["sd1"]
    state = {name: tensor.to(stored) for name, tensor in ldm_state("sd1", {"vae": parts["vae"]}).items()} | {f"{UNET}out.0.weight": torch.zeros(1)}
    save_file(state, tmp_path / "m.safetensors")
    read = whole(open_place(tmp_path / "m.safetensors").outline(type(parts["vae"]), "vae", torch.float32))
    assert all(torch.equal(tensor, parts["vae"].state_dict()[name].to(stored).float()) for name, tensor in read.state_dict().items())


@pytest.mark.parametrize("form", ["ldm", "diffusers", "whole model"])
def test_another_vae_may_be_a_file_in_every_form(singles, tmp_path, form):
    from hcpdiff.families.place import check_vae, vae_outline

    parts, path = singles["sd1"]
    other = make_parts("sd1", seed=5)["vae"]
    file = tmp_path / "vae.safetensors"
    if form == "diffusers":
        save_file({name: tensor.clone() for name, tensor in other.state_dict().items()}, file)
    else:
        state = {name.removeprefix("first_stage_model." if form == "ldm" else ""): tensor for name, tensor in ldm_state("sd1", {"vae": other}).items() if name.startswith("first")}
        save_file(state | {"loss.logvar" if form == "ldm" else "betas": torch.zeros(1)}, file)
    base = open_place(singles["sdxl"][1])
    check_vae(str(file), base, "model.vae")
    read = whole(vae_outline(type(other), str(file), base, torch.float32, "model.vae"))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in read.state_dict().items())
    assert read.config.scaling_factor == 0.13025  # a file of a VAE does not say it: the base model does
    with pytest.raises(HCPError, match="model.vae = .* holds no VAE"):
        save_file({"a": torch.zeros(1)}, file)
        check_vae(str(file), base, "model.vae")


def test_configs_of_another_folder_are_used_when_named(tiny_sd1, tmp_path):
    """A model whose heads and groups are not those of the released ones: shapes cannot show them, a folder of configs does."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    parts = {name: kind.from_pretrained(tiny_sd1 / name) for name, kind in kinds.items()}
    path = save_single(tmp_path / "m.safetensors", "sd1", parts)
    assert "cannot be cut into heads of 64, so the configs cannot be found from the file. Name a folder of them in model.config" in "\n".join(quick_faults(str(path)))
    assert quick_faults(str(path), configs=str(tiny_sd1)) == []
    place = open_place(path, str(tiny_sd1))
    models = detect(place).load(place, "m")
    for name, part in parts.items():
        assert all(torch.equal(tensor, part.state_dict()[key]) for key, tensor in models.modules[name].state_dict().items())
    assert models.unet.config.norm_num_groups == 16 and models.tokenizer.pad_token == "<|endoftext|>"
    assert "model.config = " in "\n".join(quick_faults(str(path), configs=str(tmp_path))) and "is for a single file" in "\n".join(quick_faults(str(tiny_sd1), configs=str(tiny_sd1)))


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_negative_prompt_is_what_the_configs_beside_a_file_say(singles, tmp_path, zeros):
    parts, path = singles["sdxl"]
    folder = save_folder(tmp_path / "model", "sdxl", parts)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8")) | {"force_zeros_for_empty_prompt": zeros}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    found = [detect(place).load(place, "m", parts=()).extra["zero_negative"] for place in (open_place(folder), open_place(path, str(folder)), open_place(path))]
    assert found == [zeros, zeros, True]


def test_marks_are_of_the_weights_not_of_the_files_name(singles, tmp_path):
    parts, path = singles["sd1"]
    moved = tmp_path / "renamed.safetensors"
    moved.write_bytes(path.read_bytes())
    assert open_place(moved).mark("unet") == open_place(path).mark("unet") != open_place(path).mark("text_encoder")
    state = ldm_state("sd1", parts)
    state[f"{UNET}out.2.bias"] += 1e-3
    save_file(state, moved)
    assert open_place(moved).mark("unet") != open_place(path).mark("unet") and open_place(moved).mark("vae") == open_place(path).mark("vae")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_file_trains_and_draws_as_its_folder_does(singles, tmp_path, monkeypatch, kind):
    """To the last bit."""
    parts, path = singles[kind]
    folder = save_folder(tmp_path / "model", kind, parts)
    monkeypatch.chdir(tmp_path)
    runs = [trained(tmp_path, model) for model in (folder, path)]
    assert runs[1][1] == runs[0][1]
    assert runs[1][2].keys() == runs[0][2].keys() and all(torch.equal(tensor, runs[1][2][name][key]) for name, tensors in runs[0][2].items() for key, tensor in tensors.items())
    assert f"{path.name} is a Stable Diffusion " in runs[1][3] and "it predicts epsilon" in runs[1][3]
    pictures = [drawn(model, runs[1][0], tmp_path / model.name.replace(".", "_")) for model in (folder, path)]
    assert (pictures[0] == pictures[1]).all()


def test_a_picture_is_drawn_with_the_vae_of_a_file(singles, tmp_path):
    """A model without a VAE and a VAE alone give what the whole file gives."""
    parts, path = singles["sd1"]
    state = ldm_state("sd1", parts)
    save_file({name: tensor for name, tensor in state.items() if not name.startswith("first_stage_model.")}, tmp_path / "base.safetensors")
    save_file({name.removeprefix("first_stage_model."): tensor for name, tensor in state.items() if name.startswith("first_stage_model.")}, tmp_path / "vae.safetensors")
    whole, halves = drawn(path, None, tmp_path / "a"), drawn(tmp_path / "base.safetensors", None, tmp_path / "b", vae=str(tmp_path / "vae.safetensors"))
    assert (whole == halves).all()


def test_latents_of_a_folder_are_those_of_its_file(singles, tmp_path):
    """What the cache knows a VAE by is its values and config, not where it lies."""
    from hcpdiff.families.base import fingerprint

    parts, path = singles["sd1"]
    folder = save_folder(tmp_path / "model", "sd1", parts)
    read = [whole(open_place(place).outline(type(parts["vae"]), "vae", torch.float32)) for place in (folder, path)]
    assert fingerprint(read[0]) == fingerprint(read[1])


def trained(tmp_path, model, *overrides):
    """(run folder, losses, weight files, log) of two steps."""
    from PIL import Image
    from safetensors.torch import load_file

    from hcpdiff.config.load import load
    from hcpdiff.config.schema import RunConfig
    from hcpdiff.train.parallel import Parallel
    from hcpdiff.train.run import Run
    from tests.test_run import CONFIG

    if not (tmp_path / "images").is_dir():
        (tmp_path / "images").mkdir()
        Image.effect_noise((64, 64), 50).save(tmp_path / "images" / "0.png")
        Image.effect_noise((64, 64), 20).save(tmp_path / "images" / "1.png")
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=model), encoding="utf-8")
    words = "lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*self_attn$']}]"
    run = Run(load("cfg.yaml", [f"exp_dir=run_{model.name}", words, *overrides], RunConfig), Parallel())
    assert run.train() == 0
    log = (run.folder / "train.log").read_text(encoding="utf-8")
    return run.folder, [float(value) for value in re.findall(r"loss (\d+\.\d+)", log)], {file.name: load_file(file) for file in (run.folder / "ckpts").iterdir()}, log


def drawn(model, lora, out, **more):
    """A picture with the LoRA of a run folder, as integers (H, W, 3)."""
    import numpy as np
    from PIL import Image

    from hcpdiff.config.infer_schema import InferConfig
    from hcpdiff.vis.request import read
    from hcpdiff.vis.run import run

    config = InferConfig(pretrained_model=str(model), prompt="a cat", seed=3, lora_path=str(lora) if lora else None, out_dir=str(out), cpu_threads=1,
                         infer_args={"width": 64, "height": 64, "num_inference_steps": 3}, **more)
    files = run(read(config), say=lambda line: None)
    return np.asarray(Image.open(files[0])).astype(int)

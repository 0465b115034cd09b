"""lora_merge into base models, lora_extract and lora_resize: against dense float64 references, diffusers' fused weights, and diffusers' reader of single files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lora_help import SD2, SDXL, command, fails, random_lora, webui_file
from single_models import make_parts, save_folder, save_single

from hcpdiff.checkpoint.format import load_lora
from hcpdiff.checkpoint.io import read_tensors, save_tensors
from hcpdiff.errors import ConfigError
from hcpdiff.families.place import open_place
from hcpdiff.lora_tools.base_model import open_model
from hcpdiff.lora_tools.extract import paired
from hcpdiff.tools import lora_convert, lora_extract, lora_merge, lora_resize

D = torch.float64
FAMILIES = {"sd2": (SD2, "sd_v2"), "sdxl": (SDXL, "sdxl_base_v1-0")}


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory):
    """A model in half precision as a folder and as a single file, and a LoRA of mixed ranks and alphas on every layer of it."""
    place, kind = tmp_path_factory.mktemp(request.param), request.param
    parts = {name: part.half() for name, part in make_parts(kind).items()}
    save_folder(place / "folder", kind, parts)
    save_single(place / "model.safetensors", kind, parts, {"modelspec.hash_sha256": "0x1", "author": "me"})
    layers = {}
    for n, (component, path, spot) in enumerate(open_model(str(place / "folder"), "x").layers()):
        layers.setdefault(component, {})[path] = random_lora(spot.shape, n, rank=1 + n % 3, alpha=1.0 + n % 2, scale=0.05)
    webui_file(place / "lora.safetensors", layers, *FAMILIES[kind])
    return place, layers


@pytest.fixture
def tool(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda module, *args: command(module, capsys, *args)


def merged(tool, place, base, *more):
    return tool(lora_merge, "--lora_path", place / "lora.safetensors", "--alpha", "0.5", "--base_model", place / base, "--dump_path", "out", *more)


def test_a_merged_folder_has_the_rounded_sums_and_every_other_byte(world, tool, tmp_path):
    place, layers = world
    code, out, err = merged(tool, place, "folder")
    assert code == 0 and "lost by rounding" in out, err
    before, after = ({path.relative_to(root): path for path in root.rglob("*") if path.is_file()} for root in (place / "folder", tmp_path / "out"))
    assert before.keys() == after.keys() - {next(path for path in after if path.name == "lora_merge.json")}
    for name, path in before.items():
        component = name.parts[0]
        if component not in layers or path.suffix != ".safetensors":
            assert path.read_bytes() == after[name].read_bytes(), name
            continue
        (old, meta), (new, new_meta) = read_tensors(path), read_tensors(after[name])
        assert list(old) == list(new) and meta == new_meta
        changed = {f"{path}.weight": lora for path, lora in layers[component].items()}
        for key, weight in old.items():
            lora = changed.get(key) or changed.get(f"text_model.{key}")
            if lora is None:
                assert torch.equal(weight, new[key]), key
            else:
                exact = weight.double() + 0.5 * lora.delta(D).reshape(weight.shape)
                assert new[key].dtype == weight.dtype and bool(((new[key].double() - exact).abs() <= exact.abs() * 2.0**-11 * 1.001 + 2.0**-25).all()), key


def test_a_merged_single_file_is_the_merged_folder_as_diffusers_reads_it(world, tool, tmp_path):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint

    place, layers = world
    assert merged(tool, place, "folder", "--name", "x")[0] == 0
    code, out, err = tool(lora_merge, "--lora_path", place / "lora.safetensors", "--alpha", "0.5", "--base_model", place / "model.safetensors", "--dump_path", "one.safetensors")
    assert code == 0 and "modelspec.hash_sha256" in out, err
    (old, _), (new, metadata) = read_tensors(place / "model.safetensors"), read_tensors("one.safetensors")
    assert list(old) == list(new) and {key: tensor.dtype for key, tensor in old.items()} == {key: tensor.dtype for key, tensor in new.items()}
    assert metadata["author"] == "me" and "modelspec.hash_sha256" not in metadata and json.loads(metadata["hcpdiff.made_from"])[0]["weight"] == 0.5
    assert all(torch.equal(old[key], new[key]) for key in old if not key.endswith("weight") and "text_projection" not in key)
    config = json.loads((place / "folder/unet/config.json").read_text())
    found = {"unet": convert_ldm_unet_checkpoint(dict(new), config)}
    prefix, name = ("conditioner.embedders.1.model.", "text_encoder_2") if "text_encoder_2" in layers else ("cond_stage_model.model.", "text_encoder")
    model = type("Model", (), {"config": type("Config", (), {"hidden_size": 128 if name == "text_encoder_2" else 64})})
    found[name] = convert_open_clip_checkpoint(model, dict(new), prefix)
    for component, theirs in found.items():
        (file,) = (tmp_path / "out" / component).glob("*.safetensors")
        ours = read_tensors(file)[0]
        theirs = {key.removeprefix("text_model."): tensor for key, tensor in theirs.items()}
        compared = [key for key in ours if key.removeprefix("text_model.") in theirs]
        assert len(compared) >= 0.9 * len(ours)
        assert all(torch.equal(ours[key], theirs[key.removeprefix("text_model.")].reshape(ours[key].shape)) for key in compared)


def test_extraction_gives_back_what_was_merged(world, tool):
    """Of a folder and a file, and of two files: the delta comes back but for the rounding of the merged weights; the printed residual is the dense one."""
    place, layers = world
    assert tool(lora_merge, "--lora_path", place / "lora.safetensors", "--base_model", place / "model.safetensors", "--dump_path", "tuned")[0] == 0
    base, tuned = (open_model(str(path), "x") for path in (place / "model.safetensors", "tuned.safetensors"))
    for source in ("folder", "model.safetensors"):
        code, out, err = tool(lora_extract, "--base_model", place / source, "--tuned_model", "tuned.safetensors", "--rank", "3", "--dump_path", "back", "--save_dtype", "fp32")
        assert code == 0, err
        found = load_lora("back.safetensors")
        assert {component: set(named) for component, named in found.layers.items()} == {component: set(named) for component, named in layers.items()}
        lost = size = 0.0
        for path, lora in found.layers["unet"].items():
            delta = tuned.spot("unet", path).read().double() - base.spot("unet", path).read().double()
            lost, size = lost + float((lora.delta(D).reshape(delta.shape) - delta).norm() ** 2), size + float(delta.norm() ** 2)
            assert (lora.delta(D) - layers["unet"][path].delta(D).reshape(lora.delta().shape)).norm() < 0.05 * delta.norm(), path
        assert f"{100 * (lost / size) ** 0.5:.3g} %" in out


def test_extraction_leaves_out_what_did_not_change_and_says_what_no_lora_holds(world, tool):
    place, layers = world
    path = next(path for path in layers["unet"] if path.endswith("conv1"))
    linear = next(path for path in layers["unet"] if path.endswith("to_q"))
    tensors, metadata = read_tensors(place / "folder/unet/diffusion_pytorch_model.safetensors")
    shutil.copytree(place / "folder", "tuned")
    tensors[f"{path}.weight"] += 0.1 * torch.randn(tensors[f"{path}.weight"].shape).half()
    tensors[f"{linear}.weight"][0] += 0.25
    tensors["conv_norm_out.bias"] += 0.5
    save_tensors("tuned/unet/diffusion_pytorch_model.safetensors", tensors, metadata)
    args = ("--base_model", place / "folder", "--tuned_model", "tuned", "--dump_path", "x", "--energy", "0.9")
    code, out, err = tool(lora_extract, *args)
    assert code == 0 and "not in the LoRA: 1 biases, norms and embeddings" in out and "are the same in both models" in out, err
    found = load_lora("x.safetensors").layers
    assert set(found) == {"unet"} and set(found["unet"]) == {path, linear} and found["unet"][linear].rank == 1 and found["unet"][path].rank > 3
    code, out, err = tool(lora_extract, *args, "--conv_rank", "0", "--parts", "unet")
    assert code == 0 and set(load_lora("x.safetensors").layers["unet"]) == {linear} and "1 convolutions are left out" in out, err


@pytest.mark.parametrize("kind, version", [("sd1", "sd_v1"), ("sd2", "sd_v2_v"), ("sdxl", "sdxl_base_v1-0")])
def test_an_extracted_lora_is_marked_by_its_base_models_family_and_prediction(kind, version, tool):
    parts = make_parts(kind)
    save_folder(Path("base"), kind, parts, "v_prediction")
    save_single("base.safetensors", kind, parts, {"modelspec.prediction_type": "v"})
    for name, weight in parts["unet"].named_parameters():
        if name.endswith("attn2.to_k.weight"):
            weight.data[0] += 0.5
    save_folder(Path("tuned"), kind, parts, "v_prediction")
    for base in ("base", "base.safetensors"):
        code, out, err = tool(lora_extract, "--base_model", base, "--tuned_model", "tuned", "--rank", "1", "--parts", "unet", "--dump_path", "x")
        assert code == 0 and f"({version}), as {base} is" in out and "warning" not in out, out + err
        metadata = read_tensors("x.safetensors")[1]
        assert (metadata["ss_base_model_version"], metadata["modelspec.prediction_type"]) == (version, "v")
    save_folder(Path("tuned"), kind, parts, "epsilon")
    assert "predicts v_prediction, tuned epsilon" in tool(lora_extract, "--base_model", "base", "--tuned_model", "tuned", "--rank", "1", "--parts", "unet", "--dump_path", "x")[1]
    if kind == "sd2":  # whose models predict either, where no scheduler says which
        for folder in ("base", "tuned"):
            shutil.rmtree(f"{folder}/scheduler")
        code, out, err = tool(lora_extract, "--base_model", "base", "--tuned_model", "tuned", "--rank", "1", "--parts", "unet", "--dump_path", "x")
        assert code == 0 and "so the LoRA does not say it" in out and "Stable Diffusion 2.x, as base is" in out, out + err
        metadata = read_tensors("x.safetensors")[1]
        assert metadata["ss_v2"] == "True" and not {"ss_base_model_version", "modelspec.prediction_type", "modelspec.architecture"} & set(metadata)
        for said, version in (("v_prediction", "sd_v2_v"), ("v", "sd_v2_v"), ("epsilon", "sd_v2")):
            more = ("--metadata", f"modelspec.prediction_type={said}", "--overwrite")
            (converted, out, err), (extracted, told, _) = (
                tool(lora_convert, "--to_webui", "--lora_path", "x.safetensors", "--dump_path", "c.safetensors", *more),
                tool(lora_extract, "--base_model", "base", "--tuned_model", "tuned", "--rank", "1", "--parts", "unet", "--dump_path", "e.safetensors", *more))
            assert converted == extracted == 0 and f"Stable Diffusion 2.x ({version})" in out and f"({version})" in told and "warning" not in told, out + err + told
            tool(lora_resize, "--lora_path", "x.safetensors", "--rank", "1", "--dump_path", "r.safetensors", *more)
            tool(lora_merge, "--lora_path", "x.safetensors", "x.safetensors", "--dump_path", "m.safetensors", *more)
            for file in "cerm":
                metadata = read_tensors(f"{file}.safetensors")[1]
                found = metadata["ss_base_model_version"], metadata["modelspec.architecture"], metadata["modelspec.prediction_type"]
                assert found == (version, SD2.versions[version], said), file
        tool(lora_convert, "--to_webui", "--lora_path", "c.safetensors", "--dump_path", "d.safetensors", "--metadata", "modelspec.prediction_type=v")
        assert read_tensors("d.safetensors")[1]["ss_base_model_version"] == "sd_v2"  # what the file says of itself goes before


def test_a_coarser_type_is_no_difference(tiny_sd1, tool):
    shutil.copytree(tiny_sd1, "half")
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        tensors, metadata = read_tensors(f"half/{part}/{file}.safetensors")
        if part == "unet":
            tensors["conv_in.weight"] += 1.0
        save_tensors(f"half/{part}/{file}.safetensors", {key: tensor.half() for key, tensor in tensors.items()}, metadata)
    for base, tuned in ((tiny_sd1, "half"), ("half", tiny_sd1)):
        assert tool(lora_extract, "--base_model", base, "--tuned_model", tuned, "--rank", "4", "--dump_path", "x")[0] == 0
        found = load_lora("x.safetensors").layers["unet"]
        assert list(found) == ["conv_in"] and found["conv_in"].down.dtype == torch.float32  # one of the models has as many digits
    shutil.rmtree("half/text_encoder")
    assert {pair.component for pair in paired(open_model(str(tiny_sd1), "x"), open_model("half", "x"), ("unet", "text_encoder"))} == {"unet"}


def test_the_layer_that_sd2s_files_have_and_nobody_uses_is_passed_over(world, tool):
    place, layers = world
    if "text_encoder_2" in layers:
        return
    tensors, metadata = read_tensors(place / "model.safetensors")
    last = {key.replace(".resblocks.2.", ".resblocks.23."): tensor for key, tensor in tensors.items() if ".resblocks.2." in key}
    save_tensors("long.safetensors", tensors | last, metadata)
    folder, file = open_model(str(place / "folder"), "x"), open_model("long.safetensors", "x")
    assert len(paired(folder, file, ("unet", "text_encoder"))) == len(list(folder.layers())) == len(list(file.layers())) - 6


def test_mistakes_about_models(world, tool, tmp_path):
    place, layers = world
    lora = place / "lora.safetensors"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    into = lambda base, *more: tool(lora_merge, "--lora_path", lora, "--base_model", base, *more)
    fails(into(place / "folder", "--dump_path", "mine"), "is not empty", "choose another folder")
    fails(into(place / "folder", "--dump_path", "mine", "--overwrite"), "is not empty")
    fails(into(place / "folder", "--dump_path", place / "folder/unet/x"), "lie in each other")
    fails(into(place / "folder", "--dump_path", "x.safetensors"), "name a folder")
    fails(into(place / "model.safetensors", "--dump_path", place / "model.safetensors", "--overwrite"), "is a file that is read")
    fails(into(place / "model.safetensors", "--dump_path", lora, "--overwrite"), "is a file that is read")
    fails(into(place / "model.safetensors", "--dump_path", "x", "--rank", "4", "--save_dtype", "fp16"), "--rank, --save_dtype: not with --base_model")
    fails(into(lora, "--dump_path", "x"), "lora.safetensors is a LoRA, not a base model: it can be --lora_path", "layers of unet are not in lora.safetensors")
    fails(into(place / "folder", "--dump_path", "x", "--alpha", "1e8"), "would hold values that float16 cannot")
    fails(into(place / "folder", "--dump_path", "x", "--alpha", "0"), "nothing would change")
    fails(tool(lora_extract, "--base_model", place / "folder", "--tuned_model", place / "model.safetensors", "--rank", "2", "--dump_path", "x"), "do not differ in any layer")
    fails(tool(lora_extract, "--base_model", place / "folder", "--tuned_model", lora, "--rank", "2", "--dump_path", "x"), "have none of unet, text_encoder, text_encoder_2 in common")
    fails(tool(lora_extract, "--base_model", "nowhere/x/y", "--tuned_model", "x/y/z", "--conv_rank", "-1"), "--conv_rank -1", "how large?", "--dump_path is missing")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_spells_a_part_in_two_ways_is_refused_as_training_does(world, tool, tmp_path):
    place, layers = world
    tensors, metadata = read_tensors(place / "model.safetensors")
    path = next(iter(layers["unet"]))
    twice = {f"unet.{path}.weight": torch.zeros(1)}
    if "text_encoder_2" in layers:
        twice["conditioner.embedders.0.transformer.final_layer_norm.bias"] = torch.zeros(1)
    save_tensors(tmp_path / "twice.safetensors", tensors | twice, metadata)
    fault = "Which are meant cannot be told" if "text_encoder_2" not in layers else "spells its text_encoder in two ways"
    extract = lora_extract, "--dump_path", "x.safetensors", "--rank", "1"
    fails(tool(*extract, "--base_model", "twice.safetensors", "--tuned_model", place / "model.safetensors"), "--base_model = 'twice.safetensors'", fault)
    fails(tool(*extract, "--base_model", place / "model.safetensors", "--tuned_model", "twice.safetensors"), "--tuned_model = 'twice.safetensors'", fault)
    fails(merged(tool, place, tmp_path / "twice.safetensors"), fault)
    with pytest.raises(ConfigError, match="belong to no part|in two ways"):
        open_place("twice.safetensors").check(["unet"])
    assert not (tmp_path / "x.safetensors").exists() and not (tmp_path / "out").exists()


def test_a_folder_that_the_command_made_is_replaced_and_copies_of_the_weights_follow_or_stay_behind(tiny_sd1, tool, tmp_path):
    """fp16 beside fp32 is changed too; pickles and single files of the unchanged weights are not copied."""
    shutil.copytree(tiny_sd1, "model")
    tensors, metadata = read_tensors("model/unet/diffusion_pytorch_model.safetensors")
    save_tensors("model/unet/diffusion_pytorch_model.fp16.safetensors", {key: tensor.half() for key, tensor in tensors.items()}, metadata)
    for name in ("model/unet/diffusion_pytorch_model.bin", "model/all.safetensors", "model/vae/kept.bin"):
        (tmp_path / name).write_bytes(b"old")
    path = next(key.removesuffix(".weight") for key in tensors if key.endswith("to_q.weight"))
    lora = random_lora(tuple(tensors[f"{path}.weight"].shape), 1, scale=1.0)
    webui_file("lora.safetensors", {"unet": {path: lora}})
    for strength in (1.0, -2.0):
        code, out, err = tool(lora_merge, "--lora_path", "lora.safetensors", "--alpha", strength, "--base_model", "model", "--dump_path", "new")
        assert code == 0 and "not copied, since it would hold the weights without the LoRA: all.safetensors, unet/diffusion_pytorch_model.bin" in out, err
        for variant, tolerance in (("", 1e-6), (".fp16", 2e-3)):
            found = read_tensors(f"new/unet/diffusion_pytorch_model{variant}.safetensors")[0][f"{path}.weight"]
            assert torch.allclose(found.double(), tensors[f"{path}.weight"].double() + strength * lora.delta(D), rtol=tolerance, atol=tolerance)
        assert (tmp_path / "new/vae/kept.bin").read_bytes() == b"old" and not (tmp_path / "new/unet/diffusion_pytorch_model.bin").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "model", "new"]


def test_merged_weights_are_those_that_diffusers_fuses(tiny_sd1, tool):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None, requires_safety_checker=False)
    layers = {"unet": {name: random_lora(tuple(m.weight.shape), n, rank=4, alpha=2.0) for n, (name, m) in enumerate(pipeline.unet.named_modules())
                       if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and name.endswith(("to_q", "to_out.0", "proj_in", "ff.net.2"))}}
    webui_file("lora.safetensors", layers)
    assert tool(lora_merge, "--lora_path", "lora.safetensors", "--alpha", "0.7", "--base_model", tiny_sd1, "--dump_path", "new")[0] == 0
    pipeline.load_lora_weights("lora.safetensors")
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    ours, theirs = read_tensors("new/unet/diffusion_pytorch_model.safetensors")[0], pipeline.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in ours)


def test_resizing_loses_what_it_says_and_leaves_alone_what_is_small_enough(tool):
    layers = {"unet": {f"down_blocks.{n}.attentions.0.transformer_blocks.0.attn2.to_k": random_lora((16, 768), n, rank=2 + 3 * n, alpha=2.0) for n in range(3)}}
    webui_file("big.safetensors", layers, extra={"ss_tag_frequency": "{}", "ss_note": "x"})
    code, out, err = tool(lora_resize, "--lora_path", "big.safetensors", "--rank", "4", "--dump_path", "small")
    assert code == 0 and "metadata left out (--keep_metadata keeps it): ss_tag_frequency" in out, err
    found = load_lora("small.safetensors")
    small, big = found.layers["unet"], layers["unet"]
    assert [lora.rank for lora in small.values()] == [2, 4, 4] and all(small[path].scale == pytest.approx(big[path].scale) for path in big)
    first = next(iter(big))
    assert torch.equal(small[first].down, big[first].down) and torch.equal(small[first].up, big[first].up)
    lost = sum((small[path].delta(D) - big[path].delta(D)).norm() ** 2 for path in big) / sum(lora.delta(D).norm() ** 2 for lora in big.values())
    assert f"{100 * float(lost) ** 0.5:.3g} %" in out and found.metadata["ss_network_dim"] == "Dynamic" and found.metadata["ss_note"] == "x"
    fails(tool(lora_resize, "--lora_path", "big.safetensors", "--dump_path", "y"), "how small? --rank N")

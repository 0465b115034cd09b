"""--to_diffusers and --to_peft: what diffusers and peft make of the files is what the LoRA does, with mixed ranks and alphas on every kind of layer."""

import copy
import json

import peft
import pytest
import torch
from real_configs import SDXL_UNET, kohya_targets, locon_targets, meta_unet
from test_convert import SD1, SD2, SDXL, lora_for, merged_by_hand, random_lora, text_targets
from tiny import make_text_encoder, make_unet

from hcpdiff import cli
from hcpdiff.checkpoint.convert import distance, faults_of
from hcpdiff.checkpoint.export import write_diffusers, write_ours, write_peft, write_webui
from hcpdiff.checkpoint.format import load_lora, save_lora
from hcpdiff.checkpoint.io import read_tensors, save_tensors
from hcpdiff.checkpoint.peft_form import to_diffusers, to_peft, with_scale_one
from hcpdiff.errors import CheckpointError
from hcpdiff.lora_tensors import LoraTensors
from hcpdiff.tools import lora_convert

QK = "mid_block.attentions.0.transformer_blocks.0.attn1.to_"
TE = "text_model.encoder.layers.0.mlp.fc1"


def mixed(model, paths, text=False):
    """LoRA on these layers with ranks 2 to 4 and alphas of which few fit the rank."""
    modules = dict(model.named_modules())
    return {f"text_model.{path}" if text else path: random_lora(tuple(modules[path].weight.shape), number, rank=2 + number % 3, alpha=(3.0, 0.5, 1.0, 7.0)[number % 4])
            for number, path in enumerate(paths)}


def same_weights(got, expected, before):
    """Whether two models have the same weights within fp32's rounding, and these are not those from before."""
    got, expected, before = got.state_dict(), expected.state_dict(), before.state_dict()
    assert got.keys() == expected.keys() and sum(not torch.equal(expected[key], before[key]) for key in before) > 10
    return max(float((got[key] - expected[key]).abs().max()) for key in expected) < 1e-6


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {"unet": make_unet("sd1"), "text_encoder": make_text_encoder()}


@pytest.fixture(scope="module")
def layers(models):
    unet, text = models.values()
    return {"unet": mixed(unet, [*kohya_targets(unet), *locon_targets(unet)]), "text_encoder": mixed(text, text_targets(text), True)}


def test_peft_merges_what_the_lora_does(models, layers, tmp_path):
    paths = write_peft(tmp_path, layers, SD1, "sd_v1", name="x", kept={})
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["unet/adapter_model.safetensors", "text_encoder/adapter_model.safetensors"]
    for component, model in models.items():
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / component).merge_and_unload()
        assert same_weights(merged, merged_by_hand(copy.deepcopy(model), layers[component]), model)


def test_a_peft_adapter_keeps_every_bit_and_knows_its_part_when_it_is_moved(layers, tmp_path):
    layers = {"unet": {path: lora for path, lora in layers["unet"].items() if path.startswith("mid_block.attentions") and "attn" in path},
              "text_encoder_2": {path: LoraTensors(t.down.half(), t.up.half(), t.alpha) for path, t in layers["text_encoder"].items()}}
    write_peft(tmp_path, layers, SDXL, "sdxl_base_v1-0", name="x", kept={})
    for component, named in layers.items():
        (tmp_path / f"{component}.safetensors").write_bytes((tmp_path / component / "adapter_model.safetensors").read_bytes())
        back = load_lora(tmp_path / f"{component}.safetensors").layers
        assert back.keys() == {component} and back[component].keys() == named.keys()
        for path, lora in named.items():
            assert torch.equal(back[component][path].down, lora.down) and torch.equal(back[component][path].up, lora.up) and back[component][path].alpha == pytest.approx(lora.alpha, rel=1e-12)


def test_diffusers_makes_of_its_file_what_the_lora_does_also_where_alphas_are_mixed(tiny_sd1, layers, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1)
    before = {name: copy.deepcopy(getattr(pipe, name)) for name in layers}
    write_diffusers(tmp_path / "pytorch_lora_weights.safetensors", layers, SD1, "sd_v1", name="x", kept={})
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora(components=list(layers))
    pipe.unload_lora_weights()
    for name, model in before.items():
        assert same_weights(getattr(pipe, name), merged_by_hand(copy.deepcopy(model), layers[name]), model)


def test_a_diffusers_file_read_again_is_the_same_lora_and_says_nothing_of_a_missing_alpha(layers, tmp_path):
    write_diffusers(tmp_path / "d.safetensors", layers, SD1, "sd_v1", name="x", kept={"hcpdiff.step": "7"})
    file = load_lora(tmp_path / "d.safetensors")
    assert faults_of(file.layers, layers) == [] and file.notices == () and all(t.scale == 1 for named in file.layers.values() for t in named.values())
    assert file.metadata["hcpdiff.base_version"] == "sd_v1" and file.metadata["hcpdiff.step"] == "7"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rank", "alpha"), [(16, 16.0), (8, 4.0), (16, 1.0), (4, 8.0), (32, 0.5), (4, -2.0), (4, 0.0), (3, 2.0)])
def test_a_scale_goes_into_the_factors_without_loss(dtype, rank, alpha):
    lora = random_lora((12, 10, 3, 3), 0, rank=rank, alpha=alpha, dtype=dtype)
    plain = with_scale_one(lora)
    assert plain.scale == 1 and plain.up.shape == lora.up.shape
    assert (plain.up.dtype == dtype) == (rank != 3 and alpha != 0 or dtype == torch.float32)  # a power of two needs no more digits
    assert distance(lora, plain) < (2.0**-22 if dtype == torch.float16 or rank == 3 else 1e-15)


def test_numbers_that_fp16_could_not_hold_smaller_are_stored_wider():
    tiny = LoraTensors(torch.full((4, 6), 3 * 2.0**-24, dtype=torch.float16), torch.full((5, 4), 0.001, dtype=torch.float16), 4 * 2.0**-20)
    plain = with_scale_one(tiny)
    assert plain.down.dtype == torch.float32 and torch.equal(plain.delta(torch.float64), tiny.delta(torch.float64))
    lora = to_diffusers({"unet": {f"{QK}q": tiny, f"{QK}k": LoraTensors(tiny.down.clone().fill_(1), tiny.up, 4.0)}}, SD1)
    assert lora.widened == [f"unet {QK}q"] and {key: t.dtype for key, t in lora.tensors.items() if "lora_A" in key} == {
        f"unet.{QK}q.lora_A.weight": torch.float32, f"unet.{QK}k.lora_A.weight": torch.float16}


@pytest.mark.parametrize("family", [SD1, SD2])
def test_projections_have_the_dimensions_of_their_layer(family):
    path, flat = "mid_block.attentions.0.proj_in", LoraTensors(torch.ones(2, 6), torch.ones(6, 2), 2.0)
    for lora in (flat, LoraTensors(flat.down[..., None, None], flat.up[..., None, None], 2.0)):
        for tensors in (to_diffusers({"unet": {path: lora}}, family).tensors, to_peft({path: lora}, family, "unet").tensors):
            assert {t.dim() for t in tensors.values()} == {4 if family is SD1 else 2}


def test_text_encoders_are_named_as_their_models_are():
    named = {TE: random_lora((12, 6), 0)}
    assert list(to_diffusers({"text_encoder_2": named}, SDXL).tensors)[0] == f"text_encoder_2.{TE}.lora_A.weight"
    assert list(to_peft(named, SDXL, "text_encoder").tensors)[0] == "base_model.model.encoder.layers.0.mlp.fc1.lora_A.weight"  # CLIPTextModel of transformers 5
    assert list(to_peft(named, SDXL, "text_encoder_2").tensors)[0] == f"base_model.model.{TE}.lora_A.weight"  # CLIPTextModelWithProjection


def test_every_sdxl_layer_goes_to_every_target_and_back(tmp_path):
    unet = meta_unet(SDXL_UNET)
    layers = {"unet": lora_for(unet, kohya_targets(unet), rank=1, dtype=torch.float16)}
    ways = {"d": lambda path: write_diffusers(path, layers, SDXL, "sdxl_base_v1-0", name="x", kept={}), "w": lambda path: write_webui(path, layers, SDXL, "sdxl_base_v1-0", name="x", kept={})}
    for name, write in ways.items():
        write(tmp_path / f"{name}.safetensors")
        file = load_lora(tmp_path / f"{name}.safetensors")
        assert len(file.layers["unet"]) == 722 and faults_of(file.layers, layers) == []
    (path,) = write_peft(tmp_path, layers, SDXL, "sdxl_base_v1-0", name="x", kept={})
    assert faults_of(load_lora(path).layers, layers) == []


def test_a_file_that_would_change_the_lora_is_not_written(tmp_path, monkeypatch):
    from hcpdiff.checkpoint import export

    layers = {"unet": {f"{QK}q": random_lora((6, 6), 0, alpha=3.0)}}
    real = to_peft(layers["unet"], SD1, "unet")
    monkeypatch.setattr(export, "to_peft", lambda *_: type(real)(real.tensors, real.config | {"lora_alpha": 9}))
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is not written, .* its weight delta changed"):
        write_peft(tmp_path, layers, SD1, "sd_v1", name="x", kept={})
    assert not (tmp_path / "unet" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("write", [write_peft, write_ours], ids=["peft", "ours"])
def test_parts_are_written_all_or_none_and_older_ones_stay(tmp_path, write):
    """The second part cannot be written, since a folder lies in its place: the first is as it was, PEFT's config included."""
    layers = {part: {path: random_lora((6, 6), seed, alpha=3.0)} for seed, (part, path) in enumerate((("unet", f"{QK}q"), ("text_encoder", TE)))}
    extra = (SD1, "sd_v1") if write is write_peft else ("sd_v1",)
    for place, earlier in (("new", False), ("old", True)):
        if earlier:
            write(tmp_path / place, {"unet": {f"{QK}q": random_lora((6, 6), 7, rank=4, alpha=1.0)}}, *extra, name="x", kept={})
        before = {path: path.read_bytes() for path in (tmp_path / place).rglob("*") if path.is_file()}
        (tmp_path / place / ("text_encoder/adapter_model.safetensors" if write is write_peft else "text_encoder-x.safetensors")).mkdir(parents=True)
        with pytest.raises(CheckpointError, match="it is a folder"):
            write(tmp_path / place, layers, *extra, name="x", kept={})
        assert {path: path.read_bytes() for path in (tmp_path / place).rglob("*") if path.is_file()} == before


# --- the command ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The command in this process, in a folder with a run of two parts and a webui file of it."""
    monkeypatch.chdir(tmp_path)
    lora = {"unet": {f"{QK}{n}": random_lora((64, 64), i, rank=4, alpha=2.0) for i, n in enumerate("qk")}, "text_encoder": {TE: random_lora((64, 32), 5, rank=2, alpha=3.0)}}
    for component, named in lora.items():
        save_lora(f"run/ckpts/{component}-30.safetensors", named, {"component": component, "step": "30", "base_version": "sd_v1"})
    write_webui(tmp_path / "w.safetensors", lora, SD1, "sd_v1", name="w", kept={})

    def call(*args):
        with pytest.raises(SystemExit) as caught:
            cli.run(lora_convert.main, lora_convert.parser, list(map(str, args)))
        return caught.value.code, *capsys.readouterr()

    return call, lora


def test_all_targets_lead_back_to_the_same_lora(here, tmp_path):
    call, lora = here
    for args in (["--to_diffusers", "--lora_path", "run", "--dump_path", "d/"], ["--to_peft", "--lora_path", "d", "--dump_path", "p"],
                 ["--to_webui", "--lora_path", "p", "--dump_path", "w2.safetensors"], ["--from_webui", "--lora_path", "w2.safetensors", "--dump_path", "o", "--name", "1"]):
        code, out, err = call(*args)
        assert code == 0 and "of 3 layers change" in out or "of 2 layers change" in out, err
        assert call(*args)[0] == 0  # twice: what it made itself it replaces
    back = {name: load_lora(tmp_path / "o" / f"{name}-1.safetensors").layers[name] for name in lora}
    assert faults_of(back, lora) == []
    assert json.loads((tmp_path / "p/unet/adapter_config.json").read_text(encoding="utf-8"))["r"] == 4
    assert read_tensors(tmp_path / "w2.safetensors")[1]["ss_steps"] == "30"  # what training said goes along all the way


@pytest.mark.parametrize(("source", "target", "way"), [
    ("run", "x.safetensors", "to_webui"), ("run", "x/", "to_webui"), ("w.safetensors", "x/", "from_webui"), ("d", "x.safetensors", "to_webui"), ("d", "x", "from_webui"), ("p", "x/", "from_webui")])
def test_a_direction_that_is_not_told_is_found(here, source, target, way):
    call, _ = here
    call("--to_diffusers", "--lora_path", "run", "--dump_path", "d/")
    call("--to_peft", "--lora_path", "run", "--dump_path", "p/")
    code, out, err = call("--lora_path", source, "--dump_path", target)
    assert code == 0 and f"direction: --{way} (" in out and "family: Stable Diffusion 1.x (sd_v1), from the file's metadata" in out, err


def test_a_direction_that_cannot_be_found_is_asked_for(here, tmp_path):
    code, _, err = here[0]("--lora_path", "w.safetensors", "--dump_path", "x.safetensors")
    assert code == 2 and "which way? w.safetensors is a webui file and --dump_path x.safetensors names one file: --to_webui" in err and not (tmp_path / "x.safetensors").exists()


def test_what_somebody_else_made_is_not_replaced(here, tmp_path):
    call, _ = here
    (tmp_path / "p" / "unet").mkdir(parents=True)
    (tmp_path / "p" / "unet" / "adapter_config.json").write_text("{}", encoding="utf-8")
    save_tensors(tmp_path / "pytorch_lora_weights.safetensors", {"x": torch.ones(1)}, {})
    code, _, err = call("--to_peft", "--lora_path", "run", "--dump_path", "p")
    assert code == 2 and "adapter_config.json exists and was not made by this command; --overwrite replaces it" in err
    code, _, err = call("--to_diffusers", "--lora_path", "run", "--dump_path", ".")
    assert code == 2 and "pytorch_lora_weights.safetensors exists" in err
    assert call("--to_peft", "--lora_path", "run", "--dump_path", "p", "--overwrite")[0] == 0
    code, _, err = call("--to_peft", "--lora_path", "run", "--dump_path", "p.safetensors")
    assert code == 2 and "--dump_path p.safetensors: this is a folder" in err

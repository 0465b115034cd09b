"""Where base models come from: folders, the hub's cache, and what is said when neither has them."""

import json
import os
import re
import subprocess
import sys

import pytest

from hcpdiff.errors import ConfigError
from hcpdiff.families import detect
from hcpdiff.families.source import MOVED, check_complete, offline_faults, resolve
from hcpdiff.families.weight_file import folder_weights


def message(source: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(source)
    return str(caught.value)


def test_a_folder_is_taken_as_it_is(tiny_sd1):
    assert resolve(str(tiny_sd1)) == (tiny_sd1, [])
    assert detect(tiny_sd1).name == "sd"


def test_settings_that_mean_nothing_for_a_local_model_are_told(tiny_sd1, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert resolve(str(tiny_sd1), "main", "fp16")[1] == ["model.revision = 'main' has no effect: model.pretrained_model_name_or_path is a folder."]
    notices = resolve(str(file), "main", "fp16", "pretrained_model")[1]
    assert notices == ["revision = 'main' has no effect: pretrained_model is a single file.", "variant = 'fp16' has no effect: pretrained_model is a single file."]


def test_a_missing_folder_names_its_neighbours(tmp_path):
    (tmp_path / "my-model").mkdir()
    assert "my-model" in message(str(tmp_path / "my-modle"))


def test_a_file_that_holds_no_model_says_what_is_taken(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    assert "is a file, but not one of .safetensors or .ckpt" in message(str(tmp_path / "model.pt"))


def test_a_file_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no such folder or file" in message("models/some.safetensors")


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no model_index.json"):
        detect(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="FluxPipeline; supported: StableDiffusionPipeline"):
        detect(tmp_path)
    (tmp_path / "model_index.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        detect(tmp_path)


def test_a_hub_id_that_cannot_be_had_says_how_and_names_the_moved_one():
    """The tests run with the hub offline."""
    assert "HF_ENDPOINT" in message("somebody/some-model-that-is-not-cached")
    (old, new), = MOVED.items()
    text = message(old)
    assert new in text and "withdrawn" in text


def test_a_withdrawn_id_takes_the_local_cache_of_the_moved_one(tiny_sd1, tmp_path, monkeypatch):
    """A cache as the hub's client lays it out: the second name's snapshot answers for the first."""
    import shutil

    (old, new), = MOVED.items()
    repo = tmp_path / f"models--{new.replace('/', '--')}"
    shutil.copytree(tiny_sd1, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder, notices = resolve(old)
    assert (folder / "unet").is_dir() and new in notices[0]


OUTSIDE, NO_MAP = "names files outside its folder, such as ", "has no map of weights to files"


@pytest.mark.parametrize("variant", ["", "fp16"])
@pytest.mark.parametrize("content,told", [
    ({}, NO_MAP), ({"weight_map": ["a"]}, NO_MAP), ({"weight_map": {"a": 1}}, NO_MAP), ({"weight_map": {"a": "../../x.safetensors"}}, OUTSIDE + "'../../x.safetensors'"),
    ({"weight_map": {"a": "b.safetensors", "c": "/x.safetensors"}}, OUTSIDE + "'/x.safetensors'"), ({"weight_map": {"a": ".."}}, OUTSIDE + "'..'")])
def test_an_index_that_is_none_or_leads_out_of_its_folder_is_refused(tmp_path, variant, content, told):
    index = tmp_path / "unet" / f"diffusion_pytorch_model.safetensors.index{variant and '.' + variant}.json"
    index.parent.mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}", "utf-8")
    index.write_text(json.dumps(content), "utf-8")
    for read in (lambda: check_complete(tmp_path, ["unet"]), lambda: folder_weights(tmp_path / "unet", variant or None, clip=False).shapes):
        with pytest.raises(ConfigError, match=re.escape(told)):
            read()


CONFIG = """
train: {{train_steps: 1}}
model: {{pretrained_model_name_or_path: '{model}'}}
lora_unet:
  - {{lr: 1.0, rank: 2, layers: ['re:.*attn2$']}}
data: {{one: {{source: {{a: {{img_root: .}}}}}}}}
"""


def command(name, place, *arguments):
    """(what a command says, 'exit code, whether torch was read') with an empty cache and the hub offline."""
    code = (f"import sys\nfrom hcpdiff import cli, {name} as command\n"
            "try:\n    cli.run(command.main, command.parser, sys.argv[1:])\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, "--cfg", "cfg.yaml", *arguments], cwd=place, capture_output=True, text=True, encoding="utf-8", timeout=300,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hub")})
    return done.stderr, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("argument, key", [("model.pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5", "model.pretrained_model_name_or_path"), ("model.vae=some/vae", "model.vae")])
def test_offline_a_hub_id_that_is_not_in_the_cache_is_told_before_torch_is_read(tmp_path, tiny_sd1, argument, key):
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
    message, end = command("train_ac_single", tmp_path, argument)
    assert f"{key} = " in message and "HF_HUB_OFFLINE keeps the hub from being asked" in message, message
    assert ("Nor is stable-diffusion-v1-5/stable-diffusion-v1-5" in message) == ("runwayml" in argument) and end == "2 False"


def test_offline_a_model_in_the_cache_is_left_to_be_read(tmp_path, monkeypatch):
    from huggingface_hub import try_to_load_from_cache

    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert offline_faults("some/model") and offline_faults("runwayml/stable-diffusion-v1-5")
    for name in ("models--some--model", "models--stable-diffusion-v1-5--stable-diffusion-v1-5"):
        snapshot = tmp_path / name / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "model_index.json").write_text("{}", encoding="utf-8")
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text("abc", encoding="utf-8")
    for name in ("some/model", MOVED["runwayml/stable-diffusion-v1-5"]):  # as the hub's client sees it
        assert try_to_load_from_cache(name, "model_index.json")
    assert not offline_faults("some/model") and not offline_faults("runwayml/stable-diffusion-v1-5")
    assert offline_faults("some/model", revision="other") and offline_faults("some/model", files=("config.json",))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert not offline_faults("some/other")


@pytest.mark.parametrize("environment, named", [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"), ({"TRANSFORMERS_OFFLINE": "1"}, "TRANSFORMERS_OFFLINE"),
                                                ({"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "on"}, "TRANSFORMERS_OFFLINE"),
                                                ({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}, "HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE")])
def test_the_variables_that_are_set_are_named(monkeypatch, tmp_path, environment, named):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    [fault] = offline_faults("some/model")
    assert f"and {named} keep" in fault and fault.count("OFFLINE") == named.count("OFFLINE")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="rights are given up as POSIX does it")
def test_a_cache_that_cannot_be_looked_at_is_left_to_who_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0)
    user = os.geteuid()
    try:
        if user == 0:
            tmp_path.chmod(0)
            os.seteuid(65534)
        assert offline_faults("some/model") == offline_faults("some/model", revision="main") == []
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
        (tmp_path / "cache").chmod(0o700)


def test_offline_a_drawing_tells_it_too(tmp_path):
    (tmp_path / "cfg.yaml").write_text("pretrained_model: some/model\nvae: other/vae\nprompt: a cat\nout_dir: out", encoding="utf-8")
    message, end = command("visualizer", tmp_path)
    assert "pretrained_model = 'some/model'" in message and "vae = 'other/vae'" in message and end == "2 False", message

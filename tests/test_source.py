"""Where base models come from: folders, the hub's cache, and what is said when neither has them."""

import json
import re

import pytest

from hcpdiff.errors import ConfigError
from hcpdiff.families import detect
from hcpdiff.families.source import MOVED, check_complete, resolve
from hcpdiff.families.weight_file import diffusers_weights


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
    for read in (lambda: check_complete(tmp_path, ["unet"]), lambda: diffusers_weights(tmp_path / "unet", variant or None).shapes):
        with pytest.raises(ConfigError, match=re.escape(told)):
            read()

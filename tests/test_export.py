"""train.export: each save also writes the file for webui, with what was trained, what it says of it, and a cover; it is kept, resumed and dropped like the others."""

import base64
import hashlib
import io
import json
from datetime import datetime
from pathlib import Path

import pytest
import run_help
import torch
from lora_help import command, fails
from PIL import Image

from hcpdiff.checkpoint import sums, tidy
from hcpdiff.checkpoint.convert import faults_of, join
from hcpdiff.checkpoint.export import payload_hash
from hcpdiff.checkpoint.format import load_lora
from hcpdiff.checkpoint.io import read_tensors
from hcpdiff.checkpoint.metadata import carried
from hcpdiff.config.load import load
from hcpdiff.config.schema import ExportConfig
from hcpdiff.errors import CheckpointError, ConfigError
from hcpdiff.tools import lora_convert
from hcpdiff.train.export import WebuiExport, check_export

CONFIG = """
exp_dir: '{place}/run'
seed: 1
mixed_precision: fp32
model: {{pretrained_model_name_or_path: '{model}'}}
lora_unet:
  - {{lr: 0.01, rank: 2, alpha: 1, layers: ['re:.*attn2\\.to_k$']}}
  - {{lr: 0.02, rank: 3, layers: ['re:mid_block.*proj_in$']}}
lora_text_encoder: [{{lr: 0.003, rank: 1, layers: ['re:.*q_proj$']}}]
train: {{train_steps: 3, save_step: 2, cpu_threads: 1, log_step: 1, workers: 0, optimizer: {{_target_: torch.optim.SGD}}, export: true}}
data:
  one:
    batch_size: 2
    source: {{cats: {{img_root: '{place}/images', caption_file: '{place}/images', word_names: {{pt1: Pt-Cat}}, repeats: 2}}}}
    bucket: {{target_area: 4096, num_bucket: 2}}
logger: [{{_target_: hcpdiff.loggers.FileLogger}}]
"""
PREVIEW = ("preview.prompts=[a cat]", "preview.every=1", "preview.num_inference_steps=1", "preview.width=64", "preview.height=64")


@pytest.fixture
def config(tmp_path, tiny_sd1):
    """Path of a config; its pictures lie beside it."""
    run_help.images(tmp_path / "images", 3)
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(place=tmp_path, model=tiny_sd1), encoding="utf-8")
    return str(tmp_path / "cfg.yaml")


def exported(run, step=3, name="run"):
    return read_tensors(run.folder / "webui" / f"{name}-{step}.safetensors")


def test_each_save_writes_what_was_trained_with_true_metadata(config, tmp_path):
    run, log = run_help.run(config)
    webui = tmp_path / "run" / "webui"
    assert sorted(path.name for path in webui.iterdir()) == ["run-2.safetensors", "run-3.safetensors"] and str(webui / "run-2.safetensors") in log
    ours = [tmp_path / "run" / "ckpts" / f"{stem}-3.safetensors" for stem in ("unet", "text_encoder")]
    file = load_lora(webui / "run-3.safetensors")
    assert file.spelling == "webui" and faults_of(file.layers, join([(path, load_lora(path)) for path in ours])) == []
    tensors, said = exported(run)
    assert said["sshs_model_hash"] == payload_hash(webui / "run-3.safetensors") == hashlib.sha256((webui / "run-3.safetensors").read_bytes()[-sum(t.nbytes for t in tensors.values()):]).hexdigest()
    assert said["modelspec.hash_sha256"] == f"0x{said['sshs_model_hash']}"
    expected = {
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_output_name": "run-3", "ss_network_module": "networks.lora", "ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic",
        "ss_steps": "3", "ss_epoch": "1", "ss_max_train_steps": "3", "ss_num_epochs": "1", "ss_seed": "1", "ss_unet_lr": "[0.01, 0.02]", "ss_text_encoder_lr": "0.003",
        "ss_learning_rate": "[0.01, 0.02]", "ss_num_train_images": "6", "ss_num_batches_per_epoch": "3", "ss_total_batch_size": "2", "ss_mixed_precision": "no", "ss_clip_skip": "1",
        "ss_sd_model_name": "model", "ss_optimizer": "torch.optim.SGD", "ss_lr_scheduler": "constant_with_warmup", "ss_cache_latents": "True", "ss_loss_type": "l2", "modelspec.title": "run-3",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.prediction_type": "epsilon", "modelspec.timestep_range": "0,1000"}
    assert {key: said.get(key) for key in expected} == expected
    buckets = json.loads(said["ss_bucket_info"])["buckets"]
    assert sum(bucket["count"] for bucket in buckets.values()) == 6 and json.loads(said["ss_dataset_dirs"]) == {"2_cats": {"n_repeats": 2, "img_count": 3}}
    assert float(said["ss_training_started_at"]) == run.loaded.now.timestamp() == datetime.fromisoformat(said["modelspec.date"]).timestamp() + run.loaded.now.microsecond / 1e6
    for private in ("blue", "number", "Pt-Cat", "images/", str(tmp_path)):  # no caption, trigger word, path unless asked for
        assert private not in json.dumps(said), private
    assert not any(key.startswith(("ssmd_", "modelspec.thumbnail")) for key in said)


def test_an_sdxl_file_has_ldm_names_both_encoders_and_is_found_among_sdxl_files(config, tmp_path, tiny_sdxl):
    groups = "lora_text_encoder=[{lr: 1, rank: 1, layers: ['re:te1.*fc1$', 're:te2.*q_proj$']}, {lr: 2, rank: 2, layers: ['re:te2.*fc2$']}]"
    run, _ = run_help.run(config, f"model.pretrained_model_name_or_path={tiny_sdxl}", groups, "train.train_steps=1", "model.clip_skip=0")
    tensors, said = exported(run, 1)
    bases = {key.split(".")[0] for key in tensors}
    assert {base.split("_")[1] for base in bases} == {"unet", "te1", "te2"} and "lora_unet_middle_block_1_proj_in" in bases
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in bases and not any("_blocks_" in base and "transformer_blocks" not in base and "put_blocks" not in base for base in bases)
    attention = {base for base in bases if "te2" in base and "layers_0_self_attn" in base}
    assert len(attention) == 4  # q was trained; webui passes over an attention without the other three
    expected = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_v2": "False", "ss_clip_skip": "2", "ss_text_encoder_lr": "[1.0, 1.0, 2.0]"}
    assert {key: said[key] for key in expected} == expected
    parts = [tmp_path / "run" / "ckpts" / f"{stem}-1.safetensors" for stem in ("unet", "text_encoder", "text_encoder_2")]
    assert faults_of(load_lora(tmp_path / "run" / "webui" / "run-1.safetensors").layers, join([(path, load_lora(path)) for path in parts])) == []


def test_the_converter_does_not_replace_it_unasked(config, tmp_path, capsys):
    run_help.run(config)
    path = tmp_path / "run" / "webui" / "run-3.safetensors"
    before = path.read_bytes()
    fails(command(lora_convert, capsys, "--lora_path", tmp_path / "run", "--dump_path", path), "run-3.safetensors exists and was not made by this command")
    assert path.read_bytes() == before


def test_weight_files_are_the_same_with_and_without_it(config, tmp_path):
    for number, words in enumerate(([], ["train.export=false"])):
        run_help.run(config, f"exp_dir={tmp_path}/{number}", *words)
    files = [{path.name: path.read_bytes() for path in (tmp_path / number / "ckpts").iterdir()} for number in "01"]
    assert files[0] == files[1] and not (tmp_path / "1" / "webui").exists()


def test_name_type_tags_cover_and_own_entries_are_as_asked(config, tmp_path):
    run, log = run_help.run(config, "train.export.name=my cat", "train.export.save_dtype=bf16", "train.export.tag_frequency=true", "train.export.metadata={modelspec.author: me}", *PREVIEW)
    tensors, said = exported(run, name="my cat")
    assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {torch.bfloat16}
    assert said["ss_output_name"] == "my cat-3" and said["modelspec.author"] == "me" and said["modelspec.trigger_phrase"] == "Pt-Cat"
    assert json.loads(said["ss_tag_frequency"]) == {"2_cats": {"Pt-Cat": 3, "blue": 3, "green": 3, "red": 3, "number 0": 1, "number 1": 1, "number 2": 1}}
    for step in (2, 3):  # the picture is that of the very step: previews are drawn before the save
        cover = Image.open(io.BytesIO(base64.b64decode(json.loads(exported(run, step, "my cat")[1]["ssmd_cover_images"])[0])))
        drawn = Image.open(tmp_path / "run" / "previews" / f"{step}-0.png")
        assert cover.size == drawn.size == (64, 64)
        assert sum(abs(a - b) for a, b in zip(cover.convert("L").tobytes(), drawn.convert("L").tobytes(), strict=True)) / 64**2 < 12
    assert said["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert set(carried(said)[1]) == {"ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info"}  # a picture's base64 is no path
    run, _ = run_help.run(config, f"exp_dir={tmp_path}/bare", "train.export.cover=false", *PREVIEW)
    assert "ssmd_cover_images" not in exported(run, name="bare")[1]


def test_it_is_in_the_sums_and_goes_with_its_step(config, tmp_path):
    run, _ = run_help.run(config, "train.save_step=1", "train.keep_last=1", "train.keep_states=1", "train.keep_every=2")
    assert sorted(path.name for path in (tmp_path / "run" / "webui").iterdir()) == ["run-2.safetensors", "run-3.safetensors"]
    assert "../../webui/run-3.safetensors" in sums.read_sums(tmp_path / "run" / "states" / "3")
    (tmp_path / "run" / "webui" / ".run-4.safetensors.123.0123abcd.tmp").touch()
    assert tidy.remove_leftovers(tmp_path / "run") == 1
    folder, moved = tidy.set_aside(tmp_path / "run", 2)
    assert "webui/run-3.safetensors" in moved and (folder / "webui" / "run-3.safetensors").is_file() and (tmp_path / "run" / "webui" / "run-2.safetensors").is_file()


def test_a_resumed_run_writes_the_files_of_one_that_was_not_stopped(config, tmp_path):
    whole, _ = run_help.run(config, f"exp_dir={tmp_path}/whole/run")
    parts, _ = run_help.run(config, stop=1)
    again, log = run_help.run(config, f"train.resume={tmp_path}/run")
    assert "another run" not in log
    (a, said), (b, as_well) = exported(whole), exported(again)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert exported(again)[1]["ss_training_started_at"] == str(parts.loaded.now.timestamp()) != str(again.loaded.now.timestamp())
    times = ("ss_training_started_at", "modelspec.date")
    assert {key: value for key, value in said.items() if key not in times} == {key: value for key, value in as_well.items() if key not in times}


def test_a_file_that_cannot_be_written_is_a_failed_save(config, tmp_path, monkeypatch):
    real = WebuiExport.write

    def write(self, step, layers):
        (self.run / "webui" / f"{self.run.name}-2.safetensors").mkdir(parents=True, exist_ok=True)
        return real(self, step, layers)

    monkeypatch.setattr(WebuiExport, "write", write)
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved: .*run-2.safetensors cannot be written: it is a folder"):
        run_help.run(config)
    run, log = run_help.run(config, "train.on_save_error=continue", f"exp_dir={tmp_path}/on")
    assert "step 2 could not be saved" in log and (run.folder / "webui" / "on-3.safetensors").is_file() and [path.name for path in (run.folder / "states").iterdir()] == ["3"]


def test_layers_that_webui_has_no_name_for_are_told_before_the_first_step(config, tmp_path):
    words = ["lora_unet=[{lr: 1, layers: ['conv_in']}]", "lora_text_encoder=null"]
    run_help.run(config, *words, "train.train_steps=1")
    assert "lora_unet_conv_in.alpha" in exported(type("Run", (), {"folder": tmp_path / "run"}), 1)[0]

    class Trained:
        component = type("Component", (), {"name": "unet"})

        @staticmethod
        def export():
            return {"class_embedding.linear_1": None}

    with pytest.raises(ConfigError, match="webui has no name for 1 of the layers that are trained, such as unet class_embedding.linear_1"):
        check_export(ExportConfig(webui=True), "sd_v1", [Trained])
    with pytest.raises(ConfigError, match="webui has no LoRA files for a base model of the kind 'flux'"):
        check_export(ExportConfig(webui=True), "flux", [])
    check_export(ExportConfig(), "flux", [])


@pytest.mark.parametrize(("argument", "on", "name"), [
    ([], False, None), (["train.export=true"], True, None), (["train.export=true", "train.export.name=x"], True, "x"), (["train.export=null"], False, None),
    (["train.export={webui: true, name: y}"], True, "y"), (["train.export={name: x, tag_frequency: true}"], True, "x"), (["train.export.name=x"], True, "x"),
    (["train.export={name: null, tag_frequency: false}"], False, None), (["train.export={webui: false, name: x}"], False, "x"), (["train.export=false", "train.export.name=x"], False, "x")])
def test_one_word_turns_it_on(config, argument, on, name):
    text = Path(config).read_text(encoding="utf-8")
    Path(config).write_text(text.replace(", export: true", ""), encoding="utf-8")
    made = load(config, argument).config.train.export
    assert (made.webui, made.name) == (on, name)
    Path(config).write_text(text, encoding="utf-8")
    assert load(config, []).config.train.export.webui


def test_a_key_set_over_the_templates_false_turns_it_on_and_the_runs_own_config_loads_as_it_was(config, tmp_path):
    text = Path(config).read_text(encoding="utf-8").replace(", export: true", ", export: {name: x}")
    (tmp_path / "base.yaml").write_text("train: {export: {webui: false, name: null}}\n", encoding="utf-8")
    for base in ("", f"_base_: [{tmp_path / 'base.yaml'}]\n"):
        Path(config).write_text(base + text, encoding="utf-8")
        made = load(config, [])
        assert made.config.train.export.webui and any("train.export.name" in line and "turns train.export on" in line for line in made.notices)
        assert not load(config, ["train.export=false"]).config.train.export.webui
    for arguments, on in (([], True), (["train.export=false"], False)):
        (tmp_path / "frozen.yaml").write_text(load(config, arguments).yaml, encoding="utf-8")
        again = load(str(tmp_path / "frozen.yaml"), []).config.train.export
        assert (again.webui, again.name) == (on, "x")


def test_faults_of_its_keys_are_named(config):
    with pytest.raises(ConfigError) as caught:
        load(config, ["train.export.name=a/b", "train.export.metadata={author: me}", "train.export.save_dtype=int8"])
    assert len(caught.value.faults) == 3 and all(f"train.export.{key}" in str(caught.value) for key in ("save_dtype", "name = 'a/b'", "metadata: 'author'"))
    with pytest.raises(ConfigError, match="train.export.name = 'a/b' cannot be a file's name") as caught:
        load(config, ["train.export.name=a/b", "train.export.metadata={author: me}"])
    assert "train.export.metadata: 'author' must begin with ss_" in str(caught.value)
    with pytest.raises(ConfigError, match="train.export = 'maybe' .* true or false or a map is expected"):
        load(config, ["train.export=maybe"])

"""Wrong input at the training command line: exit code 2, one message that names it, no traceback, nothing half-written.

The command runs in this process (a Python of its own takes five seconds to import torch); tests/test_cli.py and test_guide.py start it as users do.
"""

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hcpdiff import cli, train_ac_single

CONFIG = """
train: {{train_steps: 2, cpu_threads: 1}}
model: {{pretrained_model_name_or_path: '{model}'}}
lora_unet:
  - {{lr: 1e-3, rank: 2, layers: ['re:.*to_k$']}}
data:
  dataset1:
    batch_size: 2
    source: {{a: {{img_root: images, caption_file: images, word_names: {{pt1: thing}}}}}}
    bucket: {{target_area: 4096, num_bucket: 1}}
"""


@pytest.fixture
def place(tmp_path, tiny_sd1, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 90, 30)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text("a thing", encoding="utf-8")
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
    return tmp_path


def refuse(place: Path, *arguments: str) -> str:
    """Runs the command, expects refusal, and returns the message."""
    before = {path for path in place.rglob("*")}
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
        cli.run(train_ac_single.main, train_ac_single.parser, ["--cfg", "cfg.yaml", *arguments])
    out, told = out.getvalue(), told.getvalue()
    assert ended.value.code == 2, out[-2000:] + told[-2000:]
    assert "Traceback" not in out + told and told.count("error:") == 1
    new = {path for path in place.rglob("*")} - before
    assert not {path for path in new if path.name != "exps"}, new
    return told


def write(place: Path, old: str, new: str) -> None:
    path = place / "cfg.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_missing_model_folder(place):
    message = refuse(place, "model.pretrained_model_name_or_path=./no/such/model")
    assert "model.pretrained_model_name_or_path" in message and "no/such/model" in message


def test_incomplete_model_folder_names_every_missing_part(place, tiny_sd1):
    copy = place / "model"
    shutil.copytree(tiny_sd1, copy)
    shutil.rmtree(copy / "vae")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    message = refuse(place, "model.pretrained_model_name_or_path=model")
    assert "unet/ has no weights" in message and "vae" in message


def test_truncated_model_weights_are_named(place, tiny_sd1):
    copy = place / "model"
    shutil.copytree(tiny_sd1, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert str(Path("model") / "unet") in refuse(place, "model.pretrained_model_name_or_path=model")


def test_model_with_missing_weights_is_refused_rather_than_drawn_at_random(place, tiny_sd1):
    from safetensors.torch import load_file

    copy = place / "model"
    shutil.copytree(tiny_sd1, copy)
    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if key.endswith("fc1.weight")))
    save_file(tensors, path, {"format": "pt"})
    message = refuse(place, "model.pretrained_model_name_or_path=model")
    assert "1 weights are missing" in message and "fc1.weight" in message


def test_missing_image_folder(place):
    message = refuse(place, "data.dataset1.source.a.img_root=imagez")
    assert "img_root" in message and "imagez" in message


def test_empty_image_folder(place):
    (place / "empty").mkdir()
    assert "empty" in refuse(place, "data.dataset1.source.a.img_root=empty", "data.dataset1.source.a.caption_file=null")


def test_damaged_images_are_all_named(place):
    for i in (0, 2):
        path = place / "images" / f"{i}.png"
        path.write_bytes(path.read_bytes()[:40])
    message = refuse(place)
    assert "0.png" in message and "2.png" in message and "skip_bad_images" in message


def test_captions_that_match_nothing(place):
    (place / "captions.json").write_text('{"x": "a", "y": "b"}', encoding="utf-8")
    message = refuse(place, "data.dataset1.source.a.caption_file=captions.json")
    assert "captions.json" in message


def test_placeholder_without_a_word(place):
    (place / "template.txt").write_text("{pt1}, {pt2}, {caption}", encoding="utf-8")
    message = refuse(place, "data.dataset1.source.a.prompt_template=template.txt")
    assert "pt2" in message and "word_names" in message


def test_pattern_without_a_match_and_overlapping_groups(place):
    write(place, "['re:.*to_k$']", "['re:.*to_kk$']")
    assert "to_k" in refuse(place)
    write(place, "- {lr: 1e-3, rank: 2, layers: ['re:.*to_kk$']}", "- {lr: 1e-3, layers: ['re:.*attn1$']}\n  - {lr: 1e-3, layers: ['re:.*to_k$']}")
    assert "both claim" in refuse(place)


def test_init_lora_of_another_architecture(place):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    save_file({f"{name}.lora_down.weight": torch.randn(2, 320), f"{name}.lora_up.weight": torch.randn(320, 2), f"{name}.alpha": torch.tensor(2.0)}, place / "other.safetensors")
    message = refuse(place, "model.init_lora=other.safetensors")
    assert "another architecture" in message and name in message


def test_truncated_init_lora(place):
    save_file({"a.lora_down.weight": torch.randn(2, 320)}, place / "whole.safetensors")
    (place / "cut.safetensors").write_bytes((place / "whole.safetensors").read_bytes()[:300])
    assert "cut.safetensors" in refuse(place, "model.init_lora=cut.safetensors")


def test_unwritable_output(place):
    (place / "file").write_text("")
    message = refuse(place, "exp_dir=file/run")
    assert "exp_dir" in message and "file" in message


def test_faults_of_model_data_and_optimizer_come_together(place, tiny_sd1):
    (place / "images" / "1.png").write_bytes(b"no image")
    shutil.copytree(tiny_sd1, place / "model")
    shutil.rmtree(place / "model" / "scheduler")
    message = refuse(place, "model.pretrained_model_name_or_path=model", "train.optimizer._target_=torch.utils.collect_env.run")
    assert "scheduler" in message and "collect_env" in message and "1.png" in message


def test_an_image_cut_off_at_its_end_is_found_before_the_folder_is_made(place):
    noise = Image.effect_noise((64, 64), 80)
    noise.save(place / "images" / "9.png")
    whole = (place / "images" / "9.png").read_bytes()
    (place / "images" / "9.png").write_bytes(whole[: len(whole) // 2])
    (place / "images" / "9.txt").write_text("x", encoding="utf-8")
    assert "9.png" in refuse(place)


def test_a_chosen_folder_that_is_taken(place):
    (place / "taken").mkdir()
    (place / "taken" / "x").write_text("mine")
    assert "not empty" in refuse(place, "exp_dir=taken")
    assert (place / "taken" / "x").read_text() == "mine"


def test_timesteps_out_of_range_and_too_deep_clip_skip(place):
    assert "max_timestep" in refuse(place, "train.max_timestep=2000")
    assert "clip_skip = 9" in refuse(place, "model.clip_skip=9")


def test_nothing_to_train(place):
    assert "nothing to train" in refuse(place, "lora_unet=null")


@pytest.mark.parametrize("change, says", [("train.resume=latest", "no run below exps"), ("train.resume=old", "holds no training state"), ("exp_dir=old", "'old' is not empty"),
                                          ("model.pretrained_model_name_or_path=images/modle", "no folder or file here")])
def test_folders_are_looked_at_before_torch_is_loaded(place, monkeypatch, change, says):
    """What follows the first checks begins with the libraries' quieting; the model's faults are told beside the folder's."""
    (place / "old" / "images").mkdir(parents=True)
    monkeypatch.setattr("hcpdiff.quiet.quiet_libraries", lambda: pytest.fail("the libraries are loaded"))
    told = refuse(place, change)
    assert says in told
    if "model." not in change:
        (place / "none").mkdir()
        told = refuse(place, change, "model.pretrained_model_name_or_path=none")
        assert says in told and "model_index.json" in told


def test_resume_of_nothing(place):
    (place / "run").mkdir()
    assert "holds no training state" in refuse(place, "train.resume=run")
    assert "latest" in refuse(place, "train.resume=latest")

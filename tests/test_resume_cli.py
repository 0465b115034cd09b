"""A run that is stopped and resumed at the command line ends in the bits of one that was not (which runs in this process, without loader workers)."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import run_help
import torch
from PIL import Image
from safetensors.torch import load_file

CONFIG = """
train: {{train_steps: 9, save_step: 4, log_step: 2, cpu_threads: 1, gradient_accumulation_steps: 2, workers: 1, scheduler: {{name: cosine, num_training_steps: 9}}}}
model: {{pretrained_model_name_or_path: '{model}'}}
lora_unet:
  - {{lr: 1e-3, rank: 2, layers: ['re:.*attn2$'], dropout: 0.2}}
lora_text_encoder:
  - {{lr: 1e-3, rank: 2, layers: ['re:.*self_attn$'], dropout: 0.2}}
data:
  first:
    batch_size: 2
    cache_latents: none
    source: {{a: {{img_root: images, caption_file: images, word_names: {{pt1: thing}}, tag_shuffle: true, tag_dropout: 0.3, caption_dropout: 0.2, flip: true}}}}
    bucket: {{target_area: 4096, step_size: 32, num_bucket: 2, crop: random}}
  second:
    batch_size: 1
    loss_weight: 0.5
    source: {{b: {{img_root: images, repeats: 2}}}}
    bucket: {{sizes: [[64, 64]]}}
"""


def run(place: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "hcpdiff.train_ac_single", "--cfg", "cfg.yaml", *arguments], cwd=place, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def interrupted(place: Path, *arguments: str) -> int:
    """Starts a run, sends Ctrl-C once its fourth step is saved, and returns the exit code."""
    process = subprocess.Popen([sys.executable, "-m", "hcpdiff.train_ac_single", "--cfg", "cfg.yaml", *arguments], cwd=place, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    for line in process.stdout:
        if line.startswith("saved"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert "to go on: the same command with train.resume=parts" in rest, rest
    return process.wait(60)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_sd1):
    place = tmp_path_factory.mktemp("resume")
    (place / "images").mkdir()
    for i in range(7):
        Image.effect_noise((100, 60) if i % 3 else (64, 80), 20 * i + 10).save(place / "images" / f"{i}.png")
        (place / "images" / f"{i}.txt").write_text(f"red, blue, number {i}, green", encoding="utf-8")
    (place / "cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
    with contextlib.chdir(place):
        run_help.run("cfg.yaml", "exp_dir=whole", "train.workers=0")
    assert interrupted(place, "exp_dir=parts") == 130
    output = run(place, "train.resume=parts", "exp_dir=elsewhere", "train.workers=0")
    return place / "whole", place / "parts", output


def scalars(folder: Path) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tblog"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("stem", ["unet", "text_encoder"])
@pytest.mark.parametrize("step", [4, 8, 9])
def test_weights_are_the_same_bits(runs, stem, step):
    whole, parts = (load_file(folder / "ckpts" / f"{stem}-{step}.safetensors") for folder in runs[:2])
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_optimizer_states_are_the_same_bits(runs):
    whole, parts = (load_file(folder / "states" / "9" / "state.safetensors") for folder in runs[:2])
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    trees = [json.loads((folder / "states" / "9" / "state.json").read_text(encoding="utf-8"))["tree"] for folder in runs[:2]]
    assert trees[0]["positions"] == trees[1]["positions"] and trees[0]["step"] == 9


def test_tensorboard_has_each_step_once_with_the_same_values(runs):
    whole, parts = (scalars(folder) for folder in runs[:2])
    assert whole == parts and [step for step, _ in whole["loss"]] == list(range(1, 10))


def test_the_log_says_where_it_went_on_and_the_folder_is_the_same(runs):
    assert "exp_dir = 'elsewhere' is not used: the run goes on in parts" in runs[2] and not (runs[1].parent / "elsewhere").exists()
    (step,) = re.findall(r"resumed after step (\d)", runs[2])
    assert step in "56" and (runs[1] / f"cfg-resumed-{step}.yaml").is_file() and (runs[1] / "ckpts" / f"unet-{step}.safetensors").is_file()

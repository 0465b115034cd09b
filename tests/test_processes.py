"""Two CPU processes are really two, and train what one process trains with the same plan."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

CONFIG = """
_base_: [cfgs/train/examples/lora_conventional.yaml]
train: {{train_epochs: null, train_steps: 5, save_step: null, log_step: 1, scheduler: {{name: constant}}}}
model: {{pretrained_model_name_or_path: '{model}'}}
data:
  dataset1:
    batch_size: 2
    source: {{a: {{img_root: images, word_names: {{pt1: thing}}, flip: true}}}}
    bucket: {{target_area: 4096, num_bucket: 2}}
"""


def losses(run: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tblog"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_sd1):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "images").mkdir()
    for i in range(7):
        Image.new("RGB", (100, 60) if i % 3 else (64, 64), (30 * i, 200 - 20 * i, 90)).save(folder / "images" / f"{i}.png")
    (folder / "cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
    return folder


def run(place: Path, name: str, *more: str, launcher=(), module="hcpdiff.train_ac") -> tuple[Path, str]:
    command = [sys.executable, *launcher, "-m", module, "--cfg", "cfg.yaml", f"exp_dir={name}", *more]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "OMP", "RANK", "WORLD", "LOCAL", "MASTER"))}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, encoding="utf-8", timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place / name, done.stdout + done.stderr


def two(port: int) -> tuple[str, ...]:
    return ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(port))


def test_two_processes_train_what_one_does_with_accumulation(place):
    one, _ = run(place, "one", "train.gradient_accumulation_steps=2")
    both, output = run(place, "two", launcher=two(29611))
    assert re.search(r"2 processes", output) and "world size 2" not in (one / "train.log").read_text(encoding="utf-8")
    assert losses(one).keys() == losses(both).keys() == {1, 2, 3, 4, 5}
    assert list(losses(both).values()) == pytest.approx(list(losses(one).values()), rel=1e-4)
    a, b = (load_file(folder / "ckpts" / "unet-5.safetensors") for folder in (one, both))
    difference = torch.cat([(a[key] - b[key]).flatten() for key in a if "lora_up" in key]).norm()
    assert difference / torch.cat([a[key].flatten() for key in a if "lora_up" in key]).norm() < 1e-2
    assert len(list((both / "tblog").iterdir())) == 1  # one process writes


def test_the_one_device_command_under_two_trains_alone_and_says_so(place):
    alone, output = run(place, "alone", launcher=two(29613), module="hcpdiff.train_ac_single")
    assert "train_ac_single uses one device" in output and "1 process" in output
    assert len(losses(alone)) == 5

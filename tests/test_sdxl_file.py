"""SDXL from a single file, by the commands as users call them: trained with an export, resumed, drawn, converted, merged; every way gives the same picture."""

import numpy as np
import pytest
import torch
from lora_help import command
from PIL import Image
from run_help import images
from single_models import save_single

from hcpdiff import train_ac_single, visualizer
from hcpdiff.tools import lora_convert, lora_info, lora_merge

CONFIG = """
exp_dir: run
seed: 1
mixed_precision: fp32
model: {{pretrained_model_name_or_path: tiny.safetensors, config: '{model}'}}
lora_unet:
  - {{lr: 0.05, rank: 2, alpha: 3, layers: ['re:.*attn2$']}}
  - {{lr: 0.02, rank: 3, layers: ['re:.*resnets\\.0$']}}
lora_text_encoder: [{{lr: 0.05, rank: 1, layers: ['re:.*self_attn$']}}, {{lr: 0.05, rank: 2, layers: ['re:te2\\..*mlp$']}}]
train: {{train_steps: 2, save_step: 1, cpu_threads: 1, log_step: 1, workers: 0, export: true}}
data:
  one:
    batch_size: 2
    source: {{cats: {{img_root: images, caption_file: images}}}}
    bucket: {{target_area: 4096, num_bucket: 1}}
logger: [{{_target_: hcpdiff.loggers.FileLogger}}]
"""
TRAIN = ("--cfg", "cfg.yaml")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys, tiny_sdxl):
    """Calls a command in a folder with the tiny SDXL as one file and four pictures; it has to end with 0."""
    from diffusers import StableDiffusionXLPipeline

    monkeypatch.chdir(tmp_path)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    save_single(tmp_path / "tiny.safetensors", "sdxl", {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")})
    images(tmp_path / "images", 4)
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=tiny_sdxl), encoding="utf-8")

    def run(module, *args):
        code, out, err = command(module, capsys, *args)
        assert code == 0, err
        return out

    return run


def test_every_way_from_a_run_on_a_single_file_gives_its_picture(call, tmp_path, tiny_sdxl):
    call(train_ac_single, *TRAIN)
    call(train_ac_single, *TRAIN, "train.resume=run", "train.train_steps=3")
    assert "resumed after step 2" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    call(lora_convert, "--to_diffusers", "--lora_path", "run", "--dump_path", "d/")
    call(lora_convert, "--to_peft", "--lora_path", "run/webui/run-3.safetensors", "--dump_path", "p")
    call(lora_convert, "--lora_path", "p", "--dump_path", "back.safetensors")
    call(lora_merge, "--lora_path", "run", "--base_model", tiny_sdxl, "--dump_path", "merged")
    call(lora_merge, "--lora_path", "run/webui/run-3.safetensors", "--base_model", "tiny.safetensors", "--dump_path", "merged.safetensors")
    assert "fits tiny.safetensors" in call(lora_info, "--lora_path", "run/webui/run-3.safetensors", "--base_model", "tiny.safetensors")

    def drawn(model, lora=None):
        words = [f"pretrained_model={model}", *([f"config={tiny_sdxl}"] if str(model).endswith(".safetensors") else []), *([f"lora_path={lora}"] if lora else [])]
        call(visualizer, "--cfg", "draw.yaml", *words)
        return np.asarray(Image.open(max((tmp_path / "out").glob("*.png")))).astype(int)

    (tmp_path / "draw.yaml").write_text("prompt: a cat\nneg_prompt: bad\nseed: 3\ncpu_threads: 1\nout_dir: out\ninfer_args: {num_inference_steps: 3, guidance_scale: 5.0, width: 64, height: 64}\n"
                                        "pretrained_model: x/y\n", encoding="utf-8")
    want = drawn("tiny.safetensors", "run")
    assert np.abs(drawn("tiny.safetensors") - want).max() > 10
    for case in (("tiny.safetensors", "run/webui/run-3.safetensors"), (tiny_sdxl, "back.safetensors"), (tiny_sdxl, "d"), (tiny_sdxl, "p"), ("merged",), ("merged.safetensors",)):
        assert np.abs(drawn(*case) - want).max() <= 1, case
    assert np.abs(by_diffusers(tiny_sdxl) - want).max() <= 1


def by_diffusers(model):
    """The picture of diffusers' own pipeline with its own reading of the converted file."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights("d")
    return np.asarray(pipe("a cat", negative_prompt="bad", generator=[torch.Generator().manual_seed(3)], num_inference_steps=3, guidance_scale=5.0, width=64, height=64).images[0]).astype(int)

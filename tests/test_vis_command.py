"""The visualizer as users start it: the guide's command and config, and wrong input."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lora_help import command, fails
from PIL import Image
from safetensors.torch import save_file

from hcpdiff import visualizer as program
from hcpdiff.checkpoint.format import save_lora
from hcpdiff.config.infer_schema import InferConfig
from hcpdiff.config.load import load
from hcpdiff.lora_tensors import LoraTensors
from hcpdiff.vis.request import read
from hcpdiff.vis.run import run
from hcpdiff.vis.save import read_settings

ROOT = Path(__file__).parents[1]


def visualizer(*args, cwd=ROOT, **environment):
    """Runs the command line; output as one text each."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | environment
    return subprocess.run([sys.executable, "-m", "hcpdiff.visualizer", *args], cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")


def tiny_lora(path, width=32, size=0.4):
    g = torch.Generator().manual_seed(0)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_lora(path, {name: LoraTensors(size * torch.randn(4, width, generator=g), torch.randn(width, 4, generator=g), 4.0)}, {"component": "unet"})
    return path


@pytest.fixture
def run_folder(tmp_path):
    ckpts = tmp_path / "exps" / "2023-07-26-01-05-35" / "ckpts"
    ckpts.mkdir(parents=True)
    tiny_lora(ckpts / "unet-1000.safetensors")
    return ckpts


GUIDE = """\
_base_:
  - cfgs/infer/t2i_lora.yaml

# 修改图像生成参数
infer_args:
  width: 768
  height: 768
  guidance_scale: 9.0
  num_inference_steps: 25

new_components:
  # 替换采样器 (DPM++ karras)
  scheduler:
    _target_: diffusers.DPMSolverMultistepScheduler # change Sampler
    beta_start: 0.00085
    beta_end: 0.012
    beta_schedule: 'scaled_linear'
    algorithm_type: 'dpmsolver++'
    use_karras_sigmas: True
    
  # 替换VAE
  vae:
    _target_: diffusers.AutoencoderKL.from_pretrained
    pretrained_model_name_or_path: 'any3.0/vae' # path to vae model
"""


def test_guides_command_and_config_work_as_printed(tiny_sd1, run_folder, tmp_path, monkeypatch):
    """The guide's block with the VAE's folder put in its place, its command with the model's; size and steps are made small for two cores."""
    from tiny import make_vae

    make_vae().save_pretrained(tmp_path / "any3.0" / "vae")
    (tmp_path / "infer.yaml").write_text(GUIDE, encoding="utf-8")
    (tmp_path / "embs").mkdir()
    save_file({"emb_params": torch.randn(2, 32)}, tmp_path / "embs" / "surtr_arknights-1000.safetensors")
    done = visualizer("--cfg", "infer.yaml", f"pretrained_model={tiny_sd1}", f"lora_path={run_folder.relative_to(tmp_path)}/unet-1000.safetensors", "lora_alpha=0.8",
                      "prompt=masterpiece, best quality, 1girl, solo, {surtr_arknights-1000:1.2}", "infer_args.width=64", "infer_args.height=96", "infer_args.num_inference_steps=5", "seed=0", "cpu_threads=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("unet-1000: unet, 1 layers, rank 4, strength 0.8", "DPMSolverMultistepScheduler, 5 steps, guidance 9", "64x96", "seed 0", "surtr_arknights-1000", "cpu"):
        assert part in done.stdout, part
    picture = tmp_path / "output" / "00000-0.png"
    assert str(picture.relative_to(tmp_path)) in done.stdout and Image.open(picture).size == (64, 96)
    text, inside = read_settings(picture)
    assert "(surtr_arknights-1000:1.2)" in text and "Sampler: DPM++ 2M, Schedule type: Karras" in text
    assert inside["seed"] == 0 and inside["loras"] == [{"name": "unet-1000", "strength": 0.8, "strength_TE": 0.8}] and str(tmp_path) not in str(inside)

    monkeypatch.chdir(tmp_path)
    again = load(str(picture.with_suffix(".yaml")), ["out_dir=again"], InferConfig)  # the settings beside it draw it again
    assert np.array_equal(np.asarray(Image.open(run(read(again.config), say=lambda line: None)[0])), np.asarray(Image.open(picture)))


def test_help_shows_an_example_and_imports_nothing_heavy():
    code = "import sys; from hcpdiff import cli, visualizer\ntry:\n    cli.run(visualizer.main, visualizer.parser, ['--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "lora_path=exps/" in done.stdout and done.stdout.strip().endswith("False")


@pytest.mark.parametrize("args, said", [
    (["prompt=a {cat, {dog}", "neg_prompt=x}"], ["2 faults", "prompt, character 3: this `{` is never closed", "neg_prompt, character 2"]),
    (["promt=a cat"], ["promt", "Nearest: prompt"]),
    (["promt=a cat", "lora_path=file"], ["promt", "lora_path = 'file'", "2 faults"]),
    (["lora_path=exps/2023-07-26-01-05-35/ckpts/unet-999.safetensors"], ["lora_path", "unet-1000.safetensors"]),
    (["out_dir=file/below"], ["out_dir = 'file/below' cannot be written to"]),
    (["pretrained_model=./no/model"], ["pretrained_model"]),
    (["condition={}", "interface=[]", "hires=1"], ["3 faults", "condition", "ControlNet", "interface", "out_dir", "hires"]),
    (["infer_args.image=x.png", "infer_args.width=0"], ["img2img is not built yet", "infer_args.width = 0"]),
    (["infer_args.width=100", "infer_args.height=4", "infer_args.steps=20", "infer_args.sampler=euler", "cfg_scale=7", "steps=20"],
     ["infer_args.width = 100; it must be a multiple of 8: 96 or 104", "infer_args.height = 4; it must be a whole number, at least 8", "infer_args.steps is infer_args.num_inference_steps",
      "infer_args.sampler is new_components.scheduler", "cfg_scale (command line) is not a known key, and nothing reads it. It is at: infer_args.guidance_scale", "It is at: infer_args.num_inference_steps"]),
    (["new_components.scheduler._target_=os.system"], ["new_components.scheduler._target_", "not among"]),
])
def test_wrong_input_is_one_message_without_torch(tmp_path, run_folder, args, said):
    (tmp_path / "file").touch()
    done = visualizer("--cfg", "cfgs/infer/text2img.yaml", "pretrained_model=some/model", *args, cwd=tmp_path, HF_HUB_OFFLINE="0")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    for part in said:
        assert part in done.stderr, done.stderr
    assert not (tmp_path / "output").exists()


def test_wrong_input_that_needs_the_models_files_comes_together(tiny_sd1, tmp_path, monkeypatch, capsys):
    """In this process, since it needs torch. LoRA of another architecture is alone, since it needs the weights."""
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    monkeypatch.chdir(tmp_path)
    done = command(program, capsys, "--cfg", "cfgs/infer/text2img.yaml", f"pretrained_model={tiny_sd1}", "lora_path=cut.safetensors", "infer_args.guidance_scal=3",
                   "new_components.scheduler._target_=torch.utils.collect_env.run", "new_components.vea._target_=diffusers.AutoencoderKL")
    fails(done, "cut.safetensors", "Did you mean guidance_scale?", "new_components.scheduler._target_", "new_components.vea")
    assert done[2].count("error:") == 1


def test_lora_of_another_architecture_is_one_message(tiny_sd1, tmp_path, monkeypatch, capsys):
    lora = tiny_lora(tmp_path / "unet-1.safetensors", width=320)
    monkeypatch.chdir(tmp_path)
    done = command(program, capsys, "--cfg", "cfgs/infer/t2i_lora.yaml", f"pretrained_model={tiny_sd1}", f"lora_path={lora}", "cpu_threads=1")
    fails(done, "unet-1.safetensors")
    assert done[2].count("error:") == 1


def test_shipped_configs_hold_only_known_keys():
    loaded = load("cfgs/infer/t2i_lora.yaml", ["lora_path=null"], InferConfig)
    assert not loaded.notices and loaded.config.infer_args["num_inference_steps"] == 30
    assert set(yaml.safe_load((ROOT / "cfgs/infer/text2img.yaml").read_text(encoding="utf-8"))) <= set(loaded.plain)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_block_of_the_page_is_a_config(language, tmp_path):
    page = (ROOT / "docs" / language / "user_guides" / "infer.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    assert len(blocks) == 3
    for n, block in enumerate(blocks):
        (tmp_path / f"{n}.yaml").write_text(block if "_base_" in block else "_base_: cfgs/infer/text2img.yaml\n" + block, encoding="utf-8")
        loaded = load(str(tmp_path / f"{n}.yaml"), ["lora_path=null"], InferConfig)
        assert not loaded.notices
    for name in ("bs", "clip_skip", "dtype", "emb_dir", "infer_args", "lora_alpha", "lora_alpha_TE", "lora_dir", "lora_path", "lora_path_TE", "merge", "N_repeats", "neg_prompt",
                 "new_components", "num", "offload", "out_dir", "prompt", "prompt_file", "prompt_syntax", "seed", "save.settings", "save.image_type", "vae_optimize.tiling"):
        assert f"{name}" in page, name

"""SDXL in whole: runs that are stopped and gone on with, pictures against diffusers."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from run_help import images
from safetensors.torch import load_file, save_file
from test_resume_exact import CONFIG, WORKERS, compare, overrides
from test_vis_draw import attention, merged, random_lora

from hcpdiff.checkpoint.convert import find_family, to_webui
from hcpdiff.checkpoint.format import save_lora
from hcpdiff.config.infer_schema import InferConfig
from hcpdiff.errors import ConfigError
from hcpdiff.vis import components, request, run

STEPS = {"num_inference_steps": 3, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_sdxl):
    folder = tmp_path_factory.mktemp("sdxl_runs")
    images(folder / "images")
    (folder / "cfg.yaml").write_text(CONFIG.format(model=tiny_sdxl), encoding="utf-8")
    return folder


def test_a_stopped_run_of_all_three_parts_ends_in_the_same_bits(place, monkeypatch):
    compare(place, monkeypatch, [*overrides(WORKERS), "lora_text_encoder=[{lr: 1e-2, rank: 2, layers: ['re:.*self_attn$']}, {lr: 1e-3, layers: ['re:te2\\..*mlp$']}]"], (2, 3))
    files = {path.name for path in (place / "parts" / "ckpts").iterdir()}
    assert {"unet-6.safetensors", "text_encoder-6.safetensors", "text_encoder_2-6.safetensors"} <= files
    second = load_file(place / "parts" / "ckpts" / "text_encoder_2-6.safetensors")
    assert all(key.startswith("text_model.encoder.layers.") for key in second) and any("mlp" in key for key in second)


def test_a_stopped_run_with_frozen_text_and_previews_ends_in_the_same_bits(place, monkeypatch):
    compare(place, monkeypatch, overrides({**WORKERS, "trained": "unet", "latents": "memory", "accumulation": 1, "precision": "bf16", "previews": True}), (4,))


@pytest.fixture(scope="module")
def base(tiny_sdxl):
    """diffusers' pipeline of the tiny model."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, prompt="a cat", negative="bad", **more):
    """A picture by diffusers alone, (H,W,3)."""
    parts = {name: more.pop(name) for name in tuple(more) if name in pipe.components}
    other = type(pipe)(**{**pipe.components, **parts}, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    return np.asarray(other(prompt, negative_prompt=negative, generator=[torch.Generator().manual_seed(3)], **STEPS, **more).images[0]).astype(int)


@pytest.fixture
def ours(tiny_sdxl, tmp_path):
    """Draws by the visualizer; (H,W,3)."""
    def draw(**keys):
        said = []
        cfg = InferConfig(**{"pretrained_model": str(tiny_sdxl), "prompt": "a cat", "neg_prompt": "bad", "seed": 3, "infer_args": STEPS, "cpu_threads": 1,
                             "out_dir": str(tmp_path / "out"), **keys})
        (path,) = run.run(request.read(cfg), say=said.append)
        draw.said = "\n".join(said)
        return np.asarray(Image.open(path)).astype(int)
    return draw


def test_pictures_are_diffusers_own(ours, base):
    sizes = {"original_size": (32, 40), "crops_coords_top_left": (8, 0)}
    plain = ours()
    assert np.abs(plain - theirs(base)).max() <= 1 and "sdxl_base_v1-0" in ours.said
    assert np.abs(ours(neg_prompt="") - theirs(base, negative=None)).max() <= 1  # as the model's index says: zeros
    assert np.abs(ours(clip_skip=1, neg_prompt="") - theirs(base, negative=None, clip_skip=1)).max() <= 1
    sized = ours(infer_args={**STEPS, **{name: list(pair) for name, pair in sizes.items()}})
    assert np.abs(sized - theirs(base, **sizes)).max() <= 1 and np.abs(sized - plain).max() > 1


def test_a_v_prediction_model_with_zero_terminal_snr_is_drawn_as_diffusers_does(ours, base):
    block = {"_target_": "diffusers.EulerDiscreteScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    want = theirs(base, scheduler=type(base.scheduler).from_config(base.scheduler.config, **{key: value for key, value in block.items() if key != "_target_"}))
    assert np.abs(ours(new_components={"scheduler": block}) - want).max() <= 1
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr .zero terminal SNR., but the model predicts epsilon"):
        components.check_terminal(type(base.scheduler).from_config(base.scheduler.config, rescale_betas_zero_snr=True))


def test_lora_of_three_files_or_one_of_webui_is_that_of_merged_weights(ours, base, tmp_path):
    parts = {"unet": random_lora(base.unet, 1, where=attention), "text_encoder": random_lora(base.text_encoder, 2, where=attention, prefix="text_model."),
             "text_encoder_2": random_lora(base.text_encoder_2, 4, where=attention)}
    for stem, layers in parts.items():
        save_lora(tmp_path / f"{stem}-5.safetensors", layers, {"component": stem})
    want = theirs(base, **{name: merged_as(base, name, layers) for name, layers in parts.items()})
    got = ours(lora_path=str(tmp_path / "unet-5.safetensors"))
    assert np.abs(got - want).max() <= 1 and np.abs(got - theirs(base)).max() > 10
    for stem, layers in parts.items():
        assert f"{stem}-5: {stem}, {len(layers)} layers, rank 4, strength 1" in ours.said
    save_file({key: value.contiguous() for key, value in to_webui(parts, find_family(parts, {}).family).tensors.items()}, tmp_path / "webui.safetensors")
    assert np.abs(ours(lora_path=str(tmp_path / "webui.safetensors")) - want).max() <= 1


def merged_as(base, name, layers):
    """A copy of the part with the LoRA in its weights; transformers' second class keeps `text_model.`."""
    if name != "text_encoder_2":
        return merged(getattr(base, name), layers, 1.0)
    module = copy.deepcopy(base.text_encoder_2)
    for path, tensors in layers.items():
        layer = module.get_submodule(path)
        layer.weight.data = (layer.weight.double() + tensors.delta(torch.float64).reshape(layer.weight.shape)).float()
    return module


def test_a_vae_that_is_not_safe_in_fp16_works_in_fp32_and_it_is_said(ours):
    ours(dtype="fp16", infer_args={"num_inference_steps": 1, "guidance_scale": 1.0})
    assert "the VAE works in fp32: its config says that it is not safe in fp16" in ours.said and "decoded again" not in ours.said

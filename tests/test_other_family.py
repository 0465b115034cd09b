"""A LoRA of another family is called that, and nothing else is said of it, wherever it is laid on a model."""

import copy

import pytest
import torch
from lora_help import SD1, SDXL, random_lora, webui_file

from hcpdiff.checkpoint.convert import other_family
from hcpdiff.checkpoint.format import load_lora
from hcpdiff.config.schema import LoraGroup, ModelConfig
from hcpdiff.errors import CheckpointError, LayerMatchError
from hcpdiff.families import detect
from hcpdiff.lora_tools.base_model import misfits, open_model
from hcpdiff.train.init import check_places, start_from_files
from hcpdiff.trainables.lora import lay_groups
from hcpdiff.vis import attach
from hcpdiff.vis.lora_files import LoraSource

BLOCK = "down_blocks.1.attentions.0.transformer_blocks"
SAYS = "this LoRA is for Stable Diffusion XL (from the file's metadata), the model is Stable Diffusion 1.x."


def sdxl_layers():
    shapes = {"0.attn1.to_k": (640, 640), "0.attn2.to_k": (640, 2048), "1.attn1.to_q": (640, 640)}
    layers = {f"{BLOCK}.{name}": random_lora(shape, n, rank=4) for n, (name, shape) in enumerate(shapes.items())}
    return {"unet": layers, "text_encoder_2": {"text_model.encoder.layers.0.self_attn.q_proj": random_lora((1280, 1280), 7)}}


@pytest.fixture
def foreign(tmp_path):
    return webui_file(tmp_path / "xl.safetensors", sdxl_layers(), SDXL, "sdxl_base_v1-0")


@pytest.fixture(scope="module")
def models(tiny_sd1):
    return detect(tiny_sd1).load(tiny_sd1, "tiny", ["unet", "text_encoder"], torch.float32)


def test_init_lora_says_the_family_and_not_the_layers(models, foreign):
    own = copy.copy(models)
    own.modules = {name: copy.deepcopy(part) for name, part in models.modules.items()}
    trainables = lay_groups(own, "lora_unet", [LoraGroup(lr=1e-3, layers=["re:.*to_k$"], rank=2)], 1)
    with pytest.raises(CheckpointError) as caught:
        start_from_files(ModelConfig(pretrained_model_name_or_path="m", init_lora=str(foreign)), trainables, "sd_v1")
    assert caught.value.faults == [f"model.init_lora = {str(foreign)!r}: {SAYS} Take a LoRA for Stable Diffusion 1.x, or a model of the LoRA's kind."]
    foreign.with_name("folder").mkdir()
    with pytest.raises(CheckpointError, match="model.init_lora: .*folder holds no weight files: .* In it: nothing"):
        check_places(ModelConfig(pretrained_model_name_or_path="m", init_lora=str(foreign.with_name("folder"))))
    foreign.with_name("cut.safetensors").write_bytes(foreign.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="model.init_lora: .*cut.safetensors is cut short"):
        start_from_files(ModelConfig(pretrained_model_name_or_path="m", init_lora=str(foreign.with_name("cut.safetensors"))), trainables, "sd_v1")


def test_the_visualizer_says_the_family_and_not_the_layers(models, foreign):
    lora = attach.read(LoraSource("lora_path", foreign, None, True, 1, 1))
    with pytest.raises(LayerMatchError) as caught:
        attach.attach_all(models, [lora])
    assert len(caught.value.faults) == 1 and caught.value.faults[0].startswith(f"lora_path ({foreign}): {SAYS}")


def test_the_tools_say_the_family_and_not_the_layers(tiny_sd1, tiny_sd2, tiny_sdxl, foreign):
    file = load_lora(foreign)
    (line,) = misfits(open_model(str(tiny_sd1), "--base_model"), file.layers, file.metadata)
    assert line.startswith(SAYS)
    assert [open_model(str(folder), "x").family for folder in (tiny_sd1, tiny_sd2, tiny_sdxl)] == ["sd1", "sd2", "sdxl"]


def test_what_is_not_settled_or_of_the_same_family_is_not_called_another(foreign, tmp_path):
    layers = {"unet": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_k": random_lora((8, 8), 1)}}
    assert other_family(layers, {}, "sd_v1") == other_family(sdxl_layers(), {}, "sdxl_base_v1-0") == other_family(sdxl_layers(), {}, "other") == ""
    assert other_family({"unet": {"no.such.layer": random_lora((8, 8), 1)}}, {}, "sd_v1") == ""
    assert "for Stable Diffusion XL (from its layers' widths)" in other_family(sdxl_layers(), {}, "sd_v1")
    same = load_lora(webui_file(tmp_path / "one.safetensors", layers, SD1, "sd_v1"))
    assert other_family(same.layers, same.metadata, "sd_v1") == ""

"""Names and configs of single files, against diffusers' own reader and the architectures of the released models (on meta: no weights)."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as diffusers_reads
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from hcpdiff.families import file_configs, file_kind, ldm_names
from hcpdiff.families.read_parts import empty
from hcpdiff.families.source import read_json
from hcpdiff.lora_tools.base_names import in_single_file
from tests.single_models import KINDS, PARTS, ldm_state, make_parts

CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
UNET_TENSORS = {"sd1": 686, "sd2": 686, "sdxl": 1680}  # of the released files


def released(kind: str) -> dict[str, torch.nn.Module]:
    """The parts of a released model, without weights."""
    return {part: empty(CLASSES[part], config_of(kind, part), kind) for part in PARTS[kind]}


def config_of(kind: str, part: str) -> dict:
    return read_json(file_configs.released(KINDS[kind]) / part / "config.json")


def diffusers_state(kind: str, part: str, module: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A part of a file's tensors as diffusers' from_single_file converts them."""
    state = dict(state)
    if part == "unet":
        return diffusers_reads.convert_ldm_unet_checkpoint(state, dict(module.config))
    if part == "vae":
        return diffusers_reads.convert_ldm_vae_checkpoint(state, dict(module.config))
    prefix, style = KINDS[kind].layouts[part][0]
    if style == ldm_names.OPEN_CLIP:
        read = diffusers_reads.convert_open_clip_checkpoint(module, state, prefix)
    else:
        read = diffusers_reads.convert_ldm_clip_checkpoint(state)
    wrapped = part == "text_encoder_2"
    return {name if wrapped else name.removeprefix("text_model."): tensor for name, tensor in read.items()}


@pytest.mark.parametrize("kind", PARTS)
def test_names_are_those_that_diffusers_reads(kind):
    """Written by our table and read by diffusers: every weight is itself again, so table and reader agree name by name."""
    parts = make_parts(kind)
    state = ldm_state(kind, parts)
    for name, part in parts.items():
        read, wanted = diffusers_state(kind, name, part, state), part.state_dict()
        assert read.keys() == wanted.keys(), name
        assert all(torch.equal(tensor.reshape(wanted[key].shape), wanted[key]) for key, tensor in read.items()), name


@pytest.mark.parametrize("kind", PARTS)
def test_released_models_are_known_and_their_configs_found_from_shapes(kind):
    parts = released(kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in ldm_state(kind, parts).items()}
    if kind == "sd2":  # open_clip's last layer, of which SD 2.x makes no use
        shapes |= {name.replace(".22.", ".23."): shape for name, shape in shapes.items() if ".resblocks.22." in name}
    assert sum(name.startswith(file_kind.UNET) for name in shapes) == UNET_TENSORS[kind]
    assert file_kind.kind_of(shapes, "", "") is KINDS[kind]
    for part in parts:
        prefix, style = KINDS[kind].layout(part, shapes)
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        assert file_configs.derive(KINDS[kind], part, style, own) == config_of(kind, part), part


@pytest.mark.parametrize("kind", PARTS)
def test_tools_find_layers_wherever_a_base_model_of_the_kind_may_have_its_parts(kind):
    path = {"unet": "conv_in"}
    for part in PARTS[kind]:
        if part != "vae":  # which has no LoRA
            names = [place.name for place in in_single_file(part, path.get(part, "text_model.encoder.layers.0.mlp.fc1"))]
            assert [prefix for prefix, _ in KINDS[kind].layouts[part] if not any(name.startswith(prefix) for name in names)] == []
            assert KINDS[kind].layouts[part], part

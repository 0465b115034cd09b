"""Configs of a single-file model: those of the released models, with widths and depths as the file's own shapes show them. No torch.

What shapes cannot show (the number of heads, groups of a norm, the activation) is as released: 8 heads in SD 1.x, heads of 64 channels elsewhere.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .file_kind import SD1, SD2, Kind, Shapes
from .ldm_names import DIFFUSERS, HUGGINGFACE
from .source import read_json

ASSETS = Path(__file__).parents[1] / "assets"
TOKENIZER = ASSETS / "clip_tokenizer"
HEAD = 64  # channels of an attention head, in CLIP and in the UNets of SD 2.x and SDXL
V_SIZE = 96  # latent side of SD 2.x models that predict v: they were trained on 768 pixels


def released(kind: Kind) -> Path:
    """The folder of configs of the released model, in diffusers' layout."""
    return ASSETS / "base_models" / kind.name


@functools.cache
def _template(path: Path) -> dict[str, Any]:
    return read_json(path)


def derive(kind: Kind, part: str, style: str, shapes: Shapes) -> dict[str, Any]:
    """The config of a part, from the shapes of its tensors (names without the part's prefix). ConfigError where it lacks what the config follows from."""
    template = dict(_template(released(kind) / part / "config.json"))
    own = {"unet": _unet, "vae": _vae}.get(part, _text)
    return template | own(kind, style, _Shapes(part, shapes), template)


class _Shapes:
    """Shapes by name; a name or an axis that is missing is an error that says so."""

    def __init__(self, part: str, shapes: Shapes):
        self.part, self.shapes = part, shapes

    def size(self, name: str, axis: int) -> int:
        shape = self.shapes.get(name, ())
        if not -len(shape) <= axis < len(shape):
            raise ConfigError(f"the {self.part} has no weight {name} with {axis + 1} axes or more: the file is damaged, or of another kind.")
        return shape[axis]

    def count(self, pattern: str) -> int:
        """How many numbers stand in the place of the group of the pattern, from 0 on."""
        found = {int(match[1]) for name in self.shapes if (match := re.match(pattern, name))}
        return next(i for i in range(len(found) + 1) if i not in found)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes


def _unet(kind: Kind, style: str, shapes: _Shapes, template: Mapping[str, Any]) -> dict[str, Any]:
    widths, depths, layers = _down(shapes)
    linear = any(name.endswith("proj_in.weight") and len(shape) == 2 for name, shape in shapes.shapes.items())
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    config = {
        "in_channels": shapes.size("input_blocks.0.0.weight", 1), "out_channels": shapes.size("out.2.weight", 0), "block_out_channels": widths, "layers_per_block": layers,
        "down_block_types": down, "up_block_types": [name.replace("Down", "Up") for name in reversed(down)], "use_linear_projection": linear,
    }
    context = next((shape[1] for name, shape in shapes.shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2), None)
    if context:
        config["cross_attention_dim"] = context
    if set(depths) - {0, 1}:
        config["transformer_layers_per_block"] = [depth or 1 for depth in depths]
    if isinstance(template["attention_head_dim"], list):
        config["attention_head_dim"] = [_heads(width, f"the UNet's block of {width} channels") for width in widths]
    if "label_emb.0.0.weight" in shapes:
        config["projection_class_embeddings_input_dim"] = shapes.size("label_emb.0.0.weight", 1)
    return config


def _down(shapes: _Shapes) -> tuple[list[int], list[int], int]:
    """Width and transformer depth of each block on the way down, and resnets per block."""
    widths, depths, layers, index = [], [], 1, 1
    while True:
        first = index
        while f"input_blocks.{index}.0.in_layers.0.weight" in shapes:
            index += 1
        if index == first:
            break
        widths.append(shapes.size(f"input_blocks.{first}.0.out_layers.3.weight", 0))
        depths.append(shapes.count(rf"input_blocks\.{first}\.1\.transformer_blocks\.(\d+)\."))
        layers = max(layers, index - first)
        index += 1  # the downsampler
    if not widths:
        raise ConfigError("the unet has no input_blocks.1.0: the file is damaged, or of another kind.")
    return widths, depths, layers


def _heads(width: int, what: str) -> int:
    if width % HEAD:
        raise ConfigError(f"{what} cannot be cut into heads of {HEAD}, so the configs cannot be found from the file. Name a folder of them in {{config}}.")
    return width // HEAD


def _vae(kind: Kind, style: str, shapes: _Shapes, template: Mapping[str, Any]) -> dict[str, Any]:
    down, block = ("down_blocks", "resnets") if style == DIFFUSERS else ("down", "block")
    count = shapes.count(rf"encoder\.{down}\.(\d+)\.")
    if not count:
        raise ConfigError(f"the vae has no encoder.{down}.0: the file is damaged, or of another kind.")
    return {
        "block_out_channels": [shapes.size(f"encoder.{down}.{b}.{block}.0.conv1.weight", 0) for b in range(count)],
        "down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count,
        "layers_per_block": shapes.count(rf"encoder\.{down}\.0\.{block}\.(\d+)\."), "latent_channels": shapes.size("decoder.conv_in.weight", 1),
    }


def _text(kind: Kind, style: str, shapes: _Shapes, template: Mapping[str, Any]) -> dict[str, Any]:
    top, layer, fc1 = ("embeddings.", "encoder.layers", "mlp.fc1") if style == HUGGINGFACE else ("", "transformer.resblocks", "mlp.c_fc")
    positions = "embeddings.position_embedding.weight" if top else "positional_embedding"
    width, layers = shapes.size(f"{top}token_embedding.weight", 1), shapes.count(rf"{re.escape(layer)}\.(\d+)\.")
    if not layers:
        raise ConfigError(f"the text encoder has no {layer}.0: the file is damaged, or of another kind.")
    config = {
        "vocab_size": shapes.size(f"{top}token_embedding.weight", 0), "max_position_embeddings": shapes.size(positions, 0), "hidden_size": width,
        "intermediate_size": shapes.size(f"{layer}.0.{fc1}.weight", 0), "num_attention_heads": _heads(width, f"the text encoder's width of {width}"),
        "num_hidden_layers": used_layers(kind, layers),
    }
    if "CLIPTextModelWithProjection" in template.get("architectures", ()):
        config["projection_dim"] = shapes.size("text_projection", 1) if "text_projection" in shapes else shapes.size("text_projection.weight", 0)
    return config


def used_layers(kind: Kind, layers: int) -> int:
    """Layers of a text encoder that are used: SD 2.x reads the one before the last of open_clip's 24, so the last is not in its model."""
    return 23 if kind is SD2 and layers == 24 else layers


def said_prediction(shapes: Shapes, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(prediction type, what says so) where the file tells it; None where it does not."""
    if "v_pred" in shapes:
        return "v_prediction", "its key v_pred"
    said = metadata.get("modelspec.prediction_type", "").lower()
    if said in ("v", "v_prediction", "vprediction", "epsilon", "eps"):
        return ("v_prediction" if said.startswith("v") else "epsilon"), f"its metadata, modelspec.prediction_type = {said}"
    architecture = metadata.get("modelspec.architecture", "")
    if architecture.startswith(("stable-diffusion-v2-768-v", "stable-diffusion-v2-512")):
        return ("v_prediction" if "-768-v" in architecture else "epsilon"), f"its metadata, modelspec.architecture = {architecture[:60]}"
    return None


def schedule(kind: Kind, prediction: str, zero_snr: bool) -> dict[str, Any]:
    """The scheduler config of a kind that predicts this."""
    config = _template(released(kind) / "scheduler" / "scheduler_config.json") | {"prediction_type": prediction}
    if zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if kind is SD1:  # its PNDM cannot begin at an SNR of zero
            config = {name: value for name, value in config.items() if name != "skip_prk_steps"} | {"_class_name": "DDIMScheduler"}
    return config

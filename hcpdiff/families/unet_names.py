"""Every module of the Stable Diffusion UNets and CLIP text encoders by name, in diffusers' and in the original (LDM) spelling. No torch.

The names are enumerated from each UNet's plan, so that `_` never has to be guessed back into `.`; tests compare them with the real
architectures. The LDM spelling is that of the original checkpoints: input_blocks, middle_block, output_blocks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["linear", "conv1", "conv3", "norm"]

DOWN_RESNETS, UP_RESNETS = 2, 3  # per block, in every released Stable Diffusion UNet


@dataclass(frozen=True)
class Module:
    """One layer that has weights: its kind and its LDM name."""

    ldm: str
    kind: Kind


@dataclass(frozen=True)
class UnetPlan:
    """What the names of a UNet follow from: transformer depth of each block (0: none), widths, and whether proj_in/out are Linear."""

    down: tuple[int, ...]
    mid: int
    up: tuple[int, ...]
    widths: tuple[int, ...]
    linear_proj: bool
    added: bool = False  # add_embedding (size and crop of SDXL)


SD1 = UnetPlan((1, 1, 1, 0), 1, (0, 1, 1, 1), (320, 640, 1280, 1280), linear_proj=False)
SD2 = UnetPlan((1, 1, 1, 0), 1, (0, 1, 1, 1), (320, 640, 1280, 1280), linear_proj=True)
SDXL = UnetPlan((0, 2, 10), 10, (10, 2, 0), (320, 640, 1280), linear_proj=True, added=True)
ANY = UnetPlan((10,) * 4, 10, (10,) * 4, (1, 2, 3, 4), linear_proj=True, added=True)  # a superset of all their names

_RESNET = (("norm1", "in_layers.0", "norm"), ("conv1", "in_layers.2", "conv3"), ("time_emb_proj", "emb_layers.1", "linear"),
           ("norm2", "out_layers.0", "norm"), ("conv2", "out_layers.3", "conv3"))
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@cache
def unet_modules(plan: UnetPlan) -> dict[str, Module]:
    """diffusers path -> Module, for every layer with weights of a UNet of this plan."""
    return {path: Module(ldm, kind) for path, ldm, kind in _walk(plan)}


def _walk(plan: UnetPlan) -> Iterator[tuple[str, str, Kind]]:
    yield "conv_in", "input_blocks.0.0", "conv3"
    for i in (1, 2):
        yield f"time_embedding.linear_{i}", f"time_embed.{2 * i - 2}", "linear"
        if plan.added:
            yield f"add_embedding.linear_{i}", f"label_emb.0.{2 * i - 2}", "linear"
    yield from _down(plan)
    for i in (0, 1):
        yield from _resnet(f"mid_block.resnets.{i}", f"middle_block.{2 * i}", shortcut=False)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", plan.mid, plan.linear_proj)
    yield from _up(plan)
    yield "conv_norm_out", "out.0", "norm"
    yield "conv_out", "out.2", "conv3"


def _down(plan: UnetPlan) -> Iterator[tuple[str, str, Kind]]:
    for b, depth in enumerate(plan.down):
        for i in range(DOWN_RESNETS):
            wider = i == 0 and b > 0 and plan.widths[b] != plan.widths[b - 1]
            yield from _resnet(f"down_blocks.{b}.resnets.{i}", f"input_blocks.{1 + 3 * b + i}.0", wider)
            if depth:
                yield from _transformer(f"down_blocks.{b}.attentions.{i}", f"input_blocks.{1 + 3 * b + i}.1", depth, plan.linear_proj)
        if b < len(plan.down) - 1:
            yield f"down_blocks.{b}.downsamplers.0.conv", f"input_blocks.{3 * b + 3}.0.op", "conv3"


def _up(plan: UnetPlan) -> Iterator[tuple[str, str, Kind]]:
    for b, depth in enumerate(plan.up):
        for i in range(UP_RESNETS):
            yield from _resnet(f"up_blocks.{b}.resnets.{i}", f"output_blocks.{3 * b + i}.0", shortcut=True)  # skip input makes it wider
            if depth:
                yield from _transformer(f"up_blocks.{b}.attentions.{i}", f"output_blocks.{3 * b + i}.1", depth, plan.linear_proj)
        if b < len(plan.up) - 1:
            yield f"up_blocks.{b}.upsamplers.0.conv", f"output_blocks.{3 * b + 2}.{2 if depth else 1}.conv", "conv3"


def _resnet(path: str, ldm: str, shortcut: bool) -> Iterator[tuple[str, str, Kind]]:
    for ours, theirs, kind in _RESNET:
        yield f"{path}.{ours}", f"{ldm}.{theirs}", kind
    if shortcut:
        yield f"{path}.conv_shortcut", f"{ldm}.skip_connection", "conv1"


def _transformer(path: str, ldm: str, depth: int, linear_proj: bool) -> Iterator[tuple[str, str, Kind]]:
    inner: list[tuple[str, Kind]] = [("norm", "norm"), ("proj_in", "linear" if linear_proj else "conv1")]
    for d in range(depth):
        block = f"transformer_blocks.{d}"
        for n in (1, 2):
            inner.append((f"{block}.norm{n}", "norm"))
            inner += [(f"{block}.attn{n}.{name}", "linear") for name in _ATTENTION]
        inner += [(f"{block}.norm3", "norm"), (f"{block}.ff.net.0.proj", "linear"), (f"{block}.ff.net.2", "linear")]
    inner.append(("proj_out", "linear" if linear_proj else "conv1"))
    for name, kind in inner:
        yield f"{path}.{name}", f"{ldm}.{name}", kind


@cache
def _unet_bodies() -> dict[str, str]:
    """Body of a webui name, in either spelling -> diffusers path."""
    bodies = {}
    for path, module in unet_modules(ANY).items():
        bodies[path.replace(".", "_")] = path
        bodies[module.ldm.replace(".", "_")] = path
        if ".upsamplers." in path:  # its LDM index depends on whether the block has attention; the two names never clash
            bodies[module.ldm.replace(".2.conv", ".1.conv").replace(".", "_")] = path
    return bodies


def unet_path(body: str) -> str | None:
    """`down_blocks_0_attentions_0_proj_in` or `input_blocks_1_1_proj_in` -> `down_blocks.0.attentions.0.proj_in`; None if no UNet has it."""
    return _unet_bodies().get(body)


def is_ldm(body: str) -> bool:
    """Whether the body of a webui name is spelled as the original checkpoints are."""
    return body.startswith(("input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "label_emb_", "out_"))


_CLIP = {"self_attn_q_proj": "self_attn.q_proj", "self_attn_k_proj": "self_attn.k_proj", "self_attn_v_proj": "self_attn.v_proj",
         "self_attn_out_proj": "self_attn.out_proj", "mlp_fc1": "mlp.fc1", "mlp_fc2": "mlp.fc2"}
_CLIP_BODY = re.compile(rf"(?:text_model_)?encoder_layers_(\d{{1,3}})_({'|'.join(_CLIP)})")
_CLIP_PATH = re.compile(r"text_model\.encoder\.layers\.(\d{1,3})\.(" + "|".join(map(re.escape, _CLIP.values())) + ")")


def clip_modules(layers: int) -> list[str]:
    """Paths of the Linear layers of a CLIP text encoder of this depth, with `text_model.`."""
    return [f"text_model.encoder.layers.{i}.{name}" for i in range(layers) for name in _CLIP.values()]


def clip_path(body: str) -> str | None:
    """`text_model_encoder_layers_0_mlp_fc1` -> `text_model.encoder.layers.0.mlp.fc1`; None if no CLIP text encoder has it.

    Exporters that follow transformers 5 leave `text_model_` out: no webui reads such files, this does.
    """
    if body in ("text_projection", "text_model_text_projection"):
        return "text_projection"
    match = _CLIP_BODY.fullmatch(body)
    return f"text_model.encoder.layers.{int(match[1])}.{_CLIP[match[2]]}" if match else None


def text_path(path: str) -> str:
    """A text encoder's module path as files spell it: with `text_model.`, which transformers 5 dropped from CLIPTextModel."""
    return f"text_model.{path}" if path.startswith(("encoder.", "embeddings.", "final_layer_norm")) else path


def installed_path(component: str, path: str) -> str:
    """A module's path in the model as transformers 5 and diffusers build it: CLIPTextModel (`text_encoder`) is flat there, CLIPTextModelWithProjection
    (`text_encoder_2`) still has `text_model.`."""
    return path.removeprefix("text_model.") if component == "text_encoder" else path


def known_text_path(path: str) -> bool:
    """Whether a CLIP text encoder of some depth has this Linear layer."""
    return path == "text_projection" or _CLIP_PATH.fullmatch(path) is not None

"""Pictures of a model that is being trained: its live modules, adapters attached, drawn without copying a weight or touching a random state."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..config.schema import PreviewConfig
from ..errors import ConfigError
from ..families.base import Conditioning, Family, Models, text_components
from . import attach, components, encode, pipeline
from .prompt import parse


@dataclass(frozen=True)
class PreviewPrompts:
    """Encodings of the preview's prompts and of its negative prompt, for a trainer whose text encoder is frozen and let go."""

    positive: tuple[Conditioning, ...]
    negative: tuple[Conditioning, ...]


def encode_preview_prompts(models: Models, cfg: PreviewConfig, clip_skip: int = 0) -> PreviewPrompts:
    """Encodes the prompts, each with as many chunks as it needs; weights in braces count. Equal ones are encoded once, the negative one once per length."""
    negative = parse(cfg.neg_prompt, where="preview.neg_prompt")
    prompts = [parse(text, where=f"preview.prompts[{n}]") for n, text in enumerate(cfg.prompts)]
    chunks = [max(encode.chunks_needed(models, [prompt, negative], encode.Words())) for prompt in prompts]
    with evaluating_text(models):
        made = {pair: encode.encode(models, *pair, clip_skip=clip_skip) for pair in dict.fromkeys(zip(prompts, chunks))}
        negatives = {repeats: encode.encode_negative(models, negative, repeats, clip_skip=clip_skip) for repeats in dict.fromkeys(chunks)}
    return PreviewPrompts(tuple(made[pair] for pair in zip(prompts, chunks)), tuple(negatives[repeats] for repeats in chunks))


def check_preview(models: Models, cfg: PreviewConfig) -> None:
    """ConfigError for prompts that do not parse and sizes that the model cannot draw; before the training, not at the first preview."""
    faults = []
    texts = [("preview.neg_prompt", cfg.neg_prompt), *((f"preview.prompts[{n}]", text) for n, text in enumerate(cfg.prompts))]
    for where, text in texts:
        try:
            parse(text, where=where)
        except ConfigError as error:
            faults += error.faults
    try:
        pipeline.size_of(pipeline.assemble(models, components.base_scheduler(models.scheduler_config)), cfg.width, cfg.height, "preview.")
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)


def evaluating_text(models: Models):
    """Text encoders in eval mode inside."""
    return pipeline.evaluating([models.modules[component.name] for component in text_components(models.family)])


def draw_previews(models: Models, family: Family, cfg: PreviewConfig, *, width: int | None = None, height: int | None = None,
                  prompts: PreviewPrompts | None = None, clip_skip: int = 0, progress: bool = False,
                  share: tuple[int, int] = (0, 1), between: Callable[[], None] | None = None) -> list:
    """One PIL image per prompt of `cfg`, seeds cfg.seed, cfg.seed + 1, ...: what the visualizer draws with the weights as they are now.

    width, height: where cfg leaves them null (null too: the model's own size). prompts: encodings made before (`encode_preview_prompts`);
    else models must hold the text encoder. share: (rank, world), only every world-th prompt from the rank-th on is drawn. between: called before each picture
    and after each of its steps; what it raises ends the drawing. models must hold unet and vae; the VAE may lie on another device and is brought back there.
    Modes of all modules and torch's random states are as before.
    """
    if not cfg.prompts:
        return []
    device = next(models.unet.parameters()).device
    with quiet(models, device), visiting(models.vae, device), attach.copied(models.unet):
        cond = prompts or encode_preview_prompts(models, cfg, clip_skip)
        pipe = pipeline.assemble(models, components.base_scheduler(models.scheduler_config))
        pipe.set_progress_bar_config(disable=not progress, desc="preview")
        size = pipeline.size_of(pipe, cfg.width or width, cfg.height or height, "preview.")
        args = {"num_inference_steps": cfg.num_inference_steps, "guidance_scale": cfg.guidance_scale}
        if between is not None:
            args["callback_on_step_end"] = lambda pipe, step, timestep, tensors: between() or tensors
        images: list = []
        for batch in same_length(cond, cfg.bs, *share):
            if between is not None:
                between()
            positive, negative = (Conditioning.cat([part[n].to(device, models.unet.dtype) for n in batch]) for part in (cond.positive, cond.negative))
            images += pipeline.decode(pipe, pipeline.sample(pipe, positive, negative, [cfg.seed + n for n in batch], *size, args)).images
    return images


def same_length(cond: PreviewPrompts, bs: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Indices of neighbours whose encodings have one length, at most `bs` together; of every world-th prompt."""
    out: list[list[int]] = []
    for n, part in list(enumerate(cond.positive))[rank::world]:
        if not out or len(out[-1]) == bs or cond.positive[out[-1][0]].hidden.shape != part.hidden.shape:
            out.append([])
        out[-1].append(n)
    return out


@contextmanager
def quiet(models: Models, device: torch.device):
    """No gradients, eval mode, and random states restored after."""
    accelerators = [device] if device.type not in ("cpu", "mps") else []
    with torch.no_grad(), torch.random.fork_rng(accelerators, device_type=accelerators[0].type if accelerators else "cuda"):
        with pipeline.evaluating(list(models.modules.values())):
            yield


@contextmanager
def visiting(module: nn.Module, device: torch.device):
    """The module on `device` inside, and back where it was after."""
    home = next(module.parameters()).device
    try:
        module.to(device)
        yield
    finally:
        module.to(home)

"""The parts of a trainer, made of a config: gradient buffer, step, optimizer, learning-rate factor."""

from collections.abc import Callable, Sequence

import torch

from ..adapters.lora import HALF
from ..adapters.shadow import Shadow
from ..config.build import build
from ..config.schema import RunConfig, TrainConfig
from ..data.dataset import TrainData
from ..families.base import TEXT
from ..loss import make_loss
from ..trainables.lora import LoraTrainable, ParamGroup
from .base import BaseModel
from .conditioning import Encoder, FrozenText
from .memory import less_memory
from .optim import Gradients, lr_factor, optimizer_groups, simulated_factor, with_fused
from .parallel import Parallel
from .step import DenoisingStep


def learns_text(trainables: Sequence[LoraTrainable]) -> bool:
    """Whether prompts mean something else after each step."""
    return any(TEXT in trainable.touches for trainable in trainables)


def make_gradients(groups: Sequence[ParamGroup], cfg: RunConfig, parallel: Parallel) -> Gradients:
    """The buffer of all gradients, with room for what is to be known of each micro-batch."""
    largest = max(data.batch_size for data in cfg.data.values())
    return Gradients(groups, parallel.device, parallel.world, len(cfg.data) * cfg.train.gradient_accumulation_steps, largest)


def make_step(base: BaseModel, cfg: RunConfig, data: TrainData, frozen: bool, parallel: Parallel, dtype: torch.dtype,
              say: Callable[[str], None]) -> tuple[DenoisingStep, FrozenText | None]:
    """The step, and the hook that encodes prompts ahead where the text encoder is frozen; `say` is for what a user should know of that."""
    encode, loss = Encoder(base.models, cfg.model.tokenizer_repeats, cfg.model.clip_skip), cfg.train.loss
    text = FrozenText(encode, data, parallel.device, share=(parallel.rank, parallel.world), say=say, less_memory=less_memory(cfg)) if frozen else None
    step = DenoisingStep(base.models, base.objective(cfg.train), make_loss(loss.type, loss.delta), text or encode, parallel.device, dtype, cfg.train.noise_offset, loss.min_snr_gamma)
    return step, text


def make_shadow(trainables: Sequence[LoraTrainable], cfg: RunConfig, dtype: torch.dtype) -> Shadow | None:
    """Half-precision copies of the LoRA weights, in half precision. What is compiled needs none: its casts are part of its kernels."""
    if dtype not in HALF or cfg.model.compile:
        return None
    return Shadow([lora for trainable in trainables for lora in trainable.adapters.values()], dtype)


def make_optimizer(groups: Sequence[ParamGroup], cfg: RunConfig, world: int, allow: Sequence[str]) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names, ready to train."""
    scale = 1.0
    if cfg.train.scale_lr:
        scale = next(iter(cfg.data.values())).batch_size * world * cfg.train.gradient_accumulation_steps
    spec = with_fused(cfg.train.optimizer, groups[0].parameters[0].device)
    optimizer = build(spec, "optimizer", "train.optimizer", allow, params=optimizer_groups(groups, scale))
    for group, own in zip(optimizer.param_groups, groups):
        group["initial_lr"] = own.lr * scale  # some optimizers overwrite it
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()  # schedule-free ones are made in neither mode
    return optimizer


def make_lr_factor(train: TrainConfig, total_steps: int, allow: Sequence[str]) -> Callable[[int], float]:
    """Factor on every group's rate by the step."""
    spec = train.lr_scheduler
    if spec is None:
        return lr_factor(train.scheduler, total_steps)
    return simulated_factor(lambda optimizer: build(spec, "lr_scheduler", "train.lr_scheduler", allow, optimizer=optimizer), total_steps)

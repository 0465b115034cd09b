"""What the header of an exported LoRA says of its training, in the names that sd-scripts gives these entries (`ss_`) and those of the model spec.

Only what is true of this run and was asked for by nobody else's privacy: no paths, no file names, captions' tags only if `train.export.tag_frequency` says so.
"""

import datetime
import json
from collections.abc import Sequence

from ..checkpoint.format import META_BASE_MODEL
from ..checkpoint.metadata import META_PREDICTION
from ..config.schema import RunConfig
from ..data import summary
from ..data.dataset import TrainData
from ..families import webui
from ..families.base import DENOISER
from ..trainables.lora import LoraTrainable
from .base import BaseModel


def export_facts(cfg: RunConfig, base: BaseModel, data: TrainData, trainables: Sequence[LoraTrainable], total_steps: int, world: int, started: float, step_dtype: str) -> dict[str, str]:
    """Entries that hold for every save of a run. started: seconds since 1970; step_dtype: the precision of the frozen weights, as sd-scripts names it."""
    return {**_run(cfg, data, total_steps, world, started, step_dtype), **_rates(cfg, trainables), **_data(cfg, data, world), **_spec(cfg, base, data, started)}


def _run(cfg: RunConfig, data: TrainData, total_steps: int, world: int, started: float, step_dtype: str) -> dict[str, str]:
    train = cfg.train
    return {
        "ss_training_started_at": str(started), "ss_seed": str(cfg.seed), "ss_max_train_steps": str(total_steps),
        "ss_num_epochs": str(-(-total_steps // data.steps_per_epoch)), "ss_gradient_accumulation_steps": str(train.gradient_accumulation_steps),
        "ss_gradient_checkpointing": str(cfg.model.gradient_checkpointing), "ss_mixed_precision": {"fp32": "no"}.get(step_dtype, step_dtype), "ss_max_grad_norm": str(train.max_grad_norm),
        "ss_optimizer": str(train.optimizer["_target_"]), "ss_lr_scheduler": train.lr_scheduler["_target_"] if train.lr_scheduler else train.scheduler.name,
        "ss_lr_warmup_steps": str(_steps(train.scheduler.num_warmup_steps, total_steps)), "ss_noise_offset": str(train.noise_offset or None),
        "ss_min_snr_gamma": str(train.loss.min_snr_gamma), "ss_loss_type": {"mse": "l2"}.get(train.loss.type, train.loss.type),
        "ss_max_token_length": "None" if cfg.model.tokenizer_repeats == 1 else str(75 * cfg.model.tokenizer_repeats),
    }


def _steps(warmup: int | float, total: int) -> int:
    """A count of steps, or a share of all."""
    return round(warmup * total) if isinstance(warmup, float) and warmup < 1 else int(warmup)


def _rates(cfg: RunConfig, trainables: Sequence[LoraTrainable]) -> dict[str, str]:
    """Learning rates and dropout; one number where all groups have the same, else the list."""
    used = [(t, t.groups[number]) for t in trainables for number in sorted(set(t.group_of.values()))]  # a group may be of another component alone
    of_unet = [group.lr for t, group in used if DENOISER in t.touches]
    of_text = [group.lr for t, group in used if DENOISER not in t.touches]
    dropouts = [group.dropout for _, group in used]
    return {"ss_unet_lr": _one_or_all(of_unet), "ss_text_encoder_lr": _one_or_all(of_text), "ss_learning_rate": _one_or_all(of_unet or of_text),
            "ss_network_dropout": _one_or_all(dropouts) if any(dropouts) else "None"}


def _one_or_all(values: Sequence[float]) -> str:
    return str(values[0]) if len(set(values)) == 1 else json.dumps(values) if values else "None"


def _data(cfg: RunConfig, data: TrainData, world: int) -> dict[str, str]:
    datasets = data.datasets
    batch = sum(dataset.batch_size for dataset in datasets)
    facts = {
        "ss_num_train_images": str(summary.sample_count(datasets)), "ss_num_reg_images": "0", "ss_num_batches_per_epoch": str(data.steps_per_epoch * cfg.train.gradient_accumulation_steps),
        "ss_batch_size_per_device": str(batch), "ss_total_batch_size": str(batch * world * cfg.train.gradient_accumulation_steps),
        "ss_cache_latents": str(data.all_cached), "ss_bucket_info": json.dumps(summary.bucket_counts(datasets)), "ss_dataset_dirs": json.dumps(summary.folder_counts(datasets), ensure_ascii=False),
    }
    if cfg.train.export.tag_frequency:
        facts["ss_tag_frequency"] = json.dumps(summary.tag_counts(datasets), ensure_ascii=False)
    return facts


def _spec(cfg: RunConfig, base: BaseModel, data: TrainData, started: float) -> dict[str, str]:
    """The model spec's own entries, and what webui shows of the base model."""
    width, height = data.main_size()
    trigger = summary.trigger_phrase(data.datasets) if cfg.train.export.tag_frequency else ""
    top = cfg.train.max_timestep or len(base.family.alphas_cumprod(base.models))
    facts = {"modelspec.date": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"), "modelspec.resolution": f"{width}x{height}",
             "modelspec.timestep_range": f"{cfg.train.min_timestep},{top}", "ss_resolution": f"({width}, {height})"}
    facts |= {"modelspec.trigger_phrase": trigger} if trigger else {}
    layer = str(cfg.model.clip_skip + webui.by_version(base.family.base_version(base.models)).clip_skip)
    return facts | {"ss_clip_skip": layer, "modelspec.encoder_layer": layer, META_BASE_MODEL: base.models.name, META_PREDICTION: base.prediction}

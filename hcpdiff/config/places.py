"""Where a key is that was written in the wrong place, or that other trainers call by another name."""

from collections.abc import Iterator

from .shape import fields

# What sd-scripts, diffusers' and peft's examples call it -> where it is in a training config.
OTHER_NAMES = {name: place for place, names in {
    "lora_unet[0].rank": "network_dim network_rank lora_rank lora_dim dim", "lora_unet[0].alpha": "network_alpha lora_alpha",
    "lora_unet[0].dropout": "network_dropout lora_dropout", "lora_unet[0].layers": "target_modules lora_target_modules",
    "lora_unet[0].lr (in the templates: unet_lr)": "learning_rate unet_lr", "lora_text_encoder[0].lr": "text_encoder_lr",
    "train.train_steps": "max_train_steps max_steps num_train_steps", "train.train_epochs": "max_train_epochs num_train_epochs epochs epoch",
    "train.gradient_accumulation_steps": "accumulate_grad_batches grad_accum", "train.save_step": "save_every_n_steps checkpointing_steps save_steps",
    "train.optimizer._target_": "optimizer_type", "train.scheduler.name": "lr_scheduler_type", "train.scheduler.num_warmup_steps": "lr_warmup_steps warmup_steps",
    "train.loss.min_snr_gamma": "snr_gamma", "train.resume": "resume_from_checkpoint", "train.workers": "max_data_loader_n_workers dataloader_num_workers num_workers",
    "train.export.name": "output_name", "exp_dir": "output_dir", "data.<name>.batch_size": "train_batch_size",
    "data.<name>.bucket.target_area (width x height)": "resolution image_size", "data.<name>.bucket.step_size": "bucket_reso_steps",
    "data.<name>.bucket.no_upscale": "bucket_no_upscale", "data.<name>.bucket.crop: random": "random_crop", "data.<name>.cache_latents: disk": "cache_latents_to_disk",
    "data.<name>.source.<name>.img_root": "train_data_dir instance_data_dir image_dir", "data.<name>.source.<name>.repeats": "num_repeats dataset_repeats",
    "data.<name>.source.<name>.tag_shuffle": "shuffle_caption shuffle_tags", "data.<name>.source.<name>.flip": "flip_aug random_flip",
    "data.<name>.source.<name>.caption_dropout": "caption_dropout_rate", "data.<name>.source.<name>.tag_dropout": "caption_tag_dropout_rate",
    "preview.prompts": "sample_prompts validation_prompt validation_prompts", "preview.every": "sample_every_n_steps validation_steps",
    "model.pretrained_model_name_or_path": "pretrained_model base_model pretrained_model_name", "model.init_lora": "network_weights lora_weights",
    "model.attention": "xformers sdpa mem_eff_attn enable_xformers_memory_efficient_attention", "model.quantize: int8": "load_in_8bit fp8_base",
    "model.quantize: nf4": "load_in_4bit",
}.items() for name in names.split()}
MOST = 3  # places to name


def elsewhere(schema: type, name: str) -> str:
    """'. It is at: a.b' for a key that this schema has in another place, or under another name; '' where it has none."""
    found = list(dict.fromkeys(_places(schema, name)))[:MOST]
    other = getattr(schema, "OTHER_NAMES", {}).get(name)
    found = found or ([other] if other else [])
    return f". It is at: {', '.join(found)}" if found else ""


def _places(schema: type, name: str, before: str = "") -> Iterator[str]:
    """Where in the schema keys have this name; <name> is a name of the user's, [0] an element of a list."""
    for main, field in fields(schema).items():
        here, shape = f"{before}{main}", field.shape
        if name in (main, *shape.key.aliases):
            yield here
        for inner, joint in ((shape, "."), (shape.list_item, "[0]."), (shape.map_item, ".<name>.")):
            if inner is not None and inner.record:
                yield from _places(inner.record, name, here + joint)

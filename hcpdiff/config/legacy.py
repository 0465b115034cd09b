"""What configs of the framework's first generations say, in our keys: renamed classes, text transforms, keys that are gone."""

from .tree import Map, Node, Seq, Text, Word, at, scalar

TRAIN_MORE = "was removed; only LoRA is trained so far: use lora_unet and lora_text_encoder"
RUN = {
    "unet": TRAIN_MORE, "text_encoder": TRAIN_MORE, "plugin_unet": TRAIN_MORE, "plugin_TE": TRAIN_MORE, "lokr_unet": TRAIN_MORE,
    "tokenizer_pt": "was removed; embeddings are not trained so far. The trigger word is data.<dataset>.source.<source>.word_names.pt1",
    "ckpt_type": "was removed; files are always safetensors",
    "previewer": "was removed; use preview", "evaluator": "was removed; use preview",
    "interface": "was removed; use preview (it draws while training)", "vis_info": "was removed; use preview (it draws while training)",
    "lora_TE": "was removed; use lora_text_encoder",
}
MODEL = {
    "enable_xformers": "was removed; use model.attention: xformers (auto takes torch's own kernel, as fast)",
    "tokenizer_name": "was removed; the tokenizer is the base model's",
    "ema_unet": "was removed; LoRA weights are not averaged", "ema_text_encoder": "was removed; LoRA weights are not averaged",
    "clip_final_norm": "was removed; the final layer norm is always applied",
    "ema": "was removed; LoRA weights are not averaged", "wrapper": "was removed; the model's family is found by its files",
}
TRAIN = {
    "set_grads_to_none": "was removed; gradients live in one buffer",
    "cfg_scale": "was removed; training with guidance is not built so far",
    "lr": "was removed; use lora_unet[0].lr (in the template: unet_lr)",
    "scale_lr_pt": "was removed; embeddings are not trained so far", "optimizer_pt": "was removed; embeddings are not trained so far",
    "scheduler_pt": "was removed; embeddings are not trained so far",
    "methods": "was removed; use the keys of train and model",
}
LOSS = {"criterion": "was removed; use train.loss.type (mse, l1, huber, smooth_l1) and train.loss.min_snr_gamma"}
SCHEDULE = {"scheduler_kwargs": "was removed; use num_cycles, power and min_lr_ratio", "_target_": "was removed; use name"}
SOURCE = {
    "text_transforms": "was removed; use tag_shuffle, keep_tokens, tag_dropout, caption_dropout and word_names",
    "image_transforms": "was removed; use flip (images are always scaled to [-1, 1])",
    "use_sdxl": "was removed; the model's family is found by its files",
}
DATASET = {"att_mask_encode": "was removed; use att_mask of the source", "att_mask": "belongs to a source: data.<dataset>.source.<source>.att_mask"}

LOGGERS = {"hcpdiff.loggers.CLILogger": "hcpdiff.loggers.ConsoleLogger", "hcpdiff.loggers.TBLogger": "hcpdiff.loggers.TensorBoardLogger"}
UNUSED_LOGGER_KEYS = ("_partial_", "log_step", "img_log_dir")
TEMPLATES = "prompt_tuning_template/"  # where the ancestor kept its prompt templates


def template_name(name: str) -> str:
    """A prompt template of the ancestor as we carry it: prompt_tuning_template/object.txt is cfgs/prompt_templates/object.txt."""
    return name.replace(TEMPLATES, "cfgs/prompt_templates/", 1) if name.startswith(TEMPLATES) else name


def modernise(tree: Map, notices: list[str]) -> None:
    """Rewrites one file's tree in place; what was rewritten is said in `notices`."""
    if isinstance(tree.get("logger"), Seq):
        tree["logger"][:] = [made for index, spec in enumerate(tree["logger"]) for made in _logger(spec, index, notices)]
    for dataset in _maps(tree.get("data")):
        for source in _maps(dataset.get("source")):
            for name, rewrite in (("text_transforms", _text_transforms), ("image_transforms", _image_transforms)):
                if name in source:
                    rewrite(source, notices)
    _optimizer(tree)


def _maps(node: Node) -> list[Map]:
    return [value for value in node.values() if isinstance(value, Map)] if isinstance(node, Map) else []


def _seq(node: Node) -> list:
    return node if isinstance(node, Seq) else []


def _logger(spec: Node, index: int, notices: list[str]) -> list[Node]:
    """A logger under its name of today; the ancestor's console logger wrote a file as well."""
    old = spec.get("_target_") if isinstance(spec, Map) else None
    if not isinstance(old, Text) or str(old) not in LOGGERS:
        return [spec]
    gone = [key for key in UNUSED_LOGGER_KEYS if spec.pop(key, None) is not None and key != "_partial_"]
    path = spec.pop("out_path", None)
    spec["_target_"] = at(Text(LOGGERS[str(old)]), old.origin)
    made = [spec]
    if str(old).endswith("CLILogger") and isinstance(path, Text) and not is_null(path):
        made.append(at(Map(_target_=at(Text("hcpdiff.loggers.FileLogger"), old.origin), name=path), spec.origin))
    dropped = f"; {', '.join(gone)} no longer set there (train.log_step is one for all)" if gone else ""
    notices.append(f"logger[{index}] ({old.origin}): {old} is called {' and '.join(str(item['_target_']) for item in made)} now{dropped}")
    return made


def _optimizer(tree: Map) -> None:
    """`_partial_: true` beside an optimizer or noise schedule: they are always completed by the trainer."""
    for block, name in (("train", "optimizer"), ("model", "noise_scheduler")):
        spec = tree.get(block, {}).get(name) if isinstance(tree.get(block), Map) else None
        if isinstance(spec, Map):
            spec.pop("_partial_", None)


def _transforms(node: Node) -> list[Map] | None:
    """The steps of a torchvision Compose, or the single step; None where it is neither."""
    if not isinstance(node, Map):
        return None
    steps = _seq(node.get("transforms")) if str(node.get("_target_", "")).endswith("transforms.Compose") else [node]
    return list(steps) if all(isinstance(step, Map) and "_target_" in step for step in steps) else None


def _text_transforms(source: Map, notices: list[str]) -> None:
    """Tag transforms to tag_shuffle, tag_dropout, caption_dropout, word_names; left as it is (a fault) when a step is unknown."""
    steps = _transforms(source["text_transforms"])
    origin = source["text_transforms"].origin
    said: dict[str, Node] = {"tag_shuffle": Word("false"), "tag_dropout": Word("0.0"), "caption_dropout": Word("0.0")}
    for step in steps or ():
        name = str(step["_target_"]).rsplit(".", 1)[-1]
        if name == "TagShuffle":
            said["tag_shuffle"] = Word("true")
        elif name in ("TagDropout", "TagErase"):
            said["tag_dropout" if name == "TagDropout" else "caption_dropout"] = step.get("p", Word("0.1"))
        elif name == "TemplateFill":
            said["word_names"] = step.get("word_names", Map())
        else:
            return
    if steps is None:
        return
    del source["text_transforms"]
    for key, value in said.items():
        source.setdefault(key, at(value, origin))
    notices.append(f"text_transforms ({origin}) is read as {', '.join(said)}")


def _image_transforms(source: Map, notices: list[str]) -> None:
    """ToTensor and Normalize are what we always do; a random flip is `flip`."""
    steps = _transforms(source["image_transforms"])
    names = {str(step["_target_"]).rsplit(".", 1)[-1] for step in steps or ()}
    if steps is None or not names <= {"ToTensor", "Normalize", "RandomHorizontalFlip"}:
        return
    origin = source.pop("image_transforms").origin
    if "RandomHorizontalFlip" in names:
        source.setdefault("flip", at(Word("true"), origin))
    notices.append(f"image_transforms ({origin}): images are always scaled to [-1, 1]" + ("; flip: true" if "RandomHorizontalFlip" in names else ""))


def is_null(node: Node) -> bool:
    """Whether a node is a written null."""
    return isinstance(node, Word) and scalar(node) is None

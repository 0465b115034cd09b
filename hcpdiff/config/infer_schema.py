"""Every key of a drawing config (`python -m hcpdiff.visualizer`): type, default, unit and meaning. Same rules as `config.schema`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from .field import key, not_multiple
from .schema import MOST_SIDE, PIXELS

# Keys of the ancestor and of other programs that are not there; the text says what to use.
NOT_YET = "is not built yet (img2img, inpaint, ControlNet and hires fix are refused rather than ignored). Remove it to draw from text."
REMOVED = {
    "condition": NOT_YET, "ex_input": NOT_YET, "img2img": NOT_YET, "inpaint": NOT_YET, "controlnet": NOT_YET, "control_net": NOT_YET, "hires": NOT_YET,
    "hires_fix": NOT_YET, "highres_fix": NOT_YET, "init_image": NOT_YET, "mask": NOT_YET, "strength": NOT_YET,
    "interface": "was removed; use out_dir and save (image_type, quality, settings).",
    "vis_info": "was removed; the visualizer always says what it draws.",
    "exp_dir": "was removed here; give lora_path the run folder (its newest checkpoint is taken) or a file in it.",
    "model_steps": "was removed; name the file in lora_path, such as exps/<run>/ckpts/unet-1000.safetensors.",
    "lora_scale": "is called lora_alpha.", "negative_prompt": "is called neg_prompt.", "num_inference_steps": "belongs below infer_args.",
    "guidance_scale": "belongs below infer_args.", "width": "belongs below infer_args.", "height": "belongs below infer_args.",
    "save_root": "is called out_dir.", "scheduler": "is given as new_components.scheduler.",
    "mixed_precision": "is called dtype here.", "num_images": "is given as bs (at once) and num (how often).",
}

# Arguments of the pipeline that other keys (or we) give.
OWNED = {
    "prompt": "use the key prompt", "negative_prompt": "use the key neg_prompt", "num_images_per_prompt": "use bs and num", "generator": "use the key seed",
    "clip_skip": "use the key clip_skip", "latents": "they come from the key seed", "prompt_embeds": "they come from the key prompt",
    "negative_prompt_embeds": "they come from the key neg_prompt", "output_type": "use save.image_type", "return_dict": "it is not needed",
    "callback": "it is not needed", "callback_steps": "it is not needed", "callback_on_step_end": "it is not needed",
    "callback_on_step_end_tensor_inputs": "it is not needed", "cross_attention_kwargs": "a LoRA's strength is lora_alpha",
    "ip_adapter_image": "IP-adapter is not built yet", "ip_adapter_image_embeds": "IP-adapter is not built yet",
    "prompt_2": "both text encoders read the key prompt", "negative_prompt_2": "both text encoders read the key neg_prompt",
    "pooled_prompt_embeds": "they come from the key prompt", "negative_pooled_prompt_embeds": "they come from the key neg_prompt",
    "image": "img2img is not built yet", "strength": "img2img is not built yet", "mask_image": "inpaint is not built yet",
}
# What webui, sd-scripts and others call them.
OTHER_NAMES = {
    **dict.fromkeys(("steps", "sampling_steps", "num_steps", "inference_steps"), "infer_args.num_inference_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "scale", "guidance"), "infer_args.guidance_scale"), "rescale": "infer_args.guidance_rescale",
    **dict.fromkeys(("sampler", "sampler_name", "sampler_index", "scheduler"), "new_components.scheduler (such as new_components.scheduler._target_=diffusers.EulerDiscreteScheduler)"),
    "W": "infer_args.width", "H": "infer_args.height", **dict.fromkeys(("batch_size", "train_batch_size"), "bs"), **dict.fromkeys(("n_iter", "num_images", "batch_count"), "num"),
    "negative": "neg_prompt", **dict.fromkeys(("output_dir", "outdir"), "out_dir"), **dict.fromkeys(("lora", "lora_weights", "network_weights"), "lora_path"),
}
# Least value, and whether it is an integer, of the arguments that every pipeline has.
NUMBERS = {"width": (8, int), "height": (8, int), "num_inference_steps": (1, int), "guidance_scale": (0, float), "guidance_rescale": (0, float), "eta": (0, float)}
SIDES = ("width", "height")
# Pairs of whole numbers of SDXL's pipeline, (height, width) or (top, left).
PAIRS = ("original_size", "crops_coords_top_left", "target_size", "negative_original_size", "negative_crops_coords_top_left", "negative_target_size")


@dataclass
class MergeItem:
    """One LoRA among several."""

    path: str | None = key(None, "LoRA file, or a run folder (its newest).", "LoRA 文件，或训练输出文件夹（取最新）。", path=True)
    path_TE: str | list[str] | None = key("auto", "LoRA file of the text encoder. auto: the files of that step beside `path`; null: none. A list of two: SDXL's encoders.",
                                          "文本编码器的 LoRA 文件。auto：取 path 旁边同一步的文件；null：不使用。SDXL 可用两个文件的列表。", path=True)
    alpha: float = key(1.0, "Strength on the UNet; 1 is what was trained.", "UNet 上的强度；1 为训练时的效果。")
    alpha_TE: float | None = key(None, "Strength on the text encoder. null: as alpha.", "文本编码器上的强度；null 与 alpha 相同。")
    layers: str | list[str] = key("all", "all, or patterns as in training's `layers`: only these layers of the file are used.",
                                  "all，或与训练配置 layers 相同写法的层名：只使用这些层。")


@dataclass
class SaveConfig:
    """How pictures are written."""

    REMOVED: ClassVar = {"save_cfg": "was removed; use save.settings (both, inside, beside, none).", "out_dir": "is the top-level key out_dir."}
    image_type: Literal["png", "webp", "jpg", "jpeg"] = key("png", "Image format.", "图片格式。")
    quality: int = key(95, "Quality of jpg and webp; webp at 100 is lossless.", "jpg 与 webp 的质量；webp 为 100 时无损。", ge=1, le=100)
    settings: Literal["both", "inside", "beside", "none"] = key(
        "both", "Where the settings of a picture go: inside it (as text that webui reads, and as JSON without local paths), beside it (a .yaml that --cfg "
        "takes to draw the same picture again), both, or none.",
        "生成参数的保存位置：inside 写入图片（webui 可读的文本，以及不含本地路径的 JSON），beside 存为旁边的 .yaml（可直接作为 --cfg 重新生成同一张图），both 两者，none 不保存。")


@dataclass
class VaeOptimize:
    """Less memory while the VAE decodes."""

    tiling: bool = key(False, "Decode in tiles: large pictures on small cards.", "分块解码，适合小显存生成大图。")
    slicing: bool = key(False, "Decode the pictures of a batch one by one.", "逐张解码一批中的图片。")


@dataclass
class InferConfig:
    """Top level of a drawing config."""

    REMOVED: ClassVar = REMOVED
    OTHER_NAMES: ClassVar = OTHER_NAMES
    pretrained_model: str = key(doc="Base model: a folder in diffusers format, a single .safetensors or .ckpt file as webui uses them, or a hub id.",
                                zh="底模：diffusers 格式的文件夹、webui 使用的单个 .safetensors 或 .ckpt 文件，或 huggingface 上的模型名。", exists="model")
    config: str | None = key(None, "For a single file: a folder with a diffusers model's configs, used instead of those of the released models. null: found from the file.",
                             "底模为单个文件时：使用该文件夹中的 diffusers 配置，而非官方模型的配置。null 为根据文件自动判断。", path=True, exists="folder")
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample"] = key(
        "auto", "What the model predicts. auto: as its scheduler config says, or what a single file says of itself.",
        "模型预测的目标。auto 以其 scheduler 配置（单个文件则以文件自身的标记）为准。")
    revision: str | None = key(None, "Branch, tag or commit on the hub.", "hub 上的分支、标签或提交。")
    variant: str | None = key(None, "Weight variant on the hub or in the folder, such as fp16.", "权重变体，例如 fp16。")

    vae: str | None = key(None, "Another VAE: a folder in diffusers format, a single .safetensors file, or a hub id.",
                          "替换 VAE：diffusers 格式的文件夹、单个 .safetensors 文件，或 hub 上的模型名。", exists="model")

    prompt: str | list[str] = key("", "What to draw: `{text:1.2}` weighs text, `{text}` means 1.1. A list: each prompt is drawn bs × num times.",
                                  "提示词：`{文本:1.2}` 调整权重，`{文本}` 为 1.1。列表：每个提示词各画 bs × num 张。")
    neg_prompt: str | list[str] = key("", "Negative prompt, one for all or one per prompt.", "反向提示词：共用一个，或每个提示词各一个。")
    prompt_file: str | None = key(None, "Text file with one prompt per line, instead of prompt.", "每行一个提示词的文本文件，代替 prompt。", path=True, exists="file")
    prompt_syntax: Literal["hcp", "webui", "plain"] = key(
        "hcp", "How prompts are read. hcp: `{text:1.2}`; webui: `(text:1.2)`, `[text]`, `BREAK`, `<lora:name:0.8>`; plain: no weights.",
        "提示词语法。hcp：`{文本:1.2}`；webui：`(文本:1.2)`、`[文本]`、`BREAK`、`<lora:名字:0.8>`；plain：不含权重。")
    N_repeats: int | Literal["auto"] = key("auto", "Chunks of 75 tokens a prompt may fill; auto: as many as it needs.",
                                           "提示词可占用的 75 token 段数；auto 为按需。", ge=1, le=64, unit="75 tokens")
    clip_skip: int = key(0, "How many of the text encoder's last layers to skip; 0 = use the last layer (webui's 1). SDXL never uses the last and counts from the one before.",
                         "跳过文本编码器最后几层；0 表示用最后一层（即 webui 的 1）。SDXL 固定使用倒数第二层并从那里起算。", ge=0)
    emb_dir: str | None = key("embs", "Folder of embeddings (.pt, .bin, .safetensors); a word of a prompt that has a file's name becomes its vectors.",
                              "embedding 文件夹（.pt、.bin、.safetensors）；提示词中与文件同名的词会替换为其向量。", path=True)

    lora_path: str | list[str] | None = key(None, "LoRA file (ours, webui/kohya, PEFT, ancestor) or a run folder (its newest); a list for several. null: none.",
                                            "LoRA 文件（本框架、webui/kohya、PEFT、旧版）或训练输出文件夹（取最新）；可为列表。null 为不使用。", path=True)
    lora_path_TE: str | list[str] | None = key("auto", "LoRA file of the text encoder. auto: the files of that step beside lora_path; null: none. "
                                               "A list: one per lora_path, or beside one lora_path the files of SDXL's two encoders.",
                                               "文本编码器的 LoRA 文件。auto：取 lora_path 旁边同一步的文件；null：不使用。列表：与 lora_path 一一对应；只有一个 lora_path 时为 SDXL 两个编码器的文件。", path=True)
    lora_alpha: float | list[float] = key(1.0, "Strength of the LoRA; 1 is what was trained, 0 is the base model. A list: one per lora_path.",
                                          "LoRA 强度；1 为训练时的效果，0 等于底模。列表：与 lora_path 一一对应。")
    lora_alpha_TE: float | list[float] | None = key(None, "Strength on the text encoder. null: as lora_alpha.", "文本编码器上的强度；null 与 lora_alpha 相同。")
    merge: list[MergeItem] | dict | None = key(None, "Several LoRAs: a list of `{path, path_TE, alpha, alpha_TE, layers}`. The ancestor's `group1: …` form is read too.",
                                               "多个 LoRA：`{path, path_TE, alpha, alpha_TE, layers}` 的列表；也支持旧版 `group1: …` 写法。")
    lora_dir: str | None = key(None, "Folder in which webui's `<lora:name:0.8>` finds name.safetensors.", "webui 语法 `<lora:名字:0.8>` 查找文件的文件夹。", path=True, exists="folder")

    seed: int | list[int] | None = key(None, "Seed of the first picture; picture i has seed + i. A list: one picture per seed. null: a random one, which is said.",
                                       "第一张图的种子，第 i 张为 seed + i。列表：每个种子一张图。null：随机并打印。", ge=0, lt=2**32)
    bs: int = key(1, "Pictures drawn at once; does not change the pictures but for rounding.", "同时生成的图片数；除舍入误差外不影响图片内容。", ge=1, le=10_000)
    num: int = key(1, "How often: bs × num pictures per prompt.", "次数：每个提示词共 bs × num 张。", ge=1, le=100_000)
    infer_args: dict = key({}, "Arguments of the pipeline: width, height (default: the model's own size), num_inference_steps, guidance_scale, eta …",
                           "pipeline 的参数：width、height（默认为模型自身尺寸）、num_inference_steps、guidance_scale、eta 等。")
    new_components: dict[str, dict] = key({}, "Parts that replace the model's own, by _target_: scheduler, vae, unet, text_encoder, tokenizer (SDXL: text_encoder_2, tokenizer_2 too). "
                                          "A scheduler takes what it leaves out from the model's own.",
                                          "用 _target_ 替换模型部件：scheduler、vae、unet、text_encoder、tokenizer（SDXL 还有 text_encoder_2、tokenizer_2）。scheduler 未写的参数取自底模。", slot="component")

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "Compute precision. auto: bf16 or fp16 on a GPU, fp32 on CPUs and Apple GPUs. LoRA factors stay fp32.",
                                                         "计算精度。auto：GPU 用 bf16 或 fp16，CPU 与苹果 GPU 用 fp32。LoRA 权重保持 fp32。")
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps, xpu.", "auto、cpu、cuda、cuda:1、mps、xpu。")
    attention: Literal["auto", "sdpa", "xformers", "eager"] = key("auto", "Attention kernel. auto: torch's scaled_dot_product_attention.", "注意力实现。auto 为 torch 的 SDPA。")
    cpu_threads: int | Literal["auto"] = key("auto", "Threads of torch on the CPU. auto: all cores.", "CPU 线程数。auto 为全部核心。", ge=1)
    offload: bool | Literal["model", "sequential"] | None = key(
        False, "Keep parts in main memory while they are not used. true or model: whole parts; sequential: layer by layer (least memory, slow).",
        "不用的部分放在内存中。true 或 model：整个部件；sequential：逐层（显存最少，较慢）。")
    vae_optimize: VaeOptimize = key(VaeOptimize, "Less memory while the VAE decodes.", "VAE 解码省显存选项。")

    out_dir: str = key("output", "Folder of the pictures; files are numbered and never overwritten.", "图片输出文件夹；文件自动编号，不会覆盖。", path=True)
    save: SaveConfig = key(SaveConfig, "How pictures are written.", "图片保存方式。")

    def check(self) -> Iterator[str]:
        """Faults of infer_args that need no pipeline to be seen, of bs × num, and of two VAEs."""
        if self.vae and "vae" in self.new_components:
            yield "vae and new_components.vae both give a VAE; leave one of them out"
        if self.bs * self.num > 100_000:
            yield f"bs × num = {self.bs} × {self.num} pictures of each prompt; at most 100000 are drawn in one run"
        for name in self.infer_args:
            if name in OWNED:
                yield f"infer_args.{name} cannot be given there: {OWNED[name]}"
            elif name in OTHER_NAMES:
                yield f"infer_args.{name} is {OTHER_NAMES[name]} here"
        for name, (least, kind) in NUMBERS.items():
            value = self.infer_args.get(name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            most = MOST_SIDE if name in SIDES else 10**6
            good = number and least <= value <= most and (kind is float or float(value).is_integer())
            if value is not None and not good:
                yield f"infer_args.{name} = {value!r}; it must be {'a whole number' if kind is int else 'a number'}, at least {least} and at most {most}"
            elif value is not None and name in SIDES and (fault := not_multiple(value, PIXELS)):
                yield f"infer_args.{name} = {value!r}; it {fault}"
        for name in PAIRS:
            value = self.infer_args.get(name)
            if value is not None and not (isinstance(value, (list, tuple)) and len(value) == 2 and all(type(side) is int and 0 <= side <= 10**6 for side in value)):
                yield f"infer_args.{name} = {value!r}; it must be a pair of whole numbers: {'[top, left]' if 'crop' in name else '[height, width]'}"

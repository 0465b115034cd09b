"""Every key of a training config: type, default, unit and meaning. The reference pages are generated from this file.

Annotations used: int, float, bool, str, Literal, X | None, list[X], dict[str, X], dataclasses, and `dict` with a `slot` for an object
that is built from `_target_`. `REQUIRED` keys have no default.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from . import legacy
from .field import key
from .places import OTHER_NAMES

MOST_SIDE = 16384  # pixels; beyond these a slip of the keyboard would ask for terabytes
MOST_PIXELS = MOST_SIDE**2
PIXELS = 8  # pixels a side of one number of every supported VAE's latents
FEW_BITS = (*((word, "nf4") for word in ("int4", "4bit", "4", "fp4", "uint4")), *((word, "int8") for word in ("true", "8bit", "8", "fp8", "uint8")))
FORMATS = (("float16", "fp16"), ("half", "fp16"), ("bfloat16", "bf16"), ("float32", "fp32"), ("float", "fp32"), ("full", "fp32"))
FORBIDDEN = frozenset('/\\:*?"<>|')  # characters that some system's file names cannot have
OPEN_METADATA = ("ss_", "ssmd_", "modelspec.")  # beginnings of header entries that webui and other programs read


@dataclass
class LoraGroup:
    """One group of adapted layers: which layers, and with what rank, strength and learning rate."""

    lr: float = key(doc="Learning rate of this group.", zh="该组的学习率。", ge=0)
    rank: int | float = key(4, "Rank of the LoRA. Below 1: that share of the layer's output width; 4.0 means 4.",
                            "LoRA 的秩。小于 1 时表示输出宽度的比例；4.0 等同于 4。", gt=0, le=16384)
    alpha: float | None = key(None, "LoRA alpha; the effective scale is alpha / rank. null: alpha = rank.",
                              "LoRA 的 alpha，实际缩放为 alpha / rank。null 表示等于 rank。", gt=0)
    dropout: float = key(0.0, "Dropout on the LoRA branch only; the base layer is never dropped.",
                         "只作用于 LoRA 分支的 dropout，不影响原始层。", ge=0, lt=1)
    layers: list[str] = key(doc="Module names, or regular expressions after 're:' (matched from the start of the name). "
                            "Every Linear and Conv2d at or inside a match is adapted.",
                            zh="模块名，或以 're:' 开头的正则表达式（从名字开头匹配）。匹配到的模块本身及其内部所有 Linear、Conv2d 都会加上 LoRA。")
    exclude: list[str] = key([], "Patterns, as in layers, of what to leave out.", "要排除的层，写法同 layers。")
    type: Literal["lora"] = key("lora", "The adapter method.", "适配器类型。")

    def check(self) -> Iterator[str]:
        """Faults that the types cannot tell: no layers, patterns that are no regular expressions."""
        if not self.layers:
            yield "layers is empty: name at least one layer, such as 're:.*\\.attn.?$'"
        for name in ("layers", "exclude"):
            for index, pattern in enumerate(getattr(self, name)):
                yield from (f"{name}[{index}] {fault}" for fault in pattern_faults(pattern))
        if self.rank >= 1 and self.rank != int(self.rank):
            yield f"rank = {self.rank} must be a whole number, or a share below 1"


@dataclass
class ModelConfig:
    """The base model."""

    REMOVED: ClassVar = legacy.MODEL

    pretrained_model_name_or_path: str = key(
        doc="Base model: a folder in diffusers format, a single .safetensors or .ckpt file as webui uses them, or a hub id.",
        zh="底模：diffusers 格式的文件夹、webui 使用的单个 .safetensors 或 .ckpt 文件，或 huggingface 上的模型名。", exists="model")
    config: str | None = key(None, "For a single file: a folder with a diffusers model's configs, used instead of those of the released models. null: found from the file.",
                             "底模为单个文件时：使用该文件夹中的 diffusers 配置，而非官方模型的配置。null 为根据文件自动判断。", path=True, exists="folder")
    revision: str | None = key(None, "Branch, tag or commit on the hub.", "hub 上的分支、标签或提交。")
    variant: str | None = key(None, "Weight variant on the hub or in the folder, such as fp16.", "权重变体，例如 fp16。")
    vae: str | None = key(None, "Another VAE: a folder in diffusers format, a single .safetensors file, or a hub id.",
                          "替换 VAE：diffusers 格式的文件夹、单个 .safetensors 文件，或 hub 上的模型名。", exists="model")
    tokenizer_repeats: int = key(1, "How many chunks of 75 tokens a prompt may fill.", "提示词长度的倍数，1 倍为 75 个 token。", ge=1, le=16, unit="75 tokens")
    clip_skip: int = key(0, "How many of the text encoder's last layers to skip; 0 = use the last layer (webui's 1). SDXL never uses the last and counts from the one before: "
                         "0 is right for it.", "跳过文本编码器最后几层；0 表示用最后一层（即 webui 的 1）。SDXL 固定使用倒数第二层并从那里起算，保持 0 即可。", ge=0)
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass: less memory, one more forward pass a step.",
                                       "反向传播时重新计算激活值：省显存，每步多一次前向计算。")
    quantize: Literal["int8", "nf4"] | None = key(
        None, "Keep the frozen denoiser's weights in few bits: int8 needs 0.53 of bf16's memory, nf4 0.44 (SD1.5) or 0.31 (SDXL) with larger errors. They are made dense layer by "
        "layer where they are used, which costs time. The LoRA stays fp32, and its files are for the plain model. null: off.",
        "以更少的位数保存被冻结的去噪网络权重：int8 占 bf16 显存的 0.53，nf4 占 0.44（SD1.5）或 0.31（SDXL），但误差更大。使用时逐层还原，因此稍慢。LoRA 仍为 fp32，保存的文件用于原始底模。null 为关闭。",
        meant=FEW_BITS)
    compile: bool = key(False, "Compile the model's repeated blocks (torch.compile), for long runs on a GPU: where all batches have one size, for this size, else for any. The first step is slow. "
                        "Resuming is exact but for rounding. Needs a C++ compiler on a CPU, triton and a C compiler on a GPU.",
                        "用 torch.compile 编译模型中重复的模块，适合 GPU 上的长时间训练：所有批次尺寸相同时只为该尺寸编译，否则编译为适用于任意尺寸。第一步较慢；继续训练的结果只在舍入上可能不同。CPU 需要 C++ 编译器，GPU 需要 triton 和 C 编译器。")
    attention: Literal["auto", "sdpa", "xformers", "eager"] = key(
        "auto", "Attention kernel. auto: torch's scaled_dot_product_attention.", "注意力实现。auto 为 torch 的 SDPA。")
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample"] = key(
        "auto", "What the model predicts. auto: as the base model's scheduler config says, or what a single file says of itself.",
        "模型预测的目标。auto 以底模的 scheduler 配置（单个文件则以文件自身的标记）为准。")
    noise_scheduler: dict | None = key(None, "Another noise schedule for training, by _target_ (a diffusers scheduler). null: the base model's.",
                                       "训练用的噪声调度器（_target_）。null 用底模自带的。", slot="noise_scheduler")
    init_lora: str | None = key(None, "Start the UNet's LoRA from this file (ours, webui/kohya, PEFT, ancestor), or from the newest step of this run folder. One that holds the text encoder's too starts both.",
                                "UNet 的 LoRA 从该文件继续训练（支持本框架、webui/kohya、PEFT 与旧版格式），也可给训练文件夹（取最新一步）；其中含文本编码器部分时一并载入。", path=True, exists="either")
    init_lora_TE: str | list[str] | None = key(None, "Start the text encoder's LoRA from this file or run folder; SDXL has two encoders, and a list takes a file for each.",
                                               "文本编码器的 LoRA 从该文件或训练文件夹继续训练；SDXL 有两个文本编码器，可用列表各给一个文件。", path=True, exists="either")


@dataclass
class SchedulerConfig:
    """Learning-rate schedule: a factor on each group's lr as a function of the optimizer step."""

    REMOVED: ClassVar = legacy.SCHEDULE

    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "one_cycle"] = key(
        "constant_with_warmup", "Shape of the schedule after the warmup.", "预热之后的学习率曲线。")
    num_warmup_steps: int | float = key(0, "Steps of linear warmup; a float below 1 is a share of the run.", "线性预热的步数；小于 1 的小数表示占总步数的比例。", ge=0, unit="steps")
    num_training_steps: int | None = key(None, "Length of the schedule. null: the length of the run.", "曲线长度。null 表示整个训练。", ge=1, unit="steps")
    num_cycles: float = key(1, "cosine_with_restarts: number of cycles.", "cosine_with_restarts 的周期数。", gt=0)
    power: float = key(1.0, "polynomial: the exponent.", "polynomial 的指数。", gt=0)
    min_lr_ratio: float = key(0.0, "The schedule ends at this share of the lr (linear, cosine, polynomial, one_cycle).",
                              "曲线末端学习率与初始学习率之比。", ge=0, le=1)


@dataclass
class LossConfig:
    """The loss between the model's prediction and its target."""

    REMOVED: ClassVar = legacy.LOSS

    type: Literal["mse", "l1", "huber", "smooth_l1"] = key("mse", "Loss per element.", "逐元素的损失函数。")
    delta: float = key(0.1, "Threshold of huber and smooth_l1.", "huber 与 smooth_l1 的阈值。", gt=0)
    min_snr_gamma: float | None = key(None, "Min-SNR weighting (arXiv:2303.09556); the paper's value is 5. null: off.",
                                      "Min-SNR 加权（arXiv:2303.09556），论文取 5；null 为关闭。", gt=0)


@dataclass
class ExportConfig:
    """The file that webui and ComfyUI take, written with each save. `export: true` turns it on, and so does any other key of it."""

    SHORT: ClassVar = "webui"  # true or false in the place of the map is this key's value
    APART: ClassVar = True  # its check looks at each key alone

    webui: bool = key(False, "Each save also writes webui/<name>-<step>.safetensors in the run folder: UNet and text encoders in one file for AUTOMATIC1111's webui and ComfyUI. "
                      "train.export: true is short for it; setting another key here turns it on as well.",
                      "每次保存时，同时在训练文件夹的 webui/ 中写出 <name>-<步数>.safetensors：UNet 与文本编码器合为一个文件，供 AUTOMATIC1111 webui 与 ComfyUI 使用。可简写为 train.export: true；设置这里的其他任何一项也会开启。")
    name: str | None = key(None, "Name of the files and of the LoRA in webui. null: the run folder's name.", "文件名，也是 webui 中 LoRA 的名字。null 取训练文件夹的名字。")
    save_dtype: Literal["fp32", "fp16", "bf16"] | None = key(None, "Number format of these files. null: as train.save_dtype.", "这些文件的精度。null 与 train.save_dtype 相同。")
    tag_frequency: bool = key(False, "Write the captions' tags with their counts, and the trigger words, into the file. Whoever gets the file can read them.",
                              "把标注中的标签及其次数和触发词写入文件。得到该文件的人都能看到。")
    cover: bool = key(True, "Put a preview picture into the file, where preview.prompts draws some: the first picture of the newest preview. Previews are then drawn before the save.",
                      "若设置了 preview.prompts，把最近一次预览的第一张图放入文件作为封面；此时先生成预览再保存。")
    metadata: dict[str, str] = key({}, "Further entries of the file's header, such as modelspec.author; their names begin with ss_, ssmd_ or modelspec.",
                                   "写入文件头的其他条目，例如 modelspec.author；名字须以 ss_、ssmd_ 或 modelspec. 开头。")

    def check(self) -> Iterator[str]:
        """A name that is no file's, entries that other programs would not look for."""
        if self.name is not None and (not self.name.strip(" .") or self.name != self.name.strip() or set(self.name) & FORBIDDEN or any(ord(char) < 32 for char in self.name)):
            yield f"name = {self.name!r} cannot be a file's name: without / \\ : * ? \" < > | and not empty"
        for entry in self.metadata:
            if not entry.startswith(OPEN_METADATA):
                yield f"metadata: {entry!r} must begin with {', '.join(OPEN_METADATA)}"
            if entry.startswith("modelspec.hash"):
                yield f"metadata: {entry!r} is computed from the file"


@dataclass
class TrainConfig:
    """The training run."""

    REMOVED: ClassVar = legacy.TRAIN

    train_epochs: int | None = key(None, "Passes over the first dataset. Set this or train_steps.", "训练轮数（以第一个数据集计）。与 train_steps 二选一。", ge=1, le=10_000_000)
    train_steps: int | None = key(None, "Optimizer steps. Set this or train_epochs.", "优化器步数。与 train_epochs 二选一。", ge=1, le=100_000_000, unit="steps")
    gradient_accumulation_steps: int = key(1, "Batches per optimizer step and process.", "梯度累积的批数。", ge=1, le=1_000_000)
    max_grad_norm: float | None = key(1.0, "Clip the gradient's total norm to this. null: no clipping.", "梯度裁剪的范数上限；null 不裁剪。", gt=0)
    workers: int | Literal["auto"] = key("auto", "Loader processes. auto: none when latents are cached, else up to 4.", "数据加载进程数。auto：缓存 latent 时为 0，否则至多 4。", ge=0, le=1024)
    cpu_threads: int | Literal["auto"] = key("auto", "Threads of torch on the CPU. auto: all cores, shared by the processes.", "CPU 线程数。auto 为全部核心。", ge=1, le=4096)
    save_step: int | None = key(100, "Save every this many steps. null: only at the end.", "每多少步保存一次；null 只在结束时保存。", ge=1, unit="steps")
    save_dtype: Literal["fp32", "fp16", "bf16"] = key("fp32", "Number format of the files in ckpts/.", "ckpts/ 中文件的精度。", meant=FORMATS)
    keep_states: int = key(2, "How many of the newest resumable states to keep.", "保留最近几个可恢复的训练状态。", ge=1)
    keep_last: int | None = key(None, "Keep the weight files of this many newest saves, and of those that have a state; older ones of this run are deleted. null: keep all.",
                                "只保留最近几次保存的权重文件（仍有训练状态的也保留），本次训练更早的会被删除。null 全部保留。", ge=1)
    keep_every: int | None = key(None, "With keep_last: weight files of every step that is a multiple of this are kept for good. null: none.",
                                 "与 keep_last 同用：步数为其倍数的权重文件永久保留。null 为无。", ge=1, unit="steps")
    on_save_error: Literal["stop", "continue"] = key(
        "stop", "When a save fails (disk full, folder not writable): stop the run, or warn and try again at the next save. The last save of a run must succeed either way.",
        "保存失败（磁盘已满、文件夹不可写）时：stop 停止训练，continue 给出警告并在下次保存时重试。最后一次保存失败总是报错。")
    export: ExportConfig = key(ExportConfig, "A file for webui and ComfyUI with each save; true turns it on.", "每次保存时另写一个供 webui 与 ComfyUI 使用的文件；true 为开启。")
    max_nonfinite: int = key(10, "Stop (exit code 3) after this many steps in a row with a NaN or infinite loss or gradient; such steps change nothing.",
                             "连续多少步出现 NaN 或无穷时停止（退出码 3）；这些步不会改变权重。", ge=1, unit="steps")
    log_step: int = key(10, "Log every this many steps.", "每多少步记录一次日志。", ge=1, unit="steps")
    resume: str | None = key(None, "A run folder to go on with, one of its states (<run folder>/states/<step>), or 'latest' for the newest resumable run below exps/.",
                             "要继续的训练文件夹，或其中某个状态（<训练文件夹>/states/<步数>），或 latest（exps/ 下最新的可恢复训练）。", path=True, exists="folder", words=("latest",))
    resume_force: bool = key(False, "Go on although what is trained, or on what, has changed since the state was saved. The changes are logged.",
                             "即使训练内容或数据与保存时不同，也继续训练；改动会写入日志。")
    on_orphan: Literal["stop", "continue"] = key("stop", "When the launcher (accelerate launch, torchrun) that started the run is killed: stop as at SIGTERM (finish and save "
                                                 "the step), or go on alone. A shell is no launcher. Not seen on Windows.",
                                                 "启动训练的 launcher（accelerate launch、torchrun）被杀死时：stop 与收到 SIGTERM 相同（完成并保存当前步后停止），continue 继续训练。"
                                                 "shell 不算 launcher；Windows 上无法察觉。")
    scale_lr: bool = key(False, "Multiply every lr by batch size × processes × accumulation.", "学习率乘以 批大小 × 进程数 × 累积步数。")
    noise_offset: float = key(0.0, "Strength of a constant per channel added to the noise (0.05 to 0.1 helps dark and bright images).",
                              "噪声偏移强度（0.05~0.1 有助于明暗画面）。", ge=0)
    min_timestep: int = key(0, "Smallest timestep to train on.", "训练的最小时间步。", ge=0)
    max_timestep: int | None = key(None, "Timesteps below this are trained on. null: all of the schedule.", "时间步上限（不含）；null 为全部。", ge=1)
    optimizer: dict = key({"_target_": "torch.optim.AdamW", "weight_decay": 0.01}, "The optimizer, by _target_; parameters and lr are filled in.",
                          "优化器（_target_）；参数与学习率自动填入。", slot="optimizer")
    scheduler: SchedulerConfig = key(SchedulerConfig, "Learning-rate schedule.", "学习率调度。")
    lr_scheduler: dict | None = key(None, "A torch LR scheduler by _target_ in the place of scheduler, stepped once per optimizer step on a rate of 1: what it gives is "
                                    "the factor on each group's lr (so OneCycleLR takes max_lr: 1).",
                                    "用 _target_ 指定的 torch 学习率调度器，代替 scheduler；它在学习率 1 上每步更新一次，结果作为各组 lr 的倍数（例如 OneCycleLR 写 max_lr: 1）。",
                                    slot="lr_scheduler")
    loss: LossConfig = key(LossConfig, "The loss.", "损失函数。")

    def check(self) -> Iterator[str]:
        """Faults between keys."""
        if self.train_epochs is None and self.train_steps is None:
            yield "train_epochs is missing: how long to train? Set train_epochs or train_steps"
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            yield f"max_timestep = {self.max_timestep} must be above min_timestep = {self.min_timestep}"


@dataclass
class SourceConfig:
    """One folder of images with its captions."""

    REMOVED: ClassVar = legacy.SOURCE
    TARGETS: ClassVar = ("hcpdiff.data.Text2ImageSource", "hcpdiff.data.source.Text2ImageSource",
                         "hcpdiff.data.source.Text2ImageAttMapSource", "hcpdiff.data.source.text2img.Text2ImageSource",
                         "hcpdiff.data.source.text2img.Text2ImageAttMapSource")
    img_root: str = key(doc="Folder of images; sub-folders are read too.", zh="图片文件夹，包含子文件夹。", path=True, exists="folder")
    caption_file: str | None = key(None, "null, a folder (one .txt per image, or its one json/jsonl/yaml), or a file (json, jsonl, yaml, or one txt for all).",
                                   "null、文件夹（每图一个 .txt，或其中唯一的 json/jsonl/yaml），或单个文件。", path=True, exists="either")
    prompt_template: str | None = key(None, "Text file: one template per line, one drawn per sample; {caption} and {names} of word_names are filled in. "
                                      "null: '{pt1}, {caption}' as far as there are words and captions.",
                                      "模板文本文件：每行一个模板，每个样本随机取一行；填入 {caption} 与 word_names 中的词。null 为 '{pt1}, {caption}'。", path=True, exists="carried")
    word_names: dict[str, str] = key({}, "Words for the {names} of the template; pt1 is the trigger word.", "模板中 {名字} 对应的词；pt1 为触发词。")
    repeats: int = key(1, "How often each image is seen in an epoch.", "每轮中每张图片出现的次数。", ge=1, le=1_000_000, aliases=("repeat",))
    tag_shuffle: bool = key(False, "Shuffle the caption's comma-separated tags.", "打乱以逗号分隔的标签。")
    keep_tokens: int = key(0, "How many leading tags are neither shuffled nor dropped.", "开头几个标签不打乱、不丢弃。", ge=0, unit="tags")
    tag_dropout: float = key(0.0, "Chance that a tag is left out.", "每个标签被丢弃的概率。", ge=0, le=1)
    caption_dropout: float = key(0.0, "Chance that the caption is emptied (the trigger word stays).", "标注被清空的概率（保留触发词）。", ge=0, le=1)
    prompt_dropout: float = key(0.0, "Chance that the whole prompt is emptied.", "整个提示词被清空的概率。", ge=0, le=1)
    flip: bool = key(False, "Mirror images left-right for half of the samples.", "随机水平翻转（一半概率）。")
    bg_color: list[int] = key([255, 255, 255], "Colour behind transparent pixels, red green blue.", "透明像素的底色（RGB）。")
    att_mask: str | None = key(None, "Folder of grey images, same names as the images: weight of the loss per pixel (black 0, white 1).",
                               "灰度图文件夹，与图片同名：每像素的损失权重（黑 0，白 1）。", path=True, exists="folder")
    skip_bad_images: bool = key(False, "Go on without images that cannot be read (their number is logged).", "跳过无法读取的图片（会记录数量）。")

    def check(self) -> Iterator[str]:
        """Faults of bg_color."""
        if len(self.bg_color) != 3 or not all(0 <= part <= 255 for part in self.bg_color):
            yield f"bg_color = {self.bg_color} must be three numbers from 0 to 255: red, green, blue"


@dataclass
class BucketConfig:
    """To which sizes images are resized, so that a batch has one size."""

    TARGETS: ClassVar = ("hcpdiff.data.bucket.RatioBucket", "hcpdiff.data.bucket.RatioBucket.from_files", "hcpdiff.data.bucket.FixedBucket",
                         "hcpdiff.data.RatioBucket", "hcpdiff.data.RatioBucket.from_files", "hcpdiff.data.FixedBucket")
    target_area: int | float = key(512 * 512, "Pixels per training image.", "训练图像的像素数。", ge=64, le=MOST_PIXELS, unit="pixels")
    num_bucket: int = key(4, "Aspect ratios to cluster the images into.", "按宽高比分组的数量。", ge=1, le=10_000)
    step_size: int | None = key(None, "Sides are multiples of this. null: 8 × the VAE's factor (64 for SD).", "边长的倍数。null 为 8 × VAE 缩放倍数（SD 为 64）。", ge=1, le=MOST_SIDE, unit="pixels")
    sizes: list[list[int]] | None = key(None, "Fixed buckets: [[width, height], ...]; each image goes to the nearest ratio. Replaces target_area and num_bucket.",
                                        "固定分组：[[宽, 高], ...]，图片归入宽高比最近的一组；设置后不再使用 target_area 与 num_bucket。")
    no_upscale: bool = key(False, "Never enlarge a small image: it goes to a bucket of its own ratio and at most its size.", "不放大小图：使用不超过原图大小的分组。")
    crop: Literal["center", "random"] = key("center", "Where to crop after resizing.", "缩放后的裁剪方式。")
    crop_variants: int = key(4, "crop random: number of fixed crops per image (so that caches can hold them).", "crop 为 random 时每张图片固定的裁剪数。", ge=1, le=1000)

    def check(self) -> Iterator[str]:
        """Faults of sizes."""
        if self.sizes is not None and not self.sizes:
            yield "sizes is empty: list [width, height] pairs, or use null"
        for index, size in enumerate(self.sizes or ()):
            if len(size) != 2 or min(size) < 8 or max(size) > MOST_SIDE:
                yield f"sizes[{index}] = {size} must be [width, height] in pixels, each from 8 to {MOST_SIDE}"


@dataclass
class DatasetConfig:
    """One dataset: sources that share batch size, buckets and cache."""

    REMOVED: ClassVar = legacy.DATASET
    TARGETS: ClassVar = ("hcpdiff.data.TextImagePairDataset", "hcpdiff.data.pair_dataset.TextImagePairDataset", "hcpdiff.data.dataset.TextImagePairDataset")
    batch_size: int = key(4, "Images per batch and process.", "每个进程每批的图像数。", ge=1, le=100_000)
    loss_weight: float = key(1.0, "Weight of this dataset's loss.", "该数据集损失的权重。", gt=0)
    cache_latents: bool | Literal["memory", "disk", "none"] = key(
        "memory", "Encode each image once: kept in memory, on disk (found again by content at the next start), or none. true means memory.",
        "每张图片只编码一次：memory 内存、disk 磁盘（按内容查找，下次直接使用）、none 不缓存；true 等于 memory。")
    cache_dir: str = key(".hcp-cache", "Folder of the disk cache.", "磁盘缓存的文件夹。", path=True)
    source: dict[str, SourceConfig] = key(doc="The image folders, by a name of your choice.", zh="图片来源，名字自定。")
    bucket: BucketConfig = key(BucketConfig, "How images are resized and grouped.", "图片的缩放与分组。")

    def check(self) -> Iterator[str]:
        """A dataset without a source."""
        if not self.source:
            yield "source is empty: name at least one image folder, source: {data_source1: {img_root: ...}}"


@dataclass
class PreviewConfig:
    """Pictures drawn while training."""

    prompts: list[str] = key([], "Prompts to draw; empty: no previews.", "预览用的提示词；为空则不生成预览。")
    neg_prompt: str = key("", "Negative prompt.", "反向提示词。")
    every: int = key(100, "Draw every this many steps, and at the end.", "每多少步生成一次，结束时也会生成。", ge=1, unit="steps")
    width: int | None = key(None, "Width; null: that of the bucket with the most images.", "宽度；null 取图片最多的分组。", ge=8, le=MOST_SIDE, unit="pixels", multiple=PIXELS)
    height: int | None = key(None, "Height; null: that of the bucket with the most images.", "高度；null 取图片最多的分组。", ge=8, le=MOST_SIDE, unit="pixels", multiple=PIXELS)
    num_inference_steps: int = key(20, "Sampler steps.", "采样步数。", ge=1)
    guidance_scale: float = key(7.0, "Classifier-free guidance.", "引导强度。", ge=0)
    seed: int = key(42, "Seed of the first image; the others follow.", "第一张图的种子，其余依次加一。", ge=0)
    bs: int = key(1, "Pictures drawn at once, which takes more memory; does not change the pictures but for rounding.", "同时生成的图片数，越多占用内存越多；除舍入误差外不影响图片内容。", ge=1, le=10_000)


@dataclass
class RunConfig:
    """Top level of a training config."""

    REMOVED: ClassVar = legacy.RUN
    OTHER_NAMES: ClassVar = OTHER_NAMES
    EITHER: ClassVar = (("train.train_epochs", "train.train_steps"),)

    exp_dir: str = key("exps/${hcp.time:}", "The run folder.", "输出文件夹。", path=True)
    seed: int = key(42, "Seed of everything random in the run.", "整个训练的随机种子。", ge=0)
    mixed_precision: Literal["auto", "bf16", "fp16", "fp32", "no"] = key(
        "auto", "Compute precision. auto: bf16 where the device is fast at it, else fp16 on a GPU, else fp32 (CPUs and Apple GPUs). no: the same as fp32. LoRA weights are always fp32.",
        "计算精度。auto：硬件支持时用 bf16，否则 GPU 用 fp16，CPU 与苹果 GPU 用 fp32。no 等同 fp32。LoRA 权重始终为 fp32。", meant=FORMATS)
    allow_tf32: bool = key(True, "TF32 matrix products on NVIDIA GPUs.", "在 NVIDIA GPU 上使用 TF32。")
    model: ModelConfig = key(doc="The base model.", zh="底模。")
    lora_unet: list[LoraGroup] | None = key(None, "LoRA groups of the UNet. null: none.", "UNet 的 LoRA 分组；null 为不加。")
    lora_text_encoder: list[LoraGroup] | None = key(
        None, "LoRA groups of the text encoder. null: it is not trained. SDXL has two: a pattern that begins with te1. or te2. is for one of them, any other for both.",
        "文本编码器的 LoRA 分组；null 为不训练。SDXL 有两个文本编码器：以 te1. 或 te2. 开头的写法只匹配其中一个，其余同时匹配两个。")
    train: TrainConfig = key(doc="The run.", zh="训练设置。")
    data: dict[str, DatasetConfig] = key(doc="The datasets, by a name of your choice; the first one counts the epochs.", zh="数据集，名字自定；轮数以第一个为准。")
    logger: list[dict] = key([{"_target_": "hcpdiff.loggers.ConsoleLogger"}, {"_target_": "hcpdiff.loggers.FileLogger"}, {"_target_": "hcpdiff.loggers.TensorBoardLogger"}],
                             "Where progress is written.", "日志输出。", slot="logger")
    preview: PreviewConfig = key(PreviewConfig, "Pictures drawn while training.", "训练中的预览图。")

    def check(self) -> Iterator[str]:
        """Nothing to train, nothing to train on."""
        if not self.lora_unet and not self.lora_text_encoder:
            yield "lora_unet and lora_text_encoder are both empty: there is nothing to train"
        if not self.data:
            yield "data is empty: name at least one dataset"


def pattern_faults(pattern: str) -> list[str]:
    """At most one fault: a layer pattern that is empty or no regular expression."""
    expression = pattern.removeprefix("re:")
    if not expression:
        return ["is empty"]
    if pattern.startswith("re:"):
        try:
            re.compile(expression)
        except re.error as error:
            return [f"= '{pattern}' is no regular expression: {error}"]
    return []

"""The rows of docs/reliability.md: bad input, how to make it, and what the user then sees. `python tests/bad_inputs.py` writes the tables into the pages.

tests/test_reliability.py gives each to the real command and looks for these words in the real message, so the tables are true.
"""

import io
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = {"docs/reliability.md": 0, "docs/reliability_cn.md": 1}
HEADS = (("given", "exit", "message, in short"), ("输入", "退出码", "提示（节选）"))
BEGIN, END = "<!-- bad input -->", "<!-- end of bad input -->"
TRAIN = """\
train: {train_steps: 1, cpu_threads: 1}
model: {pretrained_model_name_or_path: model}
lora_unet:
  - {lr: 1e-3, rank: 2, layers: ['re:.*mid_block.*to_k$']}
exp_dir: run
data:
  d:
    batch_size: 2
    source: {s: {img_root: images, caption_file: images, word_names: {pt1: thing}}}
    bucket: {target_area: 4096, num_bucket: 1}
"""
DRAW = "pretrained_model: model\nprompt: a cat\nseed: 1\nout_dir: out\ninfer_args: {width: 64, height: 64, num_inference_steps: 1}\n"
SOURCE = "data.d.source.s"


class Row(NamedTuple):
    """A bad input: in two languages, the command that gets it, its arguments (or a function that spoils the folder and returns them), words of the message in order."""

    en: str
    zh: str
    command: str
    spoil: list[str] | Callable[[], list[str] | None]
    words: tuple[str, ...]
    code: int = 2


def model_file(*names: str) -> Callable[[], list[str]]:
    """A safetensors file of small tensors with these names, given as the base model."""
    def spoil():
        header = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}).encode()
        Path("m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(len(names)))
        return ["model.pretrained_model_name_or_path=m.safetensors"]

    return spoil


def text(name: str, content: str | bytes, *arguments: str) -> Callable[[], list[str]]:
    """Writes one file."""
    def spoil():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).unlink(missing_ok=True)
        Path(name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return list(arguments)

    return spoil


def config(old: str, new: str, name: str = "train.yaml") -> Callable[[], list[str]]:
    """Changes the config file."""
    def spoil():
        content = Path(name).read_text(encoding="utf-8")
        assert old in content
        Path(name).write_text(content.replace(old, new, 1), encoding="utf-8")
        return []

    return spoil


def more(content: str, name: str = "train.yaml") -> Callable[[], list[str]]:
    """Adds to the config file."""
    return config("exp_dir: run\n" if name == "train.yaml" else "seed: 1\n", ("exp_dir: run\n" if name == "train.yaml" else "seed: 1\n") + content, name)


def image(change: Callable[[bytes], bytes], name: str = "images/b.png") -> Callable[[], None]:
    """Changes the bytes of one of the images."""
    return lambda: Path(name).write_bytes(change(Path("images/b.png").read_bytes())) and None


def link(target: str, name: str) -> Callable[[], None]:
    """A symbolic link."""
    return lambda: Path(name).unlink(missing_ok=True) or Path(name).symlink_to(target)


def gone(*names: str) -> Callable[[], None]:
    """Takes files or folders away."""
    def spoil():
        for name in names:
            shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()

    return spoil


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 20,000 x 20,000 pixels."""
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", (20000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def edited(name: str, **change) -> Callable[[], None]:
    """A JSON file with some values replaced."""
    return lambda: Path(name).write_text(json.dumps(json.loads(Path(name).read_text(encoding="utf-8")) | change), encoding="utf-8") and None


class Hostile:
    """Unpickled, it would make a file."""

    def __reduce__(self):
        return Path.touch, (Path("marker"),)


def hostile_weights() -> None:
    import torch

    Path("model/unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": Hostile()}, "model/unet/diffusion_pytorch_model.bin")


def embedding(value: object) -> Callable[[], list[str]]:
    def spoil():
        import torch

        Path("embs").mkdir()
        torch.save({"x": value if value != "wide" else torch.ones(1, 99)}, "embs/word.pt")
        return ["prompt=a word", "emb_dir=embs"]

    return spoil


def lora(*shapes: tuple[int, ...]) -> Callable[[], list[str]]:
    def spoil():
        import torch
        from safetensors.torch import save_file

        name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
        save_file({f"{name}.lora_down.weight": torch.ones(shapes[0]), f"{name}.lora_up.weight": torch.ones(shapes[1])}, "x.safetensors")
        return ["model.init_lora=x.safetensors"]

    return spoil


def captions(name: str, content: str | bytes) -> Callable[[], list[str]]:
    return text(name, content, f"{SOURCE}.caption_file={name}")


def mask(size: tuple[int, int], names: str = "abc") -> Callable[[], list[str]]:
    def spoil():
        from PIL import Image

        Path("masks").mkdir()
        for name in names:
            Image.new("L", size).save(f"masks/{name}.png")
        return [f"{SOURCE}.att_mask=masks"]

    return spoil


def shifted(count: int) -> str:
    return "k0: &k0 [x, x, x]\n" + "".join(f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}, *k{n - 1}]\n" for n in range(1, count))


T, D = "train", "draw"
ROWS = [
    Row("config file that is not there", "配置文件不存在", T, ["--cfg", "trian.yaml"], ("'trian.yaml' is not there. Looked in", "Nearest: train.yaml")),
    Row("no `--cfg`", "缺少 `--cfg`", T, ["--cfg="], ("--cfg FILE is missing",)),
    Row("a comment after a line-continuation `\\`", "续行符 `\\` 之后写注释", T, [" ", "#", "learning rate"], ("A comment after a '\\' at the end of a line",)),
    Row("an argument without `=`", "参数缺少 `=`", T, ["seed"], ("seed",)),
    Row("unknown option", "未知选项", T, ["--config=x"], ("--config",)),
    Row("misspelt key", "键名拼错", T, ["train.trian_steps=5"], ("train.trian_steps (command line) is not a known key. Nearest: train_steps",)),
    Row("text where a number belongs", "应为数字处写了文字", T, ["seed=many"], ("seed = 'many' (command line) is not allowed; a whole number is expected",)),
    Row("a number out of range", "数值超出范围", T, ["train.train_steps=0"], ("train.train_steps = 0 (command line) must be at least 1",)),
    Row("a slip that asks for terabytes", "误写导致需要海量内存", T, ["data.d.bucket.target_area=1e12"], ("data.d.bucket.target_area = 1e12", "must be at most 268435456")),
    Row("a trigger word that is null", "触发词为 null", T, [f"{SOURCE}.word_names.pt1=null"], ("data.d.source.s.word_names.pt1 = null", "write a word, or leave the entry out")),
    Row("tabs in YAML", "YAML 中用了制表符", T, config("  - {lr", "\t- {lr"), ("train.yaml:", "is no YAML:", "Indent with spaces, not tabs")),
    Row("a key twice", "同一键写了两次", T, more("seed: 1\nseed: 2\n"), ("the key 'seed' stands here a second time",)),
    Row("a YAML tag that would build a Python object", "会创建 Python 对象的 YAML 标签", T, more("seed: !!python/object/apply:os.system ['touch marker']\n"), ("the tag", "is not used here: take it out")),
    Row("config in another encoding", "配置文件不是 UTF-8", T, text("gbk.yaml", "名字: 1".encode("gbk"), "--cfg", "gbk.yaml"), ("gbk.yaml is not UTF-8 text", "save it as UTF-8")),
    Row("config that is a list", "配置文件是列表", T, text("list.yaml", "- a\n", "--cfg", "list.yaml"), ("list.yaml is a list; a config file is a mapping",)),
    Row("anchors that multiply (billion laughs)", "成倍膨胀的 YAML 锚点", T, more(shifted(40)), ("grows beyond 100000 values by its anchors",)),
    Row("500 brackets inside each other", "500 层嵌套的括号", T, more("k: " + "[" * 500 + "]" * 500 + "\n"), ("nested",)),
    Row("a `_base_` that is not there", "`_base_` 文件不存在", T, more("_base_: [cfgs/exmples/lora_conventional]\n"), ("_base_: 'cfgs/exmples/lora_conventional'", "Nearest: cfgs/train/examples/lora_conventional.yaml")),
    Row("a circle of `_base_`", "`_base_` 循环引用", T, more("_base_: [train.yaml]\n"), ("_base_ goes in a circle",)),
    Row("config for drawing given to training", "把生成配置交给训练命令", T, ["--cfg", "draw.yaml"], ("draw.yaml is a config for drawing", "python -m hcpdiff.visualizer")),
    Row("config for training given to drawing", "把训练配置交给生成命令", D, ["--cfg", "train.yaml"], ("train.yaml is a config for training", "python -m hcpdiff.train_ac_single")),
    Row("`${…}` that names no key", "`${…}` 指向不存在的键", T, more("seed: ${train.train_step}\n"), ("names no key of this config", "Nearest: train_steps")),
    Row("a circle of `${…}`", "`${…}` 循环引用", T, more("a: ${b}\nb: ${a}\nseed: ${a}\n"), ("is a circle",)),
    Row("`${hcp.eval:\"9**9**9\"}`", "`${hcp.eval:\"9**9**9\"}`", T, more("seed: '${hcp.eval:\"9**9**9\"}'\n"), ("is too large (2**63 is the limit)",)),
    Row("an expression that calls Python", "表达式中调用 Python", T, more("seed: '${hcp.eval:\"open(1)\"}'\n"), ("hcp.eval refuses 'open(1)'", "arithmetic only")),
    Row("`${oc.env:…}`", "`${oc.env:…}`", T, more("preview: {neg_prompt: '${oc.env:HOME}'}\n"), ("'oc.env' reads what is outside the config and is not available",)),
    Row("`_target_` in other letters", "`_target_` 大小写写错", T, ["train.optimizer={_target_: torch.optim.Adamw}"], ("torch.optim has no Adamw. Nearest: torch.optim.AdamW",)),
    Row("`_target_` of another kind", "`_target_` 类别不对", T, ["train.optimizer={_target_: diffusers.DDIMScheduler}"], ("is a class of another kind; this place takes a class of kind torch.optim.Optimizer",)),
    Row("`_target_` that is a function", "`_target_` 是函数", T, ["train.optimizer={_target_: torch.hub.load, repo_or_dir: x}"], ("'torch.hub.load' is a function",)),
    Row("`_target_` of a package that is not allowed", "`_target_` 不在允许的包中", T, ["train.optimizer={_target_: os.system}"], ("its package is not among those allowed",)),
    Row("optimizer of a package that is not installed", "优化器所在的包未安装", T, ["train.optimizer={_target_: dadaptation.DAdaptAdam}"], ("the package dadaptation is not installed (pip install dadaptation)",)),
    Row("unknown argument of an optimizer", "优化器没有的参数", T, ["train.optimizer.weigth_decay=1"], ("weigth_decay is no argument of torch.optim.AdamW. Nearest: weight_decay",)),
    Row("a log outside the run folder", "日志写到训练文件夹之外", T, ["logger=[{_target_: hcpdiff.loggers.FileLogger, name: ../x.log}]"], ("'../x.log' must be a name inside the run folder",)),
    Row("a pattern that is no regular expression", "层名的正则表达式有误", T, ["lora_unet.0.layers=['re:(']"], ("layers[0]",)),
    Row("a pattern that matches nothing", "层名没有匹配到任何层", T, ["lora_unet.0.layers=['re:.*to_kk$']"], ("re:.*to_kk$",)),
    Row("an expression without `re:`", "正则表达式缺少 `re:`", T, ["lora_unet.0.layers=['mid_block.*attn1$']"], ("Without re: a pattern is an exact name", "'re:mid_block.*attn1$'")),
    Row("`exp_dir` that holds files", "`exp_dir` 中已有文件", T, text("run/x", "mine"), ("exp_dir = 'run' is not empty",)),
    Row("`exp_dir` below a file", "`exp_dir` 的上级是文件", T, text("file", "", "exp_dir=file/run"), ("exp_dir = 'file/run' cannot be made", "is a file, not a folder")),
    Row("resume of a folder without a state", "恢复的文件夹中没有训练状态", T, ["train.resume=images"], ("images", "no training state")),
    Row("model folder that is not there", "底模文件夹不存在", T, ["model.pretrained_model_name_or_path=./modle"], ("model.pretrained_model_name_or_path = './modle'", "Nearest: ")),
    Row("an empty file as the model", "底模文件是空文件", T, text("m.safetensors", b"", "model.pretrained_model_name_or_path=m.safetensors"), ("model.pretrained_model_name_or_path: m.safetensors is not a safetensors file: it is empty",)),
    Row("a LoRA as the model", "把 LoRA 当作底模", T, model_file("lora_unet_x.lora_down.weight"), ("is a LoRA, not a base model: it can be model.init_lora",)),
    Row("a FLUX file as the model", "底模是 FLUX 文件", T, model_file("double_blocks.0.img_attn.qkv.weight"), ("is a FLUX model or one built like it, which is not supported",)),
    Row("a VAE as the model", "把 VAE 当作底模", T, model_file("decoder.conv_in.weight"), ("is a VAE alone, not a base model: it can be model.vae",)),
    Row("a folder that is no diffusers model", "文件夹不是 diffusers 格式", T, ["model.pretrained_model_name_or_path=images"], ("has no model_index.json, so it is no diffusers model",)),
    Row("a model of another family", "其他类型的模型", T, edited("model/model_index.json", _class_name="FluxPipeline"), ("is a FluxPipeline; supported: StableDiffusionPipeline",)),
    Row("`model_index.json` that names code", "`model_index.json` 指向代码", T, edited("model/model_index.json", _class_name=["hostile", "Hostile"]), ("is a ['hostile', 'Hostile']; supported",)),
    Row("missing parts of a model, all named", "底模缺少文件（全部列出）", T, gone("model/vae", "model/unet/diffusion_pytorch_model.safetensors"), ("is incomplete or cannot be used", "unet/ has no weights", "there is no folder vae/")),
    Row("model weights that are cut short", "底模权重文件被截断", T, lambda: os.truncate("model/unet/diffusion_pytorch_model.safetensors", 5000), ("unet cannot be loaded as UNet2DConditionModel",)),
    Row("model weights as a pickle with code in it", "底模权重是含代码的 pickle", T, hostile_weights, ("unet cannot be loaded", "a pickle in it is damaged, or holds more than tensors")),
    Row("a noise schedule of 10¹³ steps", "噪声调度有 10¹³ 步", T, edited("model/scheduler/scheduler_config.json", num_train_timesteps=10**13), ("num_train_timesteps = 10000000000000 must be a whole number from 1 to 1000000",)),
    Row("an index of weights without a map", "权重索引中没有映射表", T, text("model/unet/diffusion_pytorch_model.safetensors.index.fp16.json", "{}"), ("has no map of weights to files",)),
    Row("an index that names files outside its folder", "索引指向文件夹之外的文件", T, text("model/unet/x.safetensors.index.json", '{"weight_map": {"a": "../../x"}}'), ("names files outside its folder, such as '../../x'",)),
    Row("a hub id that is not in the cache, with HF_HUB_OFFLINE", "设置了 HF_HUB_OFFLINE，模型名不在缓存中", T, ["model.pretrained_model_name_or_path=some/model"],
        ("not in the local cache, and HF_HUB_OFFLINE keeps the hub from being asked", "Unset it, or name a local folder or file")),
    Row("the guide's placeholder VAE", "指南中的占位 VAE", T, ["model.vae=any3.0/vae"], ("model.vae = 'any3.0/vae': not a local folder, not in the local cache",)),
    Row("image folder that is not there", "图片文件夹不存在", T, [f"{SOURCE}.img_root=imagse"], ("img_root = 'imagse'", "Nearest: images")),
    Row("image folder that is a file", "图片文件夹是文件", T, [f"{SOURCE}.img_root=train.yaml"], ("is a file; a folder is expected",)),
    Row("image folder without an image", "图片文件夹中没有图片", T, lambda: Path("empty").mkdir() or [f"{SOURCE}.img_root=empty", f"{SOURCE}.caption_file=null"], ("holds no image in it or below", "there: no file at all")),
    Row("image that is cut off", "图片被截断", T, image(lambda raw: raw[:len(raw) // 2]), ("1 of 3 images cannot be read", "skip_bad_images: true", "b.png")),
    Row("image of no bytes", "空图片文件", T, image(lambda raw: b""), ("b.png: the file is empty",)),
    Row("text under an image's name", "文本文件冒充图片", T, image(lambda raw: b"hello"), ("b.png: is not an image, or damaged at its beginning",)),
    Row("image of 20,000 × 20,000 pixels (decompression bomb)", "20000×20000 像素的图片（解压炸弹）", T, image(lambda raw: bomb()), ("b.png: more than 178 megapixels; make it smaller",)),
    Row("link to nothing", "失效的符号链接", T, link("nowhere.png", "images/b.png"), ("b.png: the file is gone",)),
    Row("link to itself", "指向自身的符号链接", T, link("b.png", "images/b.png"), ("b.png",)),
    Row("damaged image with a newline and an escape in its name", "文件名含换行与控制符的坏图", T, lambda: Path("images/x\n\x1b[31m.png").write_bytes(b"x") and None, ("x\\n\\x1b[31m.png: is not an image",)),
    Row("several damaged images, in one message", "多张坏图（一次列出）", T, lambda: [Path(f"images/{name}.png").write_bytes(b"x") for name in "ab"] and None, ("2 of 3 images cannot be read", "a.png", "b.png")),
    Row("every image damaged, with `skip_bad_images`", "全部损坏且设了 `skip_bad_images`", T, lambda: [Path(f"images/{name}.png").write_bytes(b"x") for name in "abc"] and [f"{SOURCE}.skip_bad_images=true"], ("none of 3 images can be read",)),
    Row("caption in UTF-16", "标注是 UTF-16", T, text("images/a.txt", "a cat".encode("utf-16")), ("a.txt: is UTF-16; save it as UTF-8",)),
    Row("caption in GBK", "标注是 GBK", T, text("images/a.txt", "一个女孩站在雪地里".encode("gbk")), ("a.txt: line 1 is not UTF-8",)),
    Row("caption file that is not there", "标注文件不存在", T, [f"{SOURCE}.caption_file=captions.json"], ("caption_file = 'captions.json'", "does not exist")),
    Row("comma too many in JSON", "JSON 多了逗号", T, captions("c.json", '{"a.png": "x",}'), ("c.json: line 1 column 15: a comma too many before '}'",)),
    Row("JSON that ends too early", "JSON 不完整", T, captions("c.json", '{"a.png": "x'), ("c.json: line 1",)),
    Row("an image twice in a caption file", "同一图片有两条标注", T, captions("c.json", '{"a.png": "x", "a.png": "y"}'), ("key 'a.png' stands there twice",)),
    Row("captions that belong to no image", "标注与图片对不上", T, captions("c.json", '{"x.png": "x"}'), ("has a caption for none of 3 images",)),
    Row("a caption that is a number or list", "标注不是文字", T, captions("c.json", '{"a.png": ["x"]}'), ("the caption of 'a.png' must be text", "not a list")),
    Row("caption file of an unknown kind", "未知类型的标注文件", T, captions("c.csv", "a,b"), ("captions are read from .txt, .caption, .json, .jsonl, .yaml, .yml files or a folder",)),
    Row("a name in a template that has no word", "模板中的名字没有对应的词", T, text("t.txt", "{pt2}, {caption}", f"{SOURCE}.prompt_template=t.txt"), ("t.txt", "pt2", "word_names")),
    Row("a brace without a partner in a template", "模板中括号不配对", T, text("t.txt", "{caption", f"{SOURCE}.prompt_template=t.txt"), ("t.txt", "the brace '{' in column 1 has no partner")),
    Row("an empty template", "空模板", T, text("t.txt", "\n", f"{SOURCE}.prompt_template=t.txt"), ("t.txt: the template file is empty",)),
    Row("missing masks, all named", "缺少蒙版（全部列出）", T, mask((64, 64), "a"), ("lacks the mask of 2 of 3 images", "b.png", "c.png")),
    Row("mask of another shape", "蒙版宽高比不符", T, mask((64, 20)), ("3 of 3 masks cannot be used", "64 x 20 has another shape than its image of 64 x 64")),
    Row("LoRA file that is cut short", "LoRA 文件被截断", T, lambda: lora((2, 8), (8, 2))() and os.truncate("x.safetensors", 60) or ["model.init_lora=x.safetensors"], ("model.init_lora: x.safetensors is cut short",)),
    Row("`init_lora` that is a folder without a LoRA", "`init_lora` 指向没有 LoRA 的文件夹", T, ["model.init_lora=images"], ("model.init_lora: images holds no weight files", "In it: a.png")),
    Row("LoRA file that is a pickle", "LoRA 文件是 pickle", T, text("x.safetensors", pickle.dumps([1]), "model.init_lora=x.safetensors"), ("x.safetensors is a pickle (a file of torch.save), which may run code",)),
    Row("a web page saved as a LoRA", "把网页存成了 LoRA", T, text("x.safetensors", "<html>not found</html>", "model.init_lora=x.safetensors"), ("x.safetensors is not a safetensors file", "a web page or a git-lfs pointer")),
    Row("LoRA of another architecture", "其他结构的 LoRA", T, lambda: [*lora((2, 320), (320, 2))(), "lora_unet.0.layers=['re:.*attn1$']"], ("another architecture",)),
    Row("a brace that is never closed in a prompt", "提示词括号未闭合", D, ["prompt=a {cat"], ("prompt, character 3: this `{` is never closed",)),
    Row("a weight that is no number", "权重不是数字", D, ["prompt={cat:1.2.3}"], ("`1.2.3` after the colon is no weight",)),
    Row("100 brackets inside each other in a prompt", "提示词 100 层括号", D, ["prompt=" + "(" * 100 + "cat", "prompt_syntax=webui"], ("this bracket stands inside 50 others",)),
    Row("a weight that no picture survives", "过大的权重", D, ["prompt=(cat:1e9999)", "prompt=(cat:99999)", "prompt_syntax=webui"], ("the weight of 'cat' is 99999",)),
    Row("webui's prompt editing", "webui 的提示词编辑", D, ["prompt=a [cat:dog:0.5]", "prompt_syntax=webui"], ("would change the prompt while webui samples",)),
    Row("LoRA that is not there", "LoRA 文件不存在", D, text("loras/unet-100.safetensors", b"", "lora_path=loras/unet-1000.safetensors"), ("lora_path = 'loras/unet-1000.safetensors'", "unet-100.safetensors")),
    Row("embedding with code in it", "含代码的 embedding", D, embedding(Hostile()), ("the embedding embs/word.pt is damaged, or a pickle that holds more than tensors",)),
    Row("embedding of another model", "其他模型的 embedding", D, embedding("wide"), ("embs/word.pt has vectors of width 99, the model's text encoder has 32",)),
    Row("a size that the model cannot draw", "模型无法生成的尺寸", D, ["infer_args.width=65"], ("infer_args.width = 65",)),
    Row("an argument of the pipeline that other keys give", "由其他键给出的 pipeline 参数", D, ["infer_args.prompt=x"], ("infer_args.prompt cannot be given there: use the key prompt",)),
    Row("code of a repository asked for", "要求运行仓库中的代码", D, ["new_components.vae={_target_: diffusers.AutoencoderKL.from_pretrained, pretrained_model_name_or_path: x, trust_remote_code: true}"], ("trust_remote_code is refused: it runs code from outside",)),
    Row("`out_dir` that is a file", "`out_dir` 是文件", D, ["out_dir=train.yaml"], ("out_dir = 'train.yaml' cannot be written to",)),
    Row("faults of prompt and model folder together", "提示词与底模的错误一次报出", D, lambda: shutil.rmtree("model/vae") or ["prompt=a {cat"], ("this `{` is never closed", "there is no folder vae/")),
    Row("faults of config, captions and model folder together", "配置、标注、底模的错误一次报出", T, lambda: shutil.rmtree("model/vae") or captions("c.json", "{")() + ["sed=1"], ("sed (command line)", "c.json", "there is no folder vae/")),
]


def cell(content: str) -> str:
    """Text as it stands in a table."""
    return content.replace("|", "\\|").replace("\n", " ")


def table(language: int) -> str:
    """The table of a page; words of the message are joined by an ellipsis."""
    lines = ["| " + " | ".join(HEADS[language]) + " |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {cell(row[language])} | {row.code} | `` {cell(' … '.join(row.words))} `` |" for row in ROWS)])


def written(page: str, language: int) -> str:
    """The page with its table as it must be."""
    content = (ROOT / page).read_text(encoding="utf-8")
    head, rest = content.split(BEGIN)
    return f"{head}{BEGIN}\n{table(language)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for page, language in PAGES.items():
        (ROOT / page).write_text(written(page, language), encoding="utf-8")
        print("wrote", page)

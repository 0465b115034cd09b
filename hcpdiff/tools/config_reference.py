"""Writes what is generated from the schemas: the config reference in English and Chinese, and cfgs/train/train_base.yaml.

    python -m hcpdiff.tools.config_reference [--folder CHECKOUT] [--check]
"""

import argparse
from pathlib import Path
from typing import Any

from .. import cli
from ..config import shape as shapes
from ..config import tree
from ..config.check import ALLOWED
from ..config.infer_schema import InferConfig
from ..config.schema import RunConfig
from ..config.shape import Field, Shape, fields
from ..errors import ConfigError

NAMES = {"data": "dataset1", "source": "data_source1"}  # how the examples call free names
PAGES = {"training": RunConfig, "drawing": InferConfig}

WORDS = {
    "en": {"title": "Config keys", "training": "Training: `python -m hcpdiff.train_ac_single`", "drawing": "Drawing: `python -m hcpdiff.visualizer`",
           "top": "top level", "head": "| Key | Type | Default | Meaning |", "required": "**required**", "below": "see `{}` below", "unit": "unit", "also": "also spelled",
           "note": "This page is generated from the schemas by `python -m hcpdiff.tools.config_reference`.",
           "types": {bool: "true/false", int: "whole number", float: "number", str: "text", "list": "list", "map": "map", "target": "`_target_` map", "null": "null"}},
    "zh": {"title": "配置项", "training": "训练：`python -m hcpdiff.train_ac_single`", "drawing": "生成图像：`python -m hcpdiff.visualizer`",
           "top": "顶层", "head": "| 配置项 | 类型 | 默认值 | 含义 |", "required": "**必填**", "below": "见下文 `{}`", "unit": "单位", "also": "也可写作",
           "note": "本页由 `python -m hcpdiff.tools.config_reference` 根据 schema 生成。",
           "types": {bool: "true/false", int: "整数", float: "数字", str: "文本", "list": "列表", "map": "映射", "target": "`_target_` 映射", "null": "null"}},
}

INTRO = {"en": """A config is one YAML file. Every key that is not written has the default below; a key that nobody knows is an error that names the nearest one.

- **Inheriting.** `_base_:` takes a path or a list of paths. Each is looked for in the working directory, beside the file that names it, and among the `cfgs/` that
  the installed package carries. Bases are merged in their order, then the file, then the command line; later wins. Maps are merged key by key, lists are
  replaced whole, and the value `'---'` deletes a key.
- **Command line.** `key=value` after `--cfg FILE`: `train.train_epochs=10`, `lora_unet.0.rank=8` (or `'lora_unet[0].rank=8'`), `preview.prompts='[a cat, a dog]'`. Text keys
  take what stands after `=` literally; a space in it needs quotes around the whole argument: `"exp_dir=exps/my cat"` (in every shell, also in cmd.exe).
- **Expressions.** `${unet_lr}` is another key's value, read when it is needed, so that `unet_lr=0.0002` on the command line reaches `lr: ${unet_lr}`; `${.rank}` is a key
  beside this one. `${hcp.eval:"512*768"}` is arithmetic (numbers, `+ - * / // % **`, parentheses, `min max round int float sqrt`), `${times:512,768}` a product,
  `${hcp.time:}` the start of the run (`${hcp.time:%Y-%m-%d}` by strftime). `$<hcp.eval:512*768>` means the same and survives a shell's double quotes. `\\${` is a literal `${`.
- **Words and numbers.** `2e-5` is a number; only `true` and `false` are booleans; `no`, `on`, `12:30`, `007` stay words. Paths in double quotes need `/`: `"C:\\train"` holds a tab. A leading `~` in a path is the home folder.
- **Keys of your own** on the top level (such as `unet_lr`) are fine as long as an expression reads them.
- **`_target_`** names a class to build; the other keys are its arguments. Each place takes one kind of class, from these packages: {packages}. `--allow-target PREFIX` on the
  command line adds one. `trust_remote_code` and `custom_pipeline` are refused.
- `train.train_epochs` and `train.train_steps` say one thing in two ways: the one that was set later (command line, then file, then base) counts.
""", "zh": """配置是一个 YAML 文件。没有写的配置项取下表的默认值；不认识的配置项会报错，并给出最接近的名字。

- **继承**：`_base_:` 可以是一个路径或路径列表。依次在当前目录、写下该路径的文件所在目录、安装包自带的 `cfgs/` 中查找。先按顺序合并各个 base，再合并本文件，最后是命令行，后者优先。
  映射逐项合并，列表整体替换，值 `'---'` 表示删除该项。
- **命令行**：在 `--cfg 文件` 之后写 `配置项=值`：`train.train_epochs=10`、`lora_unet.0.rank=8`（或 `'lora_unet[0].rank=8'`）、`preview.prompts='[a cat, a dog]'`。文本类配置项按 `=` 之后的原文读取；含空格时给整个参数加引号：`"exp_dir=exps/my cat"`（各种 shell 与 cmd.exe 均可）。
- **表达式**：`${unet_lr}` 是另一项的值，用到时才读取，因此命令行的 `unet_lr=0.0002` 会传到 `lr: ${unet_lr}`；`${.rank}` 是同级的配置项。`${hcp.eval:"512*768"}` 是算术
  （数字、`+ - * / // % **`、括号、`min max round int float sqrt`），`${times:512,768}` 是乘积，`${hcp.time:}` 是训练开始的时间（`${hcp.time:%Y-%m-%d}` 为 strftime 格式）。
  `$<hcp.eval:512*768>` 含义相同，在 shell 的双引号里也不会被改动。`\\${` 表示字面的 `${`。
- **词与数字**：`2e-5` 是数字；只有 `true`、`false` 是布尔值；`no`、`on`、`12:30`、`007` 都是文本。双引号中的路径请用 `/`：`"C:\\train"` 里有一个制表符。路径开头的 `~` 是用户的主目录。
- **自定义的顶层项**（如 `unet_lr`）只要有表达式读取它就可以。
- **`_target_`** 指定要创建的类，其余各项是它的参数。每个位置只接受一种类，且来自这些包：{packages}。命令行的 `--allow-target 前缀` 可以增加。`trust_remote_code` 与 `custom_pipeline` 不被接受。
- `train.train_epochs` 与 `train.train_steps` 是同一件事的两种写法：后设置的（命令行 > 文件 > base）生效。
"""}

BASE_HEAD = """# Every key of a training config, with its default and its meaning. Inherit it with
#   _base_: [cfgs/train/train_base.yaml]
# and write only what differs. Lines that are commented out have no default, or show what may stand there.
# Generated from hcpdiff/config/schema.py: python -m hcpdiff.tools.config_reference
# 训练配置的全部配置项、默认值与含义。用 _base_ 继承后只写需要修改的部分；被注释掉的行没有默认值，或仅作示例。
"""


def reference(language: str) -> str:
    """The reference page in 'en' or 'zh', as Markdown."""
    words = WORDS[language]
    parts = [f"# {words['title']}", INTRO[language].replace("{packages}", ", ".join(f"`{name}`" for name in ALLOWED)).rstrip(), words["note"]]
    for name, schema in PAGES.items():
        parts += [f"## {words[name]}", *_sections(schema, "", language)]
    return "\n\n".join(parts) + "\n"


def _sections(cls: type, path: str, language: str) -> list[str]:
    """The table of a schema class, then those of the classes below it."""
    words = WORDS[language]
    rows = [words["head"], "|---|---|---|---|"]
    below: list[str] = []
    for name, field in fields(cls).items():
        inner, inner_path = _inner(field.shape, f"{path}.{name}" if path else name)
        rows.append(_row(name, field, inner_path if inner else "", language))
        below += _sections(inner, inner_path, language) if inner else []
    return [f"### `{path}`" if path else f"### {words['top']}", "\n".join(rows), *below]


def _inner(shape: Shape, path: str) -> tuple[type | None, str]:
    """The schema class below a key, and how the path to it is shown."""
    if shape.record:
        return shape.record, path
    if shape.list_item and shape.list_item.record:
        return shape.list_item.record, f"{path}[i]"
    if shape.map_item and shape.map_item.record:
        return shape.map_item.record, f"{path}.<name>"
    return None, path


def _row(name: str, field: Field, inner_path: str, language: str) -> str:
    words, key = WORDS[language], field.shape.key
    meaning = key.zh if language == "zh" and key.zh else key.doc
    extra = [f"{words['unit']}: {key.unit}"] if key.unit else []
    extra += [limits(field.shape)] if limits(field.shape) else []
    extra += [f"{words['also']} `{alias}`" for alias in key.aliases]
    extra += [words["below"].format(inner_path)] if inner_path else []
    default = words["required"] if field.required else "" if inner_path and field.shape.record else f"`{_flow(shapes.default_of(field))}`"
    cells = (f"`{name}`", _type(field.shape, words["types"]), default, meaning + (f" ({'; '.join(extra)})" if extra else ""))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _type(shape: Shape, names: dict) -> str:
    """A key's type in words."""
    found = [names[kind] for kind in (bool, int, float, str) if kind in shape.options and not (kind is int and float in shape.options)]
    found += [f"`{choice}`" for choice in shape.literals]
    found += [names[bool]] if getattr(shape.record, "SHORT", None) else []
    found += [names["list"]] if shape.holds_list else []
    found += [names["target"] if shape.key.slot and not shape.holds_list else names["map"]] if shape.record or shape.map_item is not None else []
    return ", ".join(found + ([names["null"]] if shape.nullable else []))


def limits(shape: Shape) -> str:
    """The range of a number: '≥ 0, < 1', '≥ 8, 8 × n'."""
    signs = (("≥", shape.key.ge), (">", shape.key.gt), ("≤", shape.key.le), ("<", shape.key.lt))
    return ", ".join([f"{sign} {limit:.15g}" for sign, limit in signs if limit is not None] + ([f"{shape.key.multiple} × n"] if shape.key.multiple else []))


def _flow(value: Any) -> str:
    """A default on one line."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, str) and not value:
        return "''"
    return tree.dump(tree.Map(v=tree.written(value)))[3:].strip()


def base_yaml() -> str:
    """The text of cfgs/train/train_base.yaml."""
    return BASE_HEAD + "\n".join(_block(RunConfig, 0)) + "\n"


def _block(cls: type, depth: int) -> list[str]:
    """The lines of a schema class, in YAML, `depth` spaces in."""
    pad, lines = " " * depth, []
    for name, field in fields(cls).items():
        lines += [""] if not depth else []
        lines += [f"{pad}# {line}" for line in _comment(field)]
        lines += _entry(name, field, depth)
    return lines


def _entry(name: str, field: Field, depth: int) -> list[str]:
    pad, shape = " " * depth, field.shape
    if shape.record:
        return [f"{pad}{name}:", *_block(shape.record, depth + 2)]
    item, values = shape.list_item, shape.map_item
    if item and item.record:
        return [f"{pad}{name}: {_flow(shapes.default_of(field))}", *_off(["- # one group"] + ["  " + line for line in _block(item.record, 0)], pad)]
    if values and values.record:
        free = NAMES.get(name, "name")
        return _off([f"{name}:", f"  {free}:", *_block(values.record, 4)], pad)
    if field.required:
        return _off([f"{name}:"], pad)
    value = shapes.default_of(field)
    if not isinstance(value, (list, dict)) or not value:
        return [f"{pad}{name}: {_flow(value)}"]
    return [f"{pad}{line}" for line in tree.dump(tree.Map({name: tree.written(value)})).rstrip().split("\n")]


def _off(lines: list[str], pad: str) -> list[str]:
    """Lines commented out."""
    return [f"{pad}# {line}".rstrip() for line in lines if line.strip()]


def _comment(field: Field) -> list[str]:
    key = field.shape.key
    facts = [f"unit: {key.unit}"] if key.unit else []
    facts += [limits(field.shape)] if limits(field.shape) else []
    facts += [" | ".join(map(str, field.shape.literals))] if field.shape.literals else []
    facts += ["required"] if field.required and not field.shape.record else []
    return [key.doc + (f" ({'; '.join(facts)})" if facts else ""), *([key.zh] if key.zh else [])]


def files() -> dict[str, str]:
    """Path below the checkout -> text, for everything that is generated."""
    return {"cfgs/train/train_base.yaml": base_yaml(), **{f"docs/{language}/user_guides/config.md": reference(language) for language in WORDS}}


def parser() -> argparse.ArgumentParser:
    """Command line of the generator."""
    made = cli.Parser(prog="python -m hcpdiff.tools.config_reference", description="Write the config reference and cfgs/train/train_base.yaml from the schemas.")
    made.add_argument("--folder", default=".", help="the checkout to write into (default: here)")
    made.add_argument("--check", action="store_true", help="write nothing; fail if a file is not current")
    return made


def _main(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    if args.check:
        stale = [name for name, text in files().items() if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text]
        if stale:
            raise ConfigError(f"not current: {', '.join(stale)}. Run python -m hcpdiff.tools.config_reference in the checkout")
        return 0
    for name, text in files().items():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise ConfigError(f"{folder / name} cannot be written: {error.strerror}") from None
        print(f"wrote {folder / name}")
    return 0


if __name__ == "__main__":
    cli.run(_main, parser)

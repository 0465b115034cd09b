"""The plain config as it was written: maps, lists and two kinds of text, each knowing where it stands.

Values stay text until the schema says what they are, so that a trigger word `007`, a prompt `no` and a learning rate `2e-5` all
come out as meant. `Word` is unquoted (may be a number, true/false, null), `Text` is quoted or literal (always text).
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})$|0x[0-9a-fA-F]{1,16}$|0o[0-7]{1,22}$")
REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$")
NOT_FINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
NULLS, TRUES, FALSES = {"", "~", "null", "Null", "NULL"}, {"true", "True", "TRUE"}, {"false", "False", "FALSE"}
DELETE = "---"


class Origin(NamedTuple):
    """Where a value was written. `layer` counts upwards in the order of merging; `file` is None for the command line.

    `via` is the expression that brought it from elsewhere, and where that is.
    """

    layer: int = -1
    file: Path | None = None
    line: int = 0
    via: str = ""

    def __str__(self) -> str:
        if self.layer < 0:
            return "default"
        return (f"{self.file}:{self.line}" if self.file else "command line") + (f", through {self.via}" if self.via else "")


class Map(dict):
    """A mapping of the config; keys are text."""

    origin = Origin()


class Seq(list):
    """A list of the config."""

    origin = Origin()


class Text(str):
    """Text, whatever it looks like."""

    origin = Origin()


class Word(Text):
    """An unquoted scalar: a number, true/false or null if it looks like one and the schema allows it, else text."""


Node = Map | Seq | Text | int | float | bool | None


def at(node: Node, origin: Origin) -> Node:
    """The node with `origin` set on it."""
    node.origin = origin
    return node


def scalar(node: Any) -> None | bool | int | float | str:
    """What a scalar means where no schema says so (YAML 1.2 core rules, so `no`, `on`, `12:30`, `007` are text and `2e-5` is a number)."""
    if not isinstance(node, Word):
        return str(node) if isinstance(node, str) else node
    if node in NULLS:
        return None
    if node in TRUES or node in FALSES:
        return node in TRUES
    if INTEGER.match(node):
        return int(node, 0 if node[:2] in ("0x", "0o") else 10)
    if REAL.match(node):
        return float(node)
    return float(NOT_FINITE[node.lower()]) if node.lower() in NOT_FINITE else str(node)


def copy(node: Node) -> Node:
    """A deep copy that keeps origins."""
    if isinstance(node, Map):
        return at(Map((key, copy(value)) for key, value in node.items()), node.origin)
    return at(Seq(copy(value) for value in node), node.origin) if isinstance(node, Seq) else node


def plain(node: Any) -> Any:
    """Plain dicts, lists and scalars, by the rules of `scalar`."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    return [plain(value) for value in node] if isinstance(node, list) else scalar(node)


def written(value: Any) -> Node:
    """Plain data as it would be written: the opposite of `plain`."""
    if isinstance(value, dict):
        return Map((str(key), written(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return Seq(written(item) for item in value)
    if isinstance(value, str):
        return value if isinstance(value, Text) else Text(value)
    return Word({None: "null", True: "true", False: "false"}[value]) if value is None or isinstance(value, bool) else Word(repr(value))


def dotted(path: tuple) -> str:
    """('lora_unet', 0, 'rank') -> 'lora_unet[0].rank'."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class _Dumper(yaml.SafeDumper):
    """Writes text so that both our reader and a YAML 1.1 reader take it for text."""

    def resolve(self, kind, value, implicit):
        """Every plain scalar may be written bare; quoting is decided by the representers below."""
        return super().resolve(kind, value, implicit) if kind is not yaml.ScalarNode else "tag:yaml.org,2002:str"

    def ignore_aliases(self, data):
        """No anchors: everything is written out."""
        return True


def _represent_text(dumper: _Dumper, text: Text) -> yaml.ScalarNode:
    looks_typed = not isinstance(scalar(Word(text)), str) or yaml.SafeDumper.resolve(dumper, yaml.ScalarNode, str(text), (True, False)) != "tag:yaml.org,2002:str"
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="'" if looks_typed or text == DELETE else None)


def _represent_word(dumper: _Dumper, word: Word) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(word) or "null")


_Dumper.add_representer(Text, _represent_text)
_Dumper.add_representer(Word, _represent_word)
_Dumper.add_representer(Map, lambda dumper, node: dumper.represent_mapping("tag:yaml.org,2002:map", {Text(key): value for key, value in node.items()}.items()))
_Dumper.add_representer(Seq, lambda dumper, node: dumper.represent_sequence("tag:yaml.org,2002:seq", node))


def dump(node: Map) -> str:
    """YAML text that `read.parse` reads back to the same tree."""
    return yaml.dump(node, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=False)

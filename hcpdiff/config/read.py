"""YAML text to a tree (see `tree`), and the three places in which a named file is looked for."""

import os
from collections.abc import Hashable
from pathlib import Path

import yaml

from ..errors import ConfigError
from .tree import Map, Node, Origin, Seq, Text, Word, at

MOST_NODES = 100_000  # a config has hundreds; anchors that multiply reach this at once
DEEPEST = 40
PACKAGE = Path(__file__).resolve().parents[1]
TAG = "tag:yaml.org,2002:"


class _Composer(yaml.SafeLoader):
    """PyYAML's parser only: every unquoted scalar is marked as a Word, nothing is constructed."""

    def resolve(self, kind, value, implicit):
        """Our tag for unquoted scalars; collections and explicit text as usual."""
        if kind is yaml.ScalarNode:
            return "word" if implicit[0] else TAG + "str"
        return super().resolve(kind, value, implicit)


def parse(text: str, origin: Origin, flow: bool = False) -> Node:
    """The tree of one YAML document; ConfigError with every fault found. `flow`: a value of the command line, its line is not told."""
    try:
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_fault(error, origin, flow)) from None
    except RecursionError:
        raise ConfigError(f"{_place(origin, 1, flow)} is nested too deeply") from None
    if node is None:
        return at(Word(""), origin)
    faults: list[str] = []
    tree = _Converter(origin, flow, faults).convert(node)
    if faults:
        raise ConfigError(faults)
    return tree


def read(path: Path, layer: int) -> Map:
    """The tree of a YAML file (UTF-8, with or without BOM); ConfigError when it cannot be read or is no mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    tree = parse(text, Origin(layer, path))
    if tree == "":
        return at(Map(), Origin(layer, path, 1))
    if not isinstance(tree, Map):
        raise ConfigError(f"{path} is a {'list' if isinstance(tree, Seq) else 'single value'}; a config file is a mapping of 'key: value' lines")
    return tree


def places(name: str, named_by: Path | None) -> list[Path]:
    """Where a named file may be: the working directory, beside the file that names it, among the installed `cfgs/`."""
    carried = [PACKAGE, PACKAGE.parent] if (PACKAGE / "cfgs").is_dir() else [PACKAGE.parent]  # the wheel, else a checkout
    name = os.path.expanduser(name)
    beside = [named_by.parent / name] if named_by else []
    return [Path(name), *beside, carried[0] / name, carried[0] / "cfgs" / name]


def find(name: str, named_by: Path | None = None) -> Path | None:
    """The first of `places` that is a file."""
    return next((path for path in places(name, named_by) if os.path.isfile(path)), None)


def _place(origin: Origin, line: int, flow: bool) -> str:
    return str(origin) if flow or not origin.file else f"{origin.file}:{line}"


def _syntax_fault(error: yaml.YAMLError, origin: Origin, flow: bool) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    context = f" ({error.context})" if getattr(error, "context", None) else ""
    if mark is None:  # a character that YAML does not allow at all
        return f"{_place(origin, 1, flow)} is no YAML: {problem} at character {getattr(error, 'position', '?')}"
    hint = ""
    if "'\\t'" in problem:
        hint = ". Indent with spaces, not tabs"
    elif "escape" in problem:
        hint = ". In double quotes a backslash starts an escape: use single quotes, or / in paths"
    elif "mapping values are not allowed" in problem:
        hint = ". Text with ': ' in it needs quotes; otherwise look at the indentation"
    where = f"column {mark.column + 1}" if flow else f"line {mark.line + 1}, column {mark.column + 1}"
    return f"{_place(origin, mark.line + 1, flow)} is no YAML: {problem}{context} at {where}{hint}"


class _Converter:
    """PyYAML's node graph to our tree: own copies for aliases, duplicate keys and foreign tags as faults."""

    def __init__(self, origin: Origin, flow: bool, faults: list[str]):
        self.origin, self.flow, self.faults = origin, flow, faults
        self.count, self.open = 0, set()

    def convert(self, node: yaml.Node, mark: yaml.Mark | None = None) -> Node:
        """The tree below `node`; `mark` is where its key stands."""
        origin = self.origin._replace(line=(mark or node.start_mark).line + 1)
        self.count += 1
        if self.count > MOST_NODES:
            raise ConfigError(f"{origin.file or origin} grows beyond {MOST_NODES} values by its anchors")
        if len(self.open) > DEEPEST:
            raise ConfigError(f"{origin.file or origin} is nested more than {DEEPEST} deep")
        if id(node) in self.open:
            self.fault(node, "an anchor that contains itself")
            return at(Word(""), origin)
        if isinstance(node, yaml.ScalarNode):
            return at(self.scalar(node), origin)
        self.open.add(id(node))
        if node.tag not in (TAG + "map", TAG + "seq", "!"):
            self.fault(node, f"the tag {_short(node.tag)} is not used here: take it out")
        made = Seq(map(self.convert, node.value)) if isinstance(node, yaml.SequenceNode) else self.mapping(node)
        self.open.discard(id(node))
        return at(made, origin)

    def scalar(self, node: yaml.ScalarNode) -> Text:
        """A Word for unquoted text, else a Text."""
        if node.tag == "word":
            return Word(node.value)
        if node.tag not in (TAG + "str", "!"):
            self.fault(node, f"the tag {_short(node.tag)} is not used here: take it out")
        return Text(node.value)

    def mapping(self, node: yaml.MappingNode) -> Map:
        """A Map; keys that stand twice are faults."""
        made, lines, merged = Map(), {}, []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.fault(key_node, "a list or map cannot be a key" + (" (a { } at a value's start needs quotes)" if not self.flow else ""))
            elif key_node.tag == "word" and key_node.value == "<<":
                merged.append(value_node)
            elif key_node.value in lines:
                self.fault(key_node, f"the key {key_node.value!r} stands here a second time (first in line {lines[key_node.value]})")
            else:
                lines[key_node.value] = key_node.start_mark.line + 1
                made[key_node.value] = self.convert(value_node, key_node.start_mark)
        for value_node in merged:
            self.merge(made, value_node)
        return made

    def merge(self, made: Map, node: yaml.Node) -> None:
        """YAML's `<<: *anchor` (or a list of anchors): fills in what the mapping itself does not say."""
        value = self.convert(node)
        for part in value if isinstance(value, Seq) else [value]:
            if not isinstance(part, Map):
                self.fault(node, "'<<' takes a map, or a list of maps")
                continue
            for key, item in part.items():
                made.setdefault(key, item)

    def fault(self, node: yaml.Node, text: str) -> None:
        """Notes a fault with its line and column."""
        mark = node.start_mark
        where = f"column {mark.column + 1}" if self.flow else f"line {mark.line + 1}, column {mark.column + 1}"
        self.faults.append(f"{_place(self.origin, mark.line + 1, self.flow)}: {text} ({where})")


def _short(tag: Hashable) -> str:
    return str(tag).replace(TAG, "!!")

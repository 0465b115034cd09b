"""Captions in one file for many images: JSON, JSON Lines, YAML -> a map of keys to captions. Every fault names the file, and line and column where known."""

import json
from collections import Counter
from pathlib import Path

import yaml

from .files import one_line, read_text

NAME_KEYS = ("file_name", "image", "img", "name", "file", "path", "id")
CAPTION_KEYS = ("text", "caption", "prompt", "tags")


def read_table(path: Path, faults: list[str]) -> dict[str, str]:
    """key -> caption of a json, jsonl or yaml file."""
    text = read_text(path, faults)
    if text is None:
        return {}
    table = _Table(path, faults)
    ending = path.suffix.lower()
    if ending == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                _add_json(table, line, number, number)
    elif ending == ".json":
        _add_json(table, text, 1, None)
    else:
        _add_yaml(table, text)
    return table.captions


class _Table:
    """Collects key -> caption out of one file; every fault names the file and, where known, the line."""

    def __init__(self, path: Path, faults: list[str]):
        self.path, self.faults, self.captions = path, faults, {}

    def fault(self, line: int | None, text: str) -> None:
        """Note what is wrong."""
        self.faults.append(f"{self.path}: {f'line {line}: ' if line else ''}{text}")

    def add(self, key: str, value: str | None, line: int | None) -> None:
        """One caption; null is none."""
        if key in self.captions:
            self.fault(line, f"key {key!r} stands there twice")
        elif value is not None:
            self.captions[key] = one_line(value)

    def add_entry(self, key: str, value: object, line: int | None) -> None:
        """A key's value: text, or a map that holds it."""
        if isinstance(value, dict):
            value = next((value[name] for name in CAPTION_KEYS if name in value), value)
        if value is None or isinstance(value, str):
            self.add(key, value, line)
        else:
            self.fault(line, f"the caption of {key!r} must be text (or a map with one of {', '.join(CAPTION_KEYS)}), not {_kind(value)}")

    def add_record(self, value: object, line: int | None) -> None:
        """{"file_name": ..., "text": ...}, or a map of keys to captions."""
        if not isinstance(value, dict):
            self.fault(line, f'expected {{"image": "caption"}} or {{"file_name": ..., "text": ...}}, not {_kind(value)}')
            return
        name = next((value[key] for key in NAME_KEYS if isinstance(value.get(key), str)), None)
        caption = next((value[key] for key in CAPTION_KEYS if isinstance(value.get(key), str)), None)
        if name is not None and caption is not None:
            self.add(name, caption, line)
        else:
            for key, entry in value.items():
                self.add_entry(key, entry, line)


def _kind(value: object) -> str:
    names = {list: "a list", dict: "a map", bool: "true or false", str: "text", type(None): "null"}
    return names.get(type(value), "a number")


def _add_json(table: _Table, text: str, line: int, record_line: int | None) -> None:
    twice: list[str] = []

    def pairs(found: list[tuple[str, object]]) -> dict[str, object]:
        twice.extend(key for key, count in Counter(key for key, _ in found).items() if count > 1)
        return dict(found)

    try:  # numbers keep their spelling: a caption 007 or 1.50 in a file is text to us
        value = json.loads(text, object_pairs_hook=pairs, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        table.faults.append(f"{table.path}: line {line + error.lineno - 1} column {error.colno}: {_json_hint(text, error)}")
        return
    except RecursionError:
        table.fault(line, "is nested too deeply to be a list of captions")
        return
    for key in twice:
        table.fault(record_line, f"key {key!r} stands there twice")
    if isinstance(value, list):
        for entry in value:
            table.add_record(entry, record_line)
    elif record_line is not None:
        table.add_record(value, record_line)
    elif isinstance(value, dict):
        for key, entry in value.items():
            table.add_entry(key, entry, None)
    else:
        table.fault(None, f'expected {{"image": "caption", ...}}, not {_kind(value)}')


def _json_hint(text: str, error: json.JSONDecodeError) -> str:
    before = text[:error.pos].rstrip()
    at = text[error.pos:error.pos + 1]
    if not at:
        return "the file ends too early; a closing bracket or quote is missing"
    if before.endswith(",") and at in "}]":
        return f"a comma too many before '{at}'"
    if at == "'":
        return "JSON wants double quotes"
    if error.msg.startswith("Expecting ',' delimiter"):
        return f"a comma (or a closing bracket) is missing before {text[error.pos:error.pos + 20]!r}"
    if error.msg.startswith("Extra data"):
        return "more text after the end; one JSON object per line is a .jsonl file"
    return error.msg


def _add_yaml(table: _Table, text: str) -> None:
    """YAML by its nodes, so that every scalar stays the text that was written (01, no, 12:30) and each fault has its line."""
    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1} column {mark.column + 1}: " if mark else ""
        table.faults.append(f"{table.path}: {place}{getattr(error, 'problem', None) or str(error).splitlines()[0]}")
        return
    except RecursionError:
        table.fault(None, "is nested too deeply to be a list of captions")
        return
    if root is None:
        return
    nodes = root.value if isinstance(root, yaml.SequenceNode) else [root]
    for node in nodes:
        if not isinstance(node, yaml.MappingNode):
            table.fault(node.start_mark.line + 1, "expected 'image: caption' lines")
        elif isinstance(root, yaml.SequenceNode):
            table.add_record({_scalar(key): _plain(value) for key, value in node.value}, node.start_mark.line + 1)
        else:
            for key, value in node.value:
                table.add_entry(_scalar(key), _plain(value), key.start_mark.line + 1)


def _scalar(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else "?"


def _plain(node: yaml.Node) -> object:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.MappingNode):
        return {_scalar(key): _scalar(value) for key, value in node.value}
    return []

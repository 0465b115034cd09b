"""What is put right in a merged tree before its values are read: spellings, keys that exclude each other or turn a map on, default objects, a run's own folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .expressions import has_expression
from .legacy import is_null
from .merge import merge
from .overrides import Override, lengthen
from .resolve import key_path
from .shape import Shape, default_of, fields
from .tree import Map, Node, Origin, Seq, Text, Word, at, dotted, plain, written
from .walk import origin_of


def spell(node: Node, shape: Shape, faults: list[str]) -> None:
    """Other spellings of keys to the main one, and short forms to long ones, in place."""
    if isinstance(node, Seq):
        for index, item in enumerate(node):
            spell(item, shape.child(index), faults)
    if not isinstance(node, Map):
        return
    for name in list(node):
        main = shape.spelling(name)
        if main != name and main in node:
            faults.append(f"{name} ({node[name].origin}) and {main} mean the same: keep one")
        elif main != name:
            node[main] = node.pop(name)
        node[main] = lengthen(node[main], shape.child(main))
        spell(node[main], shape.child(main), faults)


def complete(tree: Map, given: Sequence[Override], schema: type) -> None:
    """Arguments of an object whose `_target_` nobody wrote belong to the default's: its map is put below them."""
    for path, default in _default_specs(schema):
        node = node_at(tree, dotted(path))
        inner = {override.path[len(path)] for override in given if len(override.path) > len(path) and override.path[:len(path)] == path}
        written_map = isinstance(node, Map) and "_target_" not in node
        if "_target_" not in inner and (written_map or inner and node is None):
            parent: Any = tree
            for part in path[:-1]:
                parent = parent.setdefault(part, Map()) if isinstance(parent, Map) else None
            if isinstance(parent, Map):
                parent[path[-1]] = at(merge(written(default), node or Map(), path, []), origin_of(node))


def either(tree: Map, schema: type, faults: list[str], notices: list[str]) -> None:
    """Of two keys that say one thing, the one that the later layer set stays; the other becomes null."""
    for pair in getattr(schema, "EITHER", ()):
        found = [(node_at(tree, key), key) for key in pair]
        found = [(origin_of(node), key) for node, key in found if node is not None and not is_null(node)]
        if len(found) < 2:
            continue
        (low, loser), (high, winner) = sorted(found, key=lambda item: item[0].layer)
        if low.layer == high.layer:
            faults.append(f"{loser} ({low}) and {winner} ({high}) say one thing in two ways: keep one (or set the other to null)")
            continue
        replace(tree, loser, at(Word("null"), high))
        notices.append(f"{winner} ({high}) replaces {loser} ({low})")


def turned_on(tree: Map, schema: type, notices: list[str]) -> None:
    """A map with a key that turns it on (`SHORT`) is on where a key of it is set, and the turning key is not, or by an earlier layer only (the template says false)."""
    for path, record in _switched(schema):
        node = node_at(tree, dotted(path))
        if not isinstance(node, Map):
            continue
        switch = node.get(record.SHORT)
        layer = -1 if switch is None else origin_of(switch).layer
        known = fields(record)
        asked = [name for name, value in node.items() if name != record.SHORT and name in known and origin_of(value).layer > layer and plain(value) != default_of(known[name])]
        if asked and (switch is None or plain(switch) is False):
            origin = origin_of(node[asked[0]])
            node[record.SHORT] = at(Word("true"), origin)
            notices.append(f"{dotted((*path, asked[0]))} ({origin}) turns {dotted(path)} on")


def _switched(schema: type, path: tuple = ()) -> list[tuple[tuple, type]]:
    """(path, record) of every map that has a key which turns it on."""
    records = [((*path, name), field.shape.record) for name, field in fields(schema).items() if field.shape.record]
    return [item for here, record in records for item in ([(here, record)] if getattr(record, "SHORT", None) else _switched(record, here))]


def fresh_folder(tree: Map, path: Path, schema: type, notices: list[str]) -> None:
    """The cfg.yaml of a run, loaded again, starts a run of its own: its folder is not taken over, unless that run is resumed."""
    if "exp_dir" not in fields(schema) or path.name != "cfg.yaml" or not isinstance(tree.get("exp_dir"), Text) or not _null(tree, "train.resume"):
        return
    folder = str(tree["exp_dir"])
    if tree["exp_dir"].origin.file == path and not has_expression(folder) and "\0" not in folder and Path(os.path.expanduser(folder)).resolve() == path.parent.resolve():
        tree["exp_dir"] = at(Text(default_of(fields(schema)["exp_dir"])), Origin())
        notices.append(f"exp_dir: this is the config of the run in {folder}; the new run gets a folder of its own")


def _default_specs(schema: type, path: tuple = ()) -> list[tuple[tuple, dict]]:
    """(path, default) of every `_target_` map with a default, not counting those in lists and free maps."""
    found = []
    for name, field in fields(schema).items():
        default = None if field.required else default_of(field)
        if field.shape.record:
            found += _default_specs(field.shape.record, (*path, name))
        elif isinstance(default, dict) and "_target_" in default:
            found.append(((*path, name), default))
    return found


def node_at(tree: Map, key: str) -> Node:
    """What is written at a dotted key; None where nothing is."""
    node: Any = tree
    for part in key_path(key):
        if isinstance(node, Map) and str(part) in node:
            node = node[str(part)]
        elif isinstance(node, Seq) and str(part).isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node


def _null(tree: Map, key: str) -> bool:
    node = node_at(tree, key)
    return node is None or is_null(node)


def replace(tree: Map, key: str, value: Node) -> None:
    """Sets what stands at a dotted key that is there (or one below a map that is)."""
    *parents, last = key_path(key)
    node: Any = tree
    for part in parents:
        node = node[part]
    node[last] = value

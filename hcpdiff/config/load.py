"""Reads a config: bases, file and command line, expressions, and the checks that need no torch (stage A)."""

import datetime
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import ConfigError
from . import check, legacy, overrides
from .expressions import ExpressionError, has_expression
from .merge import BASE, Idle, Layers, merge
from .resolve import BROKEN, Resolver, key_path
from .tree import Map, Node, Origin, Seq, Text, Word, at, copy, dotted, dump, plain, written
from .walk import Shape, Walk, default_at, default_of, fields, origin_of, shape_of, to_plain

T = TypeVar("T")
MENTION = re.compile(r"\$[{<]([^\s.:\[\]{}<>$]+)")


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A config that passed stage A.

    config: the typed config, every expression evaluated, defaults filled in. yaml: the merged config as text for cfg.yaml
    (interpolations kept, hcp.time written out): loading it gives the same config. plain: `config` as plain dicts with YAML's spelling.
    written: the merged config as plain dicts, expressions unevaluated. files: the files read, bases first. notices: lines for the log.
    timed: dotted keys whose value depends on hcp.time. now: the moment that hcp.time means.
    set_by(key): number of the layer that set a key (files from 0 in the order of `files`, then the command line); -1: its default.
    """

    config: T
    yaml: str
    plain: dict[str, Any]
    written: dict[str, Any]
    files: list[Path]
    notices: list[str]
    timed: frozenset[str]
    now: datetime.datetime
    set_by: Callable[[str], int]


def load(path: str, overrides_: Sequence[str] = (), schema: type[T] | None = None, now: datetime.datetime | str | None = None,
         allow: Sequence[str] = ()) -> Loaded[T]:
    """The config of a file and `key=value` arguments; ConfigError with all faults of stage A.

    `schema` defaults to training's RunConfig. `now` (a datetime or its ISO text) fixes hcp.time: hand one moment to every process.
    `allow` adds package prefixes for `_target_`.
    """
    if schema is None:
        from .schema import RunConfig as schema
    moment = datetime.datetime.fromisoformat(now) if isinstance(now, str) else now or datetime.datetime.now()
    return _Loader(schema, moment, tuple(allow)).load(str(path), list(overrides_))


class _Loader:
    """One call of `load`."""

    def __init__(self, schema: type, now: datetime.datetime, allow: tuple[str, ...]):
        self.schema, self.shape, self.now, self.allow = schema, shape_of(schema), now, allow
        self.faults: list[str] = []
        self.notices: list[str] = []
        self.mentioned: set[str] = set()  # top-level keys that an expression of any layer names, replaced ones too

    def load(self, path: str, arguments: list[str]) -> Loaded:
        layers = Layers(self.faults)
        layers.add(path)
        unread = bool(self.faults)
        given = overrides.parse(arguments, self.faults)
        if unread:
            raise ConfigError(self.faults)  # what follows from a missing or broken file would be noise
        tree = self.merged(layers, given)
        own_layer = len(layers.trees) - 1
        self.either(tree)
        self.fresh_folder(tree, layers.files[-1])
        resolver = Resolver(tree, self.now, lambda key: default_at(self.schema, key), self.faults)
        config = self.walked(tree, resolver, own_layer)
        if self.faults:
            raise ConfigError(list(dict.fromkeys(self.faults)))
        frozen = self.frozen(tree, resolver)
        return Loaded(config, dump(frozen), to_plain(config), plain(tree), layers.files, self.notices, frozenset(resolver.timed), self.now, _set_by(tree))

    def merged(self, layers: Layers, given: list[overrides.Override]) -> Map:
        """All layers joined, the command line last."""
        tree, idle = Map(), []
        for layer in layers.trees:
            legacy.modernise(layer, self.notices)
            self.spell(layer, self.shape)
            self.mentioned.update(name for text in _texts(layer) for name in MENTION.findall(text))
            tree = merge(tree, layer, (), idle)
        for path, origin, hint in idle:
            if not self.shape.at(path[:-1]).knows(path[-1]):
                self.faults.append(f"{dotted(path)} = '---' ({origin}): there is no such key to delete{hint}")
        self.complete(tree, given)
        overrides.apply(tree, given, self.shape, len(layers.trees), self.faults)
        self.complete(tree, [])
        if BASE in tree:
            self.faults.append(f"{BASE} cannot be set on the command line: write it in the file")
            del tree[BASE]
        return overrides.settle(tree, tree, lambda name: _exists(tree, self.schema, name))

    def spell(self, node: Node, shape: Shape) -> None:
        """Other spellings of keys to the main one, in place."""
        if isinstance(node, Seq):
            for index, item in enumerate(node):
                self.spell(item, shape.child(index))
        if not isinstance(node, Map):
            return
        for name in list(node):
            main = shape.spelling(name)
            if main != name and main in node:
                self.faults.append(f"{name} ({node[name].origin}) and {main} mean the same: keep one")
            elif main != name:
                node[main] = node.pop(name)
            self.spell(node.get(main), shape.child(main))

    def complete(self, tree: Map, given: list[overrides.Override]) -> None:
        """Arguments of an object whose `_target_` nobody wrote belong to the default's: its map is put below them."""
        for path, default in _default_specs(self.schema):
            node = _node(tree, dotted(path))
            inner = {override.path[len(path)] for override in given if len(override.path) > len(path) and override.path[:len(path)] == path}
            written_map = isinstance(node, Map) and "_target_" not in node
            if "_target_" not in inner and (written_map or inner and node is None):
                parent: Any = tree
                for part in path[:-1]:
                    parent = parent.setdefault(part, Map()) if isinstance(parent, Map) else None
                if isinstance(parent, Map):
                    parent[path[-1]] = at(merge(written(default), node or Map(), path, []), origin_of(node))

    def either(self, tree: Map) -> None:
        """Of two keys that say one thing, the one that the later layer set stays; the other becomes null."""
        for pair in getattr(self.schema, "EITHER", ()):
            found = [(_node(tree, key), key) for key in pair]
            found = [(origin_of(node), key) for node, key in found if node is not None and not legacy.is_null(node)]
            if len(found) < 2:
                continue
            (low, loser), (high, winner) = sorted(found, key=lambda item: item[0].layer)
            if low.layer == high.layer:
                self.faults.append(f"{loser} ({low}) and {winner} ({high}) say one thing in two ways: keep one (or set the other to null)")
                continue
            _replace(tree, loser, at(Word("null"), high))
            self.notices.append(f"{winner} ({high}) replaces {loser} ({low})")

    def fresh_folder(self, tree: Map, path: Path) -> None:
        """The cfg.yaml of a run, loaded again, starts a run of its own: its folder is not taken over, unless that run is resumed."""
        if "exp_dir" not in fields(self.schema) or path.name != "cfg.yaml" or not isinstance(tree.get("exp_dir"), Text) or not _null(tree, "train.resume"):
            return
        folder = str(tree["exp_dir"])
        if not has_expression(folder) and "\0" not in folder and Path(folder).resolve() == path.parent.resolve():
            tree["exp_dir"] = at(Text(default_of(fields(self.schema)["exp_dir"])), Origin())
            self.notices.append(f"exp_dir: this is the config of the run in {folder}; the new run gets a folder of its own")

    def walked(self, tree: Map, resolver: Resolver, own_layer: int) -> Any:
        """The typed config, after every check of stage A."""
        known = fields(self.schema)
        for name, field in known.items():
            if name not in tree and not field.required and isinstance(default := default_of(field), str) and has_expression(default):
                tree[name] = at(Text(default), Origin())
        removed = getattr(self.schema, "REMOVED", {})
        resolved = at(Map(), tree.origin)
        for name in tree:
            if name in known:
                resolved[name] = resolver.guarded(tree[name], (name,))
            else:
                resolved[name] = tree[name]
        walk = Walk(lambda text, here: self.filled(text, here, resolver), self.faults)
        config = walk.record(self.schema, resolved)
        carried: dict[tuple, Path] = {}
        self.faults += check.leaf_faults(walk.leaves, self.allow, carried)
        self.unread(tree, [name for name in walk.unknown if name not in resolver.read and name not in removed], own_layer)
        self.place(tree, config, carried)
        return config

    def filled(self, text: str, path: tuple, resolver: Resolver) -> Any:
        """A default with its expressions evaluated."""
        if not has_expression(text):
            return text
        value = resolver.guarded(Text(text), path)
        return value if value is BROKEN else str(value)

    def unread(self, tree: Map, names: list[str], own_layer: int) -> None:
        """Free keys that nothing reads: a fault of the user's file or command line, a notice where a base wrote it or its reader was replaced."""
        for name in names:
            origin = origin_of(tree[name])
            if origin.layer >= own_layer and name not in self.mentioned:
                self.faults.append(f"{name} ({origin}) is not a known key, and nothing reads it{self._belongs(name)}")
            else:
                self.notices.append(f"{name} ({origin}) is a key that nothing reads")

    def _belongs(self, name: str) -> str:
        """What a free key may have meant: another top-level key, one that an expression could read, or one further down."""
        below = [f"{parent}.{name}" for parent, field in fields(self.schema).items() if field.shape.record and name in fields(field.shape.record)]
        if below:
            return f". It belongs below: {', '.join(below)}"
        near = difflib.get_close_matches(name, _all_names(self.schema), n=3)
        if "." in name or not near:
            return Walk.hint(self.schema, name)
        return f". Nearest: {', '.join(near)}"

    def place(self, tree: Map, config: Any, carried: dict[tuple, Path]) -> None:
        """Puts the files found among three places into the config; in cfg.yaml one found beside its file is written as found."""
        if config is BROKEN:
            return
        for path, found in carried.items():
            _assign(config, path, str(found))
            node = _node(tree, dotted(path))
            if isinstance(node, Text) and node.origin.file and found.parent != Path(str(node)).parent and _beside(node, found):
                _replace(tree, dotted(path), at(Text(str(found)), node.origin))

    def frozen(self, node: Node, resolver: Resolver, path: tuple = ()) -> Node:
        """The tree with the time written out."""
        if isinstance(node, Map):
            return Map((key, self.frozen(value, resolver, (*path, key))) for key, value in node.items())
        if isinstance(node, Seq):
            return Seq(self.frozen(value, resolver, (*path, index)) for index, value in enumerate(node))
        return resolver.frozen(node, path) if isinstance(node, Text) else node


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


def _texts(node: Node) -> list[str]:
    """Every text below a node."""
    if isinstance(node, (Map, Seq)):
        return [text for item in (node.values() if isinstance(node, Map) else node) for text in _texts(item)]
    return [node] if isinstance(node, str) else []


def _all_names(schema: type) -> list[str]:
    """Dotted names of the keys on the top level and one below."""
    names = list(fields(schema))
    for parent, field in fields(schema).items():
        names += [f"{parent}.{name}" for name in fields(field.shape.record)] if field.shape.record else []
    return names


def _beside(node: Text, found: Path) -> bool:
    return found == node.origin.file.parent / str(node)


def _node(tree: Map, key: str) -> Node:
    """What is written at a dotted key; None where nothing is."""
    node: Any = tree
    for part in key_path(key):
        if isinstance(node, Map) and part in node or isinstance(node, Seq) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            return None
    return node


def _null(tree: Map, key: str) -> bool:
    node = _node(tree, key)
    return node is None or legacy.is_null(node)


def _replace(tree: Map, key: str, value: Node) -> None:
    *parents, last = key_path(key)
    node: Any = tree
    for part in parents:
        node = node[part]
    node[last] = value


def _assign(config: Any, path: tuple, value: str) -> None:
    for part in path[:-1]:
        config = config[part] if isinstance(config, (dict, list)) else getattr(config, part)
    if isinstance(config, (dict, list)):
        config[path[-1]] = value
    else:
        setattr(config, path[-1], value)


def _exists(tree: Map, schema: type, name: str) -> bool:
    """Whether an interpolation to this key would find one."""
    if name.startswith("."):
        return True
    if _node(tree, name) is not None:
        return True
    try:
        default_at(schema, key_path(name))
    except LookupError:
        return False
    return True


def _set_by(tree: Map) -> Callable[[str], int]:
    layers = copy(tree)

    def set_by(key: str) -> int:
        node = _node(layers, key)
        return -1 if node is None else origin_of(node).layer

    return set_by

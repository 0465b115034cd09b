"""Reads a config: bases, file and command line, expressions, and the checks that need no torch (stage A)."""

import datetime
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import ConfigError
from . import adjust, check, legacy, overrides
from .adjust import node_at, replace
from .expressions import has_expression
from .merge import BASE, Layers, merge
from .places import elsewhere
from .resolve import BROKEN, Resolver, key_path
from .shape import default_at, default_of, fields, shape_of, to_plain
from .tree import Map, Node, Origin, Seq, Text, at, copy, dotted, dump, plain
from .walk import Walk, origin_of

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
         allow: Sequence[str] = (), also: Callable[[Mapping[str, Any]], list[str]] | None = None) -> Loaded[T]:
    """The config of a file and `key=value` arguments; ConfigError with all faults of stage A.

    `schema` defaults to training's RunConfig. `now` (a datetime or its ISO text) fixes hcp.time: hand one moment to every process.
    `allow` adds package prefixes for `_target_`. Where there are faults, `also` looks further (into folders, at other files) and returns more for the same
    message: it is given what passed, dotted key -> scalar or dataclass. Where there are none, whoever uses the config looks.
    """
    if schema is None:
        from .schema import RunConfig as schema
    moment = datetime.datetime.fromisoformat(now) if isinstance(now, str) else now or datetime.datetime.now()
    return _Loader(schema, moment, tuple(allow), also).load(str(path), list(overrides_))


class _Loader:
    """One call of `load`."""

    def __init__(self, schema: type, now: datetime.datetime, allow: tuple[str, ...], also: Callable[[Mapping[str, Any]], list[str]] | None):
        self.schema, self.shape, self.now, self.allow, self.also = schema, shape_of(schema), now, allow, also
        self.faults: list[str] = []
        self.notices: list[str] = []
        self.idle: list[str] = []  # free keys that nothing reads
        self.mentioned: set[str] = set()  # top-level keys that an expression of any layer names, replaced ones too

    def load(self, path: str, arguments: list[str]) -> Loaded:
        """The whole of stage A."""
        layers = Layers(self.faults)
        layers.add(path)
        unread = bool(self.faults)
        given = overrides.parse(arguments, self.faults)
        if unread:
            raise ConfigError(self.faults)  # what follows from a missing or broken file would be noise
        self.other_kind(layers)
        tree = self.merged(layers, given)
        own_layer = len(layers.trees) - 1
        adjust.either(tree, self.schema, self.faults, self.notices)
        adjust.turned_on(tree, self.schema, self.notices)
        adjust.fresh_folder(tree, layers.files[-1], self.schema, self.notices)
        resolver = Resolver(tree, self.now, lambda key: default_at(self.schema, key), self.faults)
        config = self.walked(tree, resolver, own_layer)
        if self.faults:
            raise ConfigError(list(dict.fromkeys(self.faults)))
        for name in self.idle:  # cfg.yaml is one file, where they would be faults
            del tree[name]
        frozen = self.frozen(tree, resolver)
        return Loaded(config, dump(frozen), to_plain(config), plain(tree), layers.files, self.notices, frozenset(resolver.timed), self.now, _set_by(tree))

    def merged(self, layers: Layers, given: list[overrides.Override]) -> Map:
        """All layers joined, the command line last."""
        tree, idle = Map(), []
        for layer in layers.trees:
            legacy.modernise(layer, self.notices)
            adjust.spell(layer, self.shape, self.faults)
            self.mentioned.update(name for text in _texts(layer) for name in MENTION.findall(text))
            tree = merge(tree, layer, (), idle)
        for path, origin, hint in idle:
            if not self.shape.at(path[:-1]).knows(path[-1]):
                self.faults.append(f"{dotted(path)} = '---' ({origin}): there is no such key to delete{hint}")
        adjust.complete(tree, given, self.schema)
        overrides.apply(tree, given, self.shape, len(layers.trees), self.faults)
        adjust.complete(tree, [], self.schema)
        if BASE in tree:
            self.faults.append(f"{BASE} cannot be set on the command line: write it in the file")
            del tree[BASE]
        return overrides.settle(tree, lambda name: _exists(tree, self.schema, name))

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
        if self.also and self.faults:
            self.faults += self.also(self.passed(walk))
        return config

    def passed(self, walk: Walk) -> dict[str, Any]:
        """Scalars and dataclasses in which and below which nothing was wrong, by dotted key."""
        found = {dotted(path): value for path, value in ((leaf.path, leaf.value) for leaf in walk.leaves)}
        found |= {dotted(path): record for path, record in walk.whole.items()}
        faulty = re.compile("|".join(rf"{re.escape(key)}(?![\w-])" for key in sorted(found, key=len, reverse=True) if key) or "$^")
        named = {match.group() for fault in self.faults if (match := faulty.match(fault))}
        bad = {"" for _ in self.faults} | {key for key in found for name in named if key == name or name.startswith((f"{key}.", f"{key}["))}
        return {key: value for key, value in found.items() if key not in bad}

    def other_kind(self, layers: Layers) -> None:
        """Stops at a config of the other command: every key of it would be a fault of its own."""
        from .infer_schema import InferConfig
        from .schema import RunConfig

        kinds = {RunConfig: (InferConfig, "drawing", "hcpdiff.visualizer"), InferConfig: (RunConfig, "training", "hcpdiff.train_ac_single")}
        if self.schema not in kinds:
            return
        other, what, command = kinds[self.schema]
        names = {name for tree in layers.trees for name in tree}
        theirs, ours = names & set(fields(other)) - set(fields(self.schema)), names & set(fields(self.schema)) - set(fields(other))
        if len(theirs) > 1 and not ours:
            raise ConfigError(f"--cfg {layers.files[-1]} is a config for {what} (it has {', '.join(sorted(theirs)[:4])}): run it by python -m {command}, "
                              f"or name another config here.")

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
                self.idle.append(name)

    def _belongs(self, name: str) -> str:
        """What a free key may have meant: one further down or of another name, another top-level key, or one that an expression could read."""
        if place := elsewhere(self.schema, name):
            return place
        near = difflib.get_close_matches(name, [*_all_names(self.schema), *map(str, self.mentioned)], n=3)
        if "." in name or not near:
            return Walk.hint(self.schema, name)
        return f". Nearest: {', '.join(near)}"

    def place(self, tree: Map, config: Any, carried: dict[tuple, Path]) -> None:
        """Puts the files found among three places into the config; in cfg.yaml one found beside its file is written as found."""
        if config is BROKEN:
            return
        for path, found in carried.items():
            _assign(config, path, str(found))
            node = node_at(tree, dotted(path))
            if isinstance(node, Text) and node.origin.file and found.parent != Path(str(node)).parent and _beside(node, found):
                replace(tree, dotted(path), at(Text(str(found)), node.origin))

    def frozen(self, node: Node, resolver: Resolver, path: tuple = ()) -> Node:
        """The tree with the time written out."""
        if isinstance(node, Map):
            return Map((key, self.frozen(value, resolver, (*path, key))) for key, value in node.items())
        if isinstance(node, Seq):
            return Seq(self.frozen(value, resolver, (*path, index)) for index, value in enumerate(node))
        return resolver.frozen(node, path) if isinstance(node, Text) else node


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
    if node_at(tree, name) is not None:
        return True
    try:
        default_at(schema, key_path(name))
    except LookupError:
        return False
    return True


def _set_by(tree: Map) -> Callable[[str], int]:
    layers = copy(tree)

    def set_by(key: str) -> int:
        """The layer of a dotted key."""
        node = node_at(layers, key)
        return -1 if node is None else origin_of(node).layer

    return set_by

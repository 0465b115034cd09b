"""`key=value` arguments of the command line, put into the merged tree."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from . import expressions, read
from .merge import merge
from .resolve import key_path, near
from .shape import Shape
from .tree import DELETE, Map, Node, Origin, Seq, Text, Word, at, dotted, scalar

KEY = re.compile(r"(?![+~])[^\s.\[\]=,{}$]+(\.[^\s.\[\]=,{}$]+|\[\d{1,6}\])*$")
DEEPEST = 30


@dataclass(frozen=True)
class Override:
    """One argument: where it goes, the text after '=', and the argument as typed."""

    path: tuple
    value: str
    argument: str

    @property
    def element(self) -> bool:
        """Whether the path goes through a list (or looks like it)."""
        return any(str(part).isdecimal() for part in self.path)


def parse(arguments: list[str], faults: list[str]) -> list[Override]:
    """The arguments, split; those that go into list elements last, so that they find the list that the others set."""
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not KEY.match(name) or name.count(".") + name.count("[") > DEEPEST:
            hint = " (keys have no + ~ or - before them here; '---' as the value deletes one)" if name[:1] in "+~-" and name else ""
            faults.append(f"argument {argument!r}: '{name}' is no key; write key=value, with dots for inner keys and .0 for list elements{hint}")
        else:
            found.append(Override(key_path(name), value, argument))
    return sorted(found, key=lambda override: override.element)


def apply(tree: Map, overrides: list[Override], shape: Shape, layer: int, faults: list[str]) -> None:
    """Puts each override into the tree, in place."""
    for override in overrides:
        try:
            put(tree, override, shape, Origin(layer))
        except ConfigError as error:
            faults.extend(f"argument {override.argument!r}: {fault}" for fault in error.faults)


def put(tree: Map, override: Override, shape: Shape, origin: Origin) -> None:
    """Sets, merges or deletes one value; ConfigError when its path leads nowhere."""
    node: Any = tree
    path: tuple = ()
    for part in override.path[:-1]:
        part = _part(node, part, path, shape.at(path))
        if isinstance(node, Map) and (part not in node or _null(node[part])):
            if shape.at((*path, part)).holds_list:
                raise ConfigError(f"{dotted((*path, part))} has no elements: set the list itself first")
            node[part] = at(Map(), origin)
        node, path = node[part], (*path, part)
    last = _part(node, override.path[-1], path, shape.at(path))
    if override.value == DELETE:
        return _delete(node, last, path, shape)
    inner = shape.at((*path, last))
    word = shape.at(path).map_item is not None and override.value == "null"  # of a free map's entry nobody means the text; the walk says what to write
    value = at(Word("null"), origin) if word else lengthen(typed(override.value, inner, origin), inner)
    if isinstance(value, Map) and isinstance(node, Map) and isinstance(node.get(last), Map):
        value = merge(node[last], value, (*path, last), [])
    node[last] = value


def lengthen(node: Any, shape: Shape) -> Any:
    """true, false or null in the place of a map that has a key for just that (`SHORT`): the map with this key. All else as it is."""
    short = getattr(shape.record, "SHORT", None)
    if not short or not isinstance(node, Word) or not (_null(node) or isinstance(scalar(node), bool)):
        return node
    return at(Map({short: at(Word("false"), node.origin) if _null(node) else node}), node.origin)


def _delete(node: Map | Seq, part: str | int, path: tuple, shape: Shape) -> None:
    if isinstance(node, Seq) or part in node:
        del node[part]
    elif not shape.at(path).knows(part):
        raise ConfigError(f"there is no {dotted((*path, part))} to delete{near(part, node)}")


def _part(node: Any, part: str | int, path: tuple, shape: Shape) -> str | int:
    """The key or index as this node has it."""
    here = dotted(path) or "the config"
    if isinstance(node, Seq):
        if not str(part).isdecimal():
            raise ConfigError(f"{here} is a list; its elements are {here}.0, {here}.1, …")
        if int(part) >= len(node):
            raise ConfigError(f"{here} has {len(node)} element{'s' if len(node) != 1 else ''} (counted from 0)")
        return int(part)
    if not isinstance(node, Map):
        kind = f"'{node}', an expression: set the key that it names" if expressions.has_expression(str(node)) else f"'{node}', not a map or list"
        raise ConfigError(f"{here} is {kind}")
    return shape.spelling(str(part))


def _null(node: Any) -> bool:
    return isinstance(node, Word) and node in ("", "null", "~")


def typed(value: str, shape: Shape, origin: Origin) -> Node:
    """The text after '=' as the schema wants it: literal where it wants text, YAML elsewhere."""
    if shape.text and not (shape.holds_list and value.startswith("[") and _is_list(value)):
        if value == "null" and shape.nullable:
            return at(Word("null"), origin)
        return at(Literal(value), origin)
    if value == "":
        return at(Text(""), origin)
    if shape.mixed_text:
        return at(Word(value) if not expressions.has_expression(value) else Literal(value), origin)
    return read.parse(value, origin, flow=True)


def _is_list(value: str) -> bool:
    try:
        return isinstance(read.parse(value, Origin(), flow=True), Seq)
    except ConfigError:
        return False


class Literal(Text):
    """Text from the command line, before `settle` has told its expressions from mere characters."""


def settle(node: Any, known: Callable[[str], bool]) -> Any:
    """The tree with each Literal made Text: `${…}` that names no resolver and no existing key is escaped."""
    if isinstance(node, Map):
        for key, value in node.items():
            node[key] = settle(value, known)
    elif isinstance(node, Seq):
        node[:] = [settle(value, known) for value in node]
    elif isinstance(node, Literal):
        return at(Text(escape_unknown(str(node), known)), node.origin)
    return node


OPENER = re.compile(r"(\\*)(\$[{<])")


def escape_unknown(text: str, known: Callable[[str], bool]) -> str:
    r"""Escapes the `${` and `$<` that `parse` would take for expressions but that name nothing: `${5}` becomes `\${5}`."""
    made, position = "", 0
    while match := OPENER.search(text, position):
        made += text[position:match.start()]
        slashes, opener = match[1], match[2]
        position = match.end()
        if len(slashes) % 2:  # written as a literal already
            made += slashes + opener
            continue
        end = _named(text, match.end() - 2, known)
        if end is None:
            made += expressions.escape(slashes + opener)
        else:
            made += slashes + text[match.end() - 2:end]
            position = end
    return made + text[position:]


def _named(text: str, start: int, known: Callable[[str], bool]) -> int | None:
    """Where the expression that starts here ends, if it is one and names a resolver or an existing key."""
    try:
        expression = expressions.first(text, start)
    except expressions.ExpressionError:
        return None
    name = "".join(piece for piece in expression.name if isinstance(piece, str)).strip()
    if expression.argument is not None:
        return expression.end if name in expressions.RESOLVERS or name.startswith("oc.") else None
    nested = len(expression.name) != 1 or not isinstance(expression.name[0], str)
    return expression.end if nested or known(name) else None

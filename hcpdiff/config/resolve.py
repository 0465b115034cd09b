"""Gives every expression of a tree its value. Interpolations are live: what they see is the merged config."""

import datetime
import difflib
from collections.abc import Callable
from typing import Any

from . import expressions
from .expressions import Expression, ExpressionError, has_expression
from .tree import Map, Node, Seq, Text, Word, at, dotted, scalar

MOST_VALUES = 100_000  # a config has hundreds; interpolations of interpolations of lists reach this at once
DEEPEST = 60  # levels of lists, maps and interpolations


class Broken:
    """Stands for a value whose expression failed; its fault is already in the list."""

    def __repr__(self) -> str:
        return "BROKEN"


BROKEN = Broken()


class Resolver:
    """Values of a merged tree.

    `default(path)` gives the schema's default for a key that the tree lacks (LookupError if it has none). Faults are appended to
    `faults`; `read` collects the top-level keys that an interpolation read.
    """

    def __init__(self, tree: Map, now: datetime.datetime, default: Callable[[tuple], Node], faults: list[str]):
        self.tree, self.now, self.default, self.faults = tree, now, default, faults
        self.read: set[str] = set()
        self.timed: set[str] = set()
        self.values: dict[tuple, Any] = {}
        self.open: list[tuple] = []
        self.budget = MOST_VALUES

    def resolve(self, node: Node, path: tuple) -> Any:
        """The node with every expression below it replaced: Map, Seq, Text, Word, a number, or BROKEN."""
        if path in self.values:
            return self.values[path]
        if len(self.open) > DEEPEST:
            raise ExpressionError(f"is nested more than {DEEPEST} deep")
        if path in self.open:
            cycle = [dotted(part) for part in (*self.open[self.open.index(path):], path)]
            raise ExpressionError(f"is a circle: {' -> '.join(dict.fromkeys(cycle))} -> {cycle[0]}")
        self.open.append(path)
        try:
            self.values[path] = value = self._below(node, path)
        finally:
            self.open.pop()
        return value

    def _below(self, node: Node, path: tuple) -> Any:
        if isinstance(node, Map):
            return at(Map((key, self.guarded(item, (*path, key))) for key, item in node.items()), node.origin)
        if isinstance(node, Seq):
            return at(Seq(self.guarded(item, (*path, index)) for index, item in enumerate(node)), node.origin)
        return self._text(node, path) if isinstance(node, str) and has_expression(node) else node

    def guarded(self, node: Node, path: tuple) -> Any:
        """`resolve`, with a failure noted where it happened and BROKEN in its place."""
        try:
            return self.resolve(node, path)
        except ExpressionError as error:
            self.faults.append(f"{dotted(path)} = {_quoted(node)} ({node.origin}): {error}")
            self.values[path] = BROKEN
            return BROKEN

    def _text(self, text: Text, path: tuple) -> Any:
        pieces = expressions.parse(text)
        values = [piece if isinstance(piece, str) else self.value(piece, path) for piece in pieces]
        if any(value is BROKEN for value in values):
            return BROKEN
        if len(pieces) == 1 and isinstance(pieces[0], Expression):
            return self._placed(values[0], text)
        joined = "".join(map(self._as_text, values))
        if len(joined) > expressions.LONGEST:
            raise ExpressionError(f"grows beyond {expressions.LONGEST} characters")
        return at(Text(joined), text.origin)

    def _placed(self, value: Any, text: Text) -> Any:
        """A value in its new place: scalars take the origin of the text that reads them, maps and lists are counted."""
        self.budget -= _size(value, self.budget)
        if self.budget < 0:
            raise ExpressionError(f"grows beyond {MOST_VALUES} values")
        if not isinstance(value, Text):
            return value
        origin = text.origin if value.origin.layer < 0 else text.origin._replace(via=f"{text} of {value.origin}")
        return at(type(value)(value), origin)

    def _as_text(self, value: Any) -> str:
        if isinstance(value, (Map, Seq)):
            raise ExpressionError(f"puts a {'map' if isinstance(value, Map) else 'list'} into text")
        return str(value)

    def value(self, expression: Expression, path: tuple) -> Any:
        """The value of one expression that stands at `path`."""
        name = self._joined(expression.name, path)
        if name is BROKEN:
            return BROKEN
        name = name.strip()
        if expression.argument is None:
            return self._lookup(name, path)
        if name not in expressions.RESOLVERS:
            refused = "reads what is outside the config and" if name.startswith("oc.") else ""
            raise ExpressionError(f"'{name}' {refused} is not available; there are {', '.join(expressions.RESOLVERS)}".replace("  ", " "))
        argument = self._joined(expression.argument, path, numbers=name == "hcp.eval")
        if argument is BROKEN:
            return BROKEN
        if name == "hcp.time":
            self.timed.update(dotted(open_path) for open_path in self.open)
            return Word(expressions.format_time(argument, self.now))
        return expressions.evaluate(argument) if name == "hcp.eval" else expressions.times(argument)

    def _joined(self, pieces: tuple, path: tuple, numbers: bool = False) -> str | Broken:
        """Pieces as one text; with `numbers`, interpolated ones must be numbers and are put in parentheses."""
        joined = ""
        for piece in pieces:
            if isinstance(piece, str):
                joined += piece
                continue
            value = self.value(piece, path)
            if value is BROKEN:
                return BROKEN
            if numbers:
                number = scalar(value)
                if isinstance(number, bool) or not isinstance(number, (int, float)):
                    raise ExpressionError(f"hcp.eval needs numbers; an interpolation in it gives {_quoted(value)}")
                joined += f"({number!r})"
            else:
                joined += self._as_text(value)
        return joined

    def _lookup(self, name: str, path: tuple) -> Any:
        if not expressions.KEY.match(name):
            raise ExpressionError(f"'{name}' is no name of a key")
        dots = len(name) - len(name.lstrip("."))
        if dots > len(path):
            raise ExpressionError(f"'{name}' goes up beyond the top of the config")
        node: Any = self.tree
        walked: tuple = ()
        done = False  # whether the node came out of an interpolation, so that its text is final
        for part in (*(path[:len(path) - dots] if dots else ()), *key_path(name[dots:])):
            if not done and isinstance(node, str) and has_expression(node):
                node, done = self.guarded(node, walked), True
            if node is BROKEN:
                return BROKEN
            node, walked = self._step(node, walked, part, name)
        if walked:
            self.read.add(walked[0])
        if isinstance(node, (Map, Seq)) and path[:len(walked)] == walked:
            raise ExpressionError(f"is a circle: '{name}' holds this key")
        return node if done else self.guarded(node, walked)

    def _step(self, node: Any, walked: tuple, part: str | int, name: str) -> tuple[Any, tuple]:
        """One part further down, or the schema's default for it."""
        if isinstance(node, Seq) and str(part).isdecimal() and int(part) < len(node):
            return node[int(part)], (*walked, int(part))
        if isinstance(node, Map) and str(part) in node:
            return node[str(part)], (*walked, str(part))
        try:
            return self.default((*walked, part)), (*walked, part)
        except LookupError:
            raise ExpressionError(f"names no key of this config: '{name}'" + near(str(part), node)) from None

    def frozen(self, text: Text, path: tuple) -> Text:
        """The text with its `hcp.time` written out and all else kept."""
        if "hcp.time" not in text:
            return text
        try:
            return at(type(text)(self._freeze(str(text), expressions.parse(text), path)), text.origin)
        except ExpressionError:
            return text

    def _freeze(self, text: str, pieces: list | tuple, path: tuple) -> str:
        for piece in reversed([piece for piece in pieces if isinstance(piece, Expression)]):
            if "hcp.time" in piece.name and piece.argument is not None:
                text = text[:piece.start] + expressions.escape(str(self.value(piece, path))) + text[piece.end:]
            else:
                text = self._freeze(text, (*piece.name, *(piece.argument or ())), path)
        return text


def key_path(name: str) -> tuple:
    """'a.b[0].c' or 'a.b.0.c' -> ('a', 'b', '0' or 0, 'c'); numbers in brackets are int."""
    parts: list = []
    for dotless in name.split("."):
        head, *indices = dotless.split("[")
        parts += [head] if head else []
        parts += [int(index[:-1]) if index[:-1].isdecimal() and index[:-1].isascii() else index[:-1] for index in indices]
    return tuple(parts)


def near(name: str, node: Any) -> str:
    """'. Nearest: a, b' for the keys of a map that look like `name`."""
    found = difflib.get_close_matches(name, [str(key) for key in node], n=3) if isinstance(node, Map) else []
    return f". Nearest: {', '.join(found)}" if found else ""


def _quoted(value: Any) -> str:
    if isinstance(value, (Map, Seq)):
        return "a map" if isinstance(value, Map) else "a list"
    text = str(value)
    return f"'{text[:77]}…'" if len(text) > 80 else f"'{text}'"


def _size(value: Any, limit: int) -> int:
    """Values in a tree, counted up to `limit`."""
    if not isinstance(value, (Map, Seq)):
        return 1
    total = 1
    for item in value.values() if isinstance(value, Map) else value:
        total += _size(item, limit - total)
        if total > limit:
            break
    return total

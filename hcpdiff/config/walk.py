"""The schema as the checks see it: what may stand at a path (`Shape`), and a walk that turns a resolved tree into dataclasses.

The walk collects every fault; it never stops at the first.
"""

import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union

from .field import Key
from .resolve import BROKEN
from .tree import Map, Node, Origin, Seq, Text, Word, at, dotted, plain, scalar, written

MISSING = dataclasses.MISSING
LARGEST_INT = 2**63


class Field(NamedTuple):
    """One key of a schema class."""

    name: str  # in Python
    shape: "Shape"
    required: bool
    default: Any  # a plain value or a function that makes one; MISSING when required


@dataclasses.dataclass(frozen=True)
class Shape:
    """What may stand in one place: the members of its annotation (without None), and the key that holds it."""

    options: tuple = ()
    nullable: bool = False
    key: Key = Key("", "")

    @property
    def free(self) -> bool:
        """Anything goes."""
        return not self.options

    @property
    def literals(self) -> tuple:
        """The words that are allowed by name."""
        return tuple(choice for option in self.options if typing.get_origin(option) is Literal for choice in typing.get_args(option))

    @property
    def holds_list(self) -> bool:
        """A list is (also) allowed."""
        return any(typing.get_origin(option) is list or option is list for option in self.options)

    @property
    def text(self) -> bool:
        """Among scalars only text is allowed here."""
        scalars = [option for option in self.options if option in (str, int, float, bool) or typing.get_origin(option) is Literal]
        return bool(scalars) and all(option is str or typing.get_origin(option) is Literal for option in scalars)

    @property
    def mixed_text(self) -> bool:
        """Any text is allowed, and so is another kind of scalar."""
        return str in self.options and not self.text

    @property
    def record(self) -> type | None:
        """The dataclass that is allowed here."""
        return next((option for option in self.options if dataclasses.is_dataclass(option)), None)

    @property
    def list_item(self) -> "Shape | None":
        """What a list's elements are; None where no list is allowed."""
        item = next((option for option in self.options if typing.get_origin(option) is list or option is list), None)
        return None if item is None else shape_of((typing.get_args(item) or (Any,))[0], self.key)

    @property
    def map_item(self) -> "Shape | None":
        """What the values of a free map are; None where no free map is allowed."""
        item = next((option for option in self.options if typing.get_origin(option) is dict or option is dict), None)
        return None if item is None else shape_of((typing.get_args(item) or (str, Any))[1], self.key)

    def child(self, part: str | int) -> "Shape":
        """What may stand one step further down."""
        if self.list_item is not None and str(part).isdecimal():
            return self.list_item
        if self.record is not None:
            field = fields(self.record).get(self.spelling(str(part)))
            return field.shape if field else ANY
        if self.key.slot and part == "_target_":
            return TEXT
        return self.map_item if self.map_item is not None else ANY

    def at(self, path: tuple) -> "Shape":
        """What may stand at a path below."""
        return functools.reduce(Shape.child, path, self)

    def knows(self, part: str | int) -> bool:
        """Whether this is a declared key here."""
        return self.record is not None and self.spelling(str(part)) in fields(self.record)

    def spelling(self, name: str) -> str:
        """The main spelling of a key that has several."""
        if self.record is None or name in fields(self.record):
            return name
        return next((main for main, field in fields(self.record).items() if name in field.shape.key.aliases), name)

    def expected(self) -> str:
        """What is allowed, in words."""
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        words = [names[option] for option in (bool, int, float, str) if option in self.options and not (option is int and float in self.options)]
        words += [f"one of {', '.join(map(str, self.literals))}"] if self.literals else []
        words += ["a list"] if self.holds_list else []
        words += ["a map"] if self.record or self.map_item is not None else []
        return " or ".join(words + (["null"] if self.nullable else []))


ANY = Shape()
TEXT = Shape((str,))


def shape_of(hint: Any, key: Key = Key("", "")) -> Shape:
    """The shape of an annotation."""
    if hint is Any:
        return dataclasses.replace(ANY, key=key)
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return Shape(tuple(member for member in members if member is not type(None)), type(None) in members, key)


@functools.cache
def fields(cls: type) -> dict[str, Field]:
    """The keys of a schema class by their spelling in YAML."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        key = field.metadata["key"]
        default = field.default if field.default is not MISSING else field.default_factory
        found[key.yaml or field.name] = Field(field.name, shape_of(hints[field.name], key), default is MISSING, default)
    return found


def default_of(field: Field) -> Any:
    """A fresh default value."""
    return field.default() if callable(field.default) else field.default


def default_at(cls: type, path: tuple) -> Node:
    """The default of a key that was not written, as a tree; LookupError when it has none."""
    shape, value = shape_of(cls), MISSING
    for part in path:
        if value is MISSING or shape.record:
            field = fields(shape.record).get(shape.spelling(str(part))) if shape.record else None
            if field is None:
                raise LookupError(part)
            shape, value = field.shape, MISSING if field.required else default_of(field)
        else:
            value = value[int(part) if isinstance(value, list) else part]
    if value is MISSING:
        raise LookupError(path)
    return written(to_plain(value))


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts in YAML's spelling, all else as it is."""
    if dataclasses.is_dataclass(value):
        return {name: to_plain(getattr(value, field.name)) for name, field in fields(type(value)).items()}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list) else value


class Leaf(NamedTuple):
    """A value that further checks look at: its place, its shape, the value and where it was written."""

    path: tuple
    shape: Shape
    value: Any
    origin: Origin


class Walk:
    """Turns a resolved tree into the schema's dataclasses.

    After `record`, `faults` holds what was wrong, `leaves` every scalar and every `_target_` map, `unknown` the free top-level keys.
    `fill(text)` resolves the expressions of a default.
    """

    def __init__(self, fill, faults: list[str]):
        self.fill, self.faults = fill, faults
        self.leaves: list[Leaf] = []
        self.unknown: list[str] = []

    def record(self, cls: type, node: Map, path: tuple = ()) -> Any:
        """An instance of `cls`, or BROKEN when something below is wrong."""
        known, values = fields(cls), {}
        for name in node:
            if name not in known and not self._ignored(cls, name, node, path):
                self._unknown(cls, name, node, path)
        for name, field in known.items():
            here = (*path, name)
            if name in node:
                values[field.name] = self.value(node[name], field.shape, here)
            elif not field.required:
                default = default_of(field)
                values[field.name] = self.fill(default, here) if isinstance(default, str) else default
            elif field.shape.record:
                values[field.name] = self.record(field.shape.record, at(Map(), node.origin), here)
            else:
                self.faults.append(f"{dotted(here)} is missing ({field.shape.key.doc.rstrip('.')})")
                values[field.name] = BROKEN
        if any(value is BROKEN for value in values.values()):
            return BROKEN
        made = cls(**values)
        for fault in made.check() if hasattr(made, "check") else ():
            self.faults.append(f"{dotted(path)}{'.' if path else ''}{fault}")
        return made

    def _ignored(self, cls: type, name: str, node: Map, path: tuple) -> bool:
        """The ancestor's `_target_` in places whose class is settled now."""
        targets = getattr(cls, "TARGETS", ())
        if name == "_target_" and targets:
            if str(node[name]) not in targets:
                self.fault((*path, name), node[name], f"is not of use here: leave it out, or write {targets[0]}")
            return True
        return name == "_partial_" and bool(targets)

    def _unknown(self, cls: type, name: str, node: Map, path: tuple) -> None:
        removed = getattr(cls, "REMOVED", {}).get(name)
        origin = origin_of(node[name])
        if removed:
            self.faults.append(f"{dotted((*path, name))} ({origin}) {removed}")
        elif path:
            self.faults.append(f"{dotted((*path, name))} ({origin}) is not a known key{self.hint(cls, name)}")
        else:
            self.unknown.append(name)

    @staticmethod
    def hint(cls: type, name: str) -> str:
        """What an unknown key may have meant."""
        if "." in name:
            return ". Dots join keys on the command line only; in YAML write them nested"
        names = {alias: main for main, field in fields(cls).items() for alias in (main, *field.shape.key.aliases)}
        near = list(dict.fromkeys(names[found] for found in difflib.get_close_matches(name, names, n=3)))
        if near:
            return f". Nearest: {', '.join(near)}"
        return f". Known here: {', '.join(fields(cls))}"

    def value(self, node: Any, shape: Shape, path: tuple) -> Any:
        """The value of one place as its shape wants it, or BROKEN."""
        if node is BROKEN:
            return BROKEN
        if shape.free:
            return plain(node)
        if isinstance(node, Seq) and shape.list_item is not None:
            items = [self.value(item, shape.list_item, (*path, index)) for index, item in enumerate(node)]
            return BROKEN if any(item is BROKEN for item in items) else items
        if isinstance(node, Map):
            return self._map(node, shape, path)
        if isinstance(node, Seq):
            return self.fault(path, node, f"is a list; {shape.expected()} is expected")
        return self._scalar(node, shape, path)

    def _map(self, node: Map, shape: Shape, path: tuple) -> Any:
        if shape.record:
            return self.record(shape.record, node, path)
        item = shape.map_item
        if item is None:
            return self.fault(path, node, f"is a map; {shape.expected()} is expected")
        values = {str(key): self.value(value, item, (*path, key)) for key, value in node.items()}
        if any(value is BROKEN for value in values.values()) or _broken(node):
            return BROKEN
        if item.free and shape.key.slot:
            self.leaves.append(Leaf(path, shape, values, origin_of(node)))
        return values

    def _scalar(self, node: Any, shape: Shape, path: tuple) -> Any:
        value = scalar(node)
        if value is None:
            return None if shape.nullable else self.fault(path, node, f"must not be empty or null; {shape.expected()} is expected")
        made = _typed(node, value, shape)
        if made is MISSING:
            return self.fault(path, node, self._wrong_type(node, value, shape))
        outside = _outside(made, shape.key)
        if outside:
            return self.fault(path, node, outside)
        self.leaves.append(Leaf(path, shape, made, origin_of(node)))
        return made

    def _wrong_type(self, node: Any, value: Any, shape: Shape) -> str:
        if isinstance(node, Text) and not isinstance(node, Word) and not isinstance(scalar(Word(node)), str) and node:
            return f"is text, being in quotes; {shape.expected()} is expected"
        near = difflib.get_close_matches(str(node), [str(choice) for choice in shape.literals], n=1)
        return f"is not allowed; {shape.expected()} is expected" + (f". Nearest: {near[0]}" if near else "")

    def fault(self, path: tuple, node: Any, text: str) -> Any:
        """Notes a fault of one value; gives BROKEN."""
        shown = "" if isinstance(node, (Map, Seq)) else f" = {shown_value(node)}"
        self.faults.append(f"{dotted(path)}{shown} ({origin_of(node)}) {text}")
        return BROKEN


def origin_of(node: Any) -> Origin:
    """Where a node was written; computed numbers have no place of their own."""
    return getattr(node, "origin", Origin())


def shown_value(node: Any) -> str:
    """A value as an error shows it."""
    text = str(node)
    text = f"{text[:77]}…" if len(text) > 80 else text
    return f"'{text}'" if isinstance(node, str) and not (isinstance(node, Word) and not isinstance(scalar(node), str) and node) else text


def _broken(node: Any) -> bool:
    """Whether something below could not be evaluated."""
    items: Iterator = iter(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
    return node is BROKEN or any(_broken(item) for item in items)


def _typed(node: Any, value: Any, shape: Shape) -> Any:
    """The scalar as one of the shape's options; MISSING when it is none."""
    options = shape.options
    if isinstance(node, str) and str(node) in shape.literals:
        return str(node)
    if isinstance(value, bool):
        return value if bool in options else str(node) if str in options and isinstance(node, str) else MISSING
    if isinstance(value, int) and abs(value) < LARGEST_INT and (int in options or float in options):
        return value if int in options else float(value)
    if isinstance(value, float) and math.isfinite(value) and (float in options or int in options and value.is_integer() and abs(value) < LARGEST_INT):
        return value if float in options else int(value)
    return str(node) if str in options else MISSING


def _outside(value: Any, key: Key) -> str:
    """Why a number is out of its key's range; '' when it is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"is not one of {', '.join(map(str, key.choices))}" if key.choices and value not in key.choices else ""
    tests = ((key.ge, operator.ge, "at least"), (key.gt, operator.gt, "above"), (key.le, operator.le, "at most"), (key.lt, operator.lt, "below"))
    broken = [f"{word} {limit:.15g}" for limit, holds, word in tests if limit is not None and not holds(value, limit)]
    unit = f" ({key.unit})" if key.unit else ""
    return f"must be {' and '.join(broken)}{unit}" if broken else ""

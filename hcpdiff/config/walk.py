"""A walk over a resolved tree that turns it into the schema's dataclasses and collects every fault; it never stops at the first."""

import difflib
import math
import operator
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from .field import Key, not_multiple
from .places import elsewhere
from .resolve import BROKEN
from .shape import MISSING, Shape, default_of, fields
from .tree import Map, Origin, Seq, Text, Word, at, dotted, plain, scalar

LARGEST_INT = 2**63


class Leaf(NamedTuple):
    """A value that further checks look at: its place, its shape, the value and where it was written."""

    path: tuple
    shape: Shape
    value: Any
    origin: Origin


class Walk:
    """Turns a resolved tree into the schema's dataclasses.

    After `record`, `faults` holds what was wrong, `leaves` every scalar and every `_target_` map, `unknown` the free top-level keys,
    `whole` every dataclass in which nothing was wrong, by its path.
    `fill(text)` resolves the expressions of a default.
    """

    def __init__(self, fill, faults: list[str]):
        self.fill, self.faults = fill, faults
        self.leaves: list[Leaf] = []
        self.unknown: list[str] = []
        self.whole: dict[tuple, Any] = {}
        self.root: type | None = None  # the class of the whole tree

    def record(self, cls: type, node: Map, path: tuple = ()) -> Any:
        """An instance of `cls`, or BROKEN when something below is wrong."""
        self.root = self.root or cls
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
            self._check_apart(cls, values, path)
            return BROKEN
        self.whole[path] = made = cls(**values)
        self._check(made, path)
        return made

    def _check(self, made: Any, path: tuple) -> None:
        for fault in made.check() if hasattr(made, "check") else ():
            self.faults.append(f"{dotted(path)}{'.' if path else ''}{fault}")

    def _check_apart(self, cls: type, values: dict[str, Any], path: tuple) -> None:
        """The check of the keys that are well where others are not, for a class whose check looks at each key alone (`APART`)."""
        if getattr(cls, "APART", False):
            defaults = {field.name: default_of(field) for field in fields(cls).values()}
            self._check(cls(**{name: defaults[name] if value is BROKEN else value for name, value in values.items()}), path)

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
            self.faults.append(f"{dotted((*path, name))} ({origin}) is not a known key{elsewhere(self.root, name) or self.hint(cls, name)}")
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
        values = {str(key): self._entry(value, item, (*path, key)) for key, value in node.items()}
        if any(value is BROKEN for value in values.values()) or _broken(node):
            return BROKEN
        if item.free and shape.key.slot:
            self.leaves.append(Leaf(path, shape, values, origin_of(node)))
        return values

    def _entry(self, node: Any, shape: Shape, path: tuple) -> Any:
        """One value of a free map; text that is null would be the word 'null' in what is made of it."""
        if shape.text and not shape.nullable and isinstance(node, str) and scalar(node) is None:
            return self.fault(path, node, "is no text: write a word, or leave the entry out (on the command line '---' as the value deletes one)")
        return self.value(node, shape, path)

    def _scalar(self, node: Any, shape: Shape, path: tuple) -> Any:
        value = scalar(node)
        if value is None:
            empty = " ([] is an empty one)" if shape.holds_list else ""
            return None if shape.nullable else self.fault(path, node, f"must not be empty or null; {shape.expected()} is expected{empty}")
        made = _typed(node, value, shape)
        if made is MISSING:
            return self.fault(path, node, self._wrong_type(node, value, shape))
        outside = _outside(made, shape.key)
        if outside:
            return self.fault(path, node, outside)
        if isinstance(made, str) and (shape.key.path or shape.key.exists):
            made = os.path.expanduser(made)
        self.leaves.append(Leaf(path, shape, made, origin_of(node)))
        return made

    def _wrong_type(self, node: Any, value: Any, shape: Shape) -> str:
        if not shape.text and isinstance(node, Text) and not isinstance(node, Word) and not isinstance(scalar(Word(node)), str) and node:
            return f"is text, being in quotes; {shape.expected()} is expected"
        said, choices = str(node).lower(), [str(choice) for choice in shape.literals]
        near = [meant for word, meant in shape.key.meant if word == said] or difflib.get_close_matches(said, choices, n=1)
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
    return f"must be {' and '.join(broken)}{unit}" if broken else not_multiple(value, key.multiple) if key.multiple else ""

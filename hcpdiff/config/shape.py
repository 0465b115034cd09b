"""The schema as the checks see it: what may stand at a path of the config."""

import dataclasses
import functools
import types
import typing
from typing import Any, Literal, NamedTuple, Union

from .field import Key
from .tree import Node, written

MISSING = dataclasses.MISSING


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
        words += ["true or false"] if getattr(self.record, "SHORT", None) else []
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
            value = _inner_value(value, part)
    if value is MISSING:
        raise LookupError(path)
    return written(to_plain(value))


def _inner_value(value: Any, part: str | int) -> Any:
    """One step into a plain default; LookupError where there is none."""
    if isinstance(value, dict) and part in value:
        return value[part]
    if isinstance(value, list) and str(part).isdecimal() and int(part) < len(value):
        return value[int(part)]
    raise LookupError(part)


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts in YAML's spelling, all else as it is."""
    if dataclasses.is_dataclass(value):
        return {name: to_plain(getattr(value, field.name)) for name, field in fields(type(value)).items()}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list) else value

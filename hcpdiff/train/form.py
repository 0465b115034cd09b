"""The form of a saved state: what a stranger's or a damaged one has otherwise is found by its place, before anything of it is used. Needs no torch."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

Form = Callable[[Any], list[str]]  # the places in a value that are missing or otherwise, '' for the value itself

_DEEPEST = 64  # lists and mappings inside each other


def one(test: Callable[[Any], bool]) -> Form:
    """A value that passes a test."""
    return lambda value: [] if test(value) else [""]


def record(*optional: str, **parts: Form) -> Form:
    """A mapping that has these keys, and may have others."""
    def odd(value: Any) -> list[str]:
        if not isinstance(value, Mapping):
            return [""]
        return [place for name, part in parts.items() if name in value or name not in optional for place in (_below(name, part(value[name])) if name in value else [name])]

    return odd


def every(part: Form, key: Callable[[str], bool] = lambda key: True) -> Form:
    """A mapping from text to values of one form."""
    def odd(value: Any) -> list[str]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) and key(name) for name in value):
            return [""]
        return [place for name, item in value.items() for place in _below(name, part(item))]

    return odd


def rows(part: Form, least: int = 0, most: int = sys.maxsize) -> Form:
    """A list of so many values of one form."""
    def odd(value: Any) -> list[str]:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            return [""]
        return [place for number, item in enumerate(value) for place in _below(str(number), part(item))]

    return odd


def _below(name: str, places: list[str]) -> list[str]:
    return [f"{name}.{place}" if place else name for place in places]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, Mapping)):
        items = value.values() if isinstance(value, Mapping) else value
        return depth < _DEEPEST and (isinstance(value, list) or all(isinstance(key, str) for key in value)) and all(_is_plain(item, depth + 1) for item in items)
    return value is None or isinstance(value, (bool, int, float, str))


count, number, text = one(_is_count), one(is_number), one(lambda value: isinstance(value, str))
mapping, plain = one(lambda value: isinstance(value, Mapping)), one(_is_plain)
config = one(lambda value: isinstance(value, Mapping) and _is_plain(value))
positions = rows(rows(count, 2, 2), 1)

HEAD = record(step=count, positions=positions, run=record(world=count, accumulation=count, config=config))  # what is looked at before the tensors are read

"""How a config key is declared: type, default, meaning in two languages, and what values are allowed."""

import dataclasses
from typing import Any

REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Key:
    """What a schema field says beyond its annotation.

    ge / gt / le / lt bound numbers; `multiple` is what a number must be a multiple of; `choices` lists the allowed values; `slot` names what a `_target_` mapping in this place must
    build (see `config.build`); `path` marks text that names a file or folder, `exists` that it must be there: 'file', 'folder', 'either', 'model' (a
    folder or hub id), 'carried' (a file in one of the three places of `config.read.places`); `words` are texts that name no path; `yaml` is the key's spelling in YAML where Python
    cannot spell it (`_target_`); `aliases` are other spellings that mean the same, `meant` pairs of
    a value that is not allowed (in small letters) and the allowed one that it may mean.
    """

    doc: str
    zh: str
    unit: str | None = None
    choices: tuple | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple: int | None = None
    slot: str | None = None
    path: bool = False
    exists: str | None = None
    words: tuple[str, ...] = ()
    yaml: str | None = None
    aliases: tuple[str, ...] = ()
    meant: tuple[tuple[str, str], ...] = ()


def not_multiple(value: float, step: int) -> str:
    """Why a number is no multiple of `step`, with the nearest that are; '' when it is one."""
    low = int(value // step * step)
    return f"must be a multiple of {step}: {f'{low} or ' if low else ''}{low + step}" if value % step else ""


def key(default: Any = REQUIRED, doc: str = "", zh: str = "", **extra) -> Any:
    """A dataclass field that is a config key. Mutable defaults (list, dict, a dataclass type) are copied per instance."""
    metadata = {"key": Key(doc, zh, **extra)}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata, kw_only=True)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata, kw_only=True)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)

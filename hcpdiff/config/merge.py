"""Joins trees: files in the order of their `_base_`, each over those before it."""

import difflib
from pathlib import Path

from ..errors import ConfigError
from . import read
from .resolve import near
from .tree import DELETE, Map, Node, Origin, Seq, Text, at, copy

BASE = "_base_"


class Idle(tuple):
    """(path, origin, hint) of a '---' that found nothing to delete."""


def merge(below: Node, above: Node, path: tuple, idle: list[Idle]) -> Node:
    """`above` over `below`: maps deep, all else replaced, '---' deletes. Neither tree is changed."""
    if not isinstance(above, Map):
        return copy(above)
    made = copy(below) if isinstance(below, Map) else Map()
    for key, value in above.items():
        if isinstance(value, str) and value == DELETE:
            if key not in made:
                idle.append(Idle(((*path, key), value.origin, near(key, made))))
            made.pop(key, None)
        else:
            made[key] = merge(made.get(key), value, (*path, key), idle)
    return at(made, above.origin)


class Layers:
    """The files of a config in the order of merging: `files` (as found) and `trees`. Faults of all files are collected."""

    def __init__(self, faults: list[str]):
        self.files: list[Path] = []
        self.trees: list[Map] = []
        self.faults = faults
        self.read: dict[Path, Map | None] = {}

    def add(self, name: str, named_by: Path | None = None, origin: Origin | None = None, stack: tuple[Path, ...] = ()) -> None:
        """Reads a file and, before it, its bases."""
        path = read.find(name, named_by)
        if path is None:
            self.faults.append(_missing(name, named_by, origin))
            return
        real = path.resolve()
        if real in stack:
            circle = [*stack[stack.index(real):], real]
            self.faults.append(f"{BASE} goes in a circle: {' -> '.join(map(_short, circle))}")
            return
        tree = self._tree(path, real)
        if tree is None:
            return
        for base in self._bases(tree):
            self.add(str(base), path, base.origin, (*stack, real))
        tree = Map((key, value) for key, value in tree.items() if key != BASE)
        self.files.append(path)
        self.trees.append(_at_layer(tree, len(self.trees), path))

    def _tree(self, path: Path, real: Path) -> Map | None:
        """The file's tree; a file that several name is read (and complained about) once."""
        if real not in self.read:
            try:
                self.read[real] = read.read(path, 0)
            except ConfigError as error:
                self.faults += error.faults
                self.read[real] = None
        return self.read[real]

    def _bases(self, tree: Map) -> list[Text]:
        named = tree.get(BASE, Seq())
        listed = named if isinstance(named, Seq) else [named]
        if isinstance(named, Text) and named in ("", "null", "~"):
            return []
        if not all(isinstance(base, Text) and base for base in listed):
            self.faults.append(f"{BASE} ({named.origin}) takes the path of a file, or a list of them")
            return []
        return list(listed)


def _at_layer(node: Node, layer: int, path: Path) -> Node:
    """A copy of the tree whose origins tell this layer."""
    origin = Origin(layer, path, node.origin.line)
    if isinstance(node, Map):
        return at(Map((key, _at_layer(value, layer, path)) for key, value in node.items()), origin)
    return at(Seq(_at_layer(value, layer, path) for value in node) if isinstance(node, Seq) else type(node)(node), origin)


def _missing(name: str, named_by: Path | None, origin: Origin | None) -> str:
    looked = ", ".join(dict.fromkeys(str(place.parent) for place in read.places(name, named_by)))
    wanted = f"{BASE}: '{name}' ({origin})" if origin else f"--cfg: '{name}'"
    found = _near_configs(name, named_by)
    return f"{wanted} is not there. Looked in {looked}" + (f". Nearest: {', '.join(found)}" if found else "")


def _near_configs(name: str, named_by: Path | None) -> list[str]:
    """Configs that the name may have meant, spelt as `places` would find them: beside the file, in the folder that is named, among the installed cfgs/."""
    asked = name.removeprefix("./")
    folder = Path(asked).parent.as_posix()
    known: list[str] = []
    for place in read.places(asked, named_by):
        if place.parent.is_dir() and "\0" not in asked:
            known += [path.name if folder == "." else f"{folder}/{path.name}" for path in sorted(place.parent.glob("*.y*ml"))]
    root = read.places("cfgs", None)[1].parent
    known += [path.relative_to(root).as_posix() for path in sorted((root / "cfgs").rglob("*.y*ml"))]
    near = difflib.get_close_matches(asked, known, n=2, cutoff=0.7)
    return list(dict.fromkeys([*(path for path in known if Path(path).name == Path(asked).name), *near]))[:2]


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

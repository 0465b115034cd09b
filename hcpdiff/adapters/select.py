"""Which layers a group of patterns names."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import LayerMatchError

ADAPTABLE = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Selection:
    """What one group claims: layer paths in model order, and those that each pattern brought (less those excluded)."""

    paths: tuple[str, ...]
    by_pattern: dict[str, frozenset[str]]

    @property
    def per_pattern(self) -> dict[str, int]:
        """How many layers each pattern brought."""
        return {pattern: len(paths) for pattern, paths in self.by_pattern.items()}

    def below(self, prefix: str) -> "Selection":
        """The part of it whose paths begin with `prefix`, without it."""
        own = tuple(path.removeprefix(prefix) for path in self.paths if path.startswith(prefix))
        return Selection(own, {pattern: frozenset(path.removeprefix(prefix) for path in paths if path.startswith(prefix)) for pattern, paths in self.by_pattern.items()})


def select(model: nn.Module, groups: Sequence[Mapping | object], where: str, aliases: Callable[[str], Sequence[str]] = lambda path: (path,),
           prefixes: Sequence[str] = ()) -> list[Selection]:
    """One Selection per group; every Linear and Conv2d at or inside a match of `layers`, less `exclude`.

    `where` is the config key (`lora_unet`). `aliases(path)` gives the names under which a module may be named; one without a name is none of those that a pattern
    can mean; `prefixes` are those by which parts of the model are told apart, for the message. Patterns that match nothing,
    broken expressions and layers that two groups claim are all reported in one LayerMatchError.
    """
    names = {path: known for path, _ in model.named_modules() if path and (known := aliases(path))}
    leaves = [path for path, module in model.named_modules() if path and isinstance(module, ADAPTABLE)]
    faults: list[str] = []
    selections = []
    for index, group in enumerate(groups):
        key = f"{where}[{index}]"
        counts = {pattern: _matches(pattern, names, leaves, f"{key}.layers[{i}]", faults, prefixes) for i, pattern in enumerate(group.layers)}
        dropped = {path for i, pattern in enumerate(group.exclude) for path in _matches(pattern, names, leaves, f"{key}.exclude[{i}]", faults, prefixes)}
        wanted = set().union(*counts.values()) - dropped if counts else set()
        if counts and not wanted and not faults:
            faults.append(f"{key}: exclude leaves none of the {len(set().union(*counts.values()))} layers that layers names.")
        selections.append(Selection(tuple(path for path in leaves if path in wanted), {p: frozenset(c - dropped) for p, c in counts.items()}))
    faults += _overlaps(selections, where)
    if faults:
        raise LayerMatchError(faults)
    return selections


def _matches(pattern: str, names: Mapping[str, Sequence[str]], leaves: Sequence[str], key: str, faults: list[str], prefixes: Sequence[str]) -> set[str]:
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            faults.append(f"{key} = {pattern!r} is not a regular expression: {error}.")
            return set()
        matched = {path for path, known in names.items() if any(expression.match(name) for name in known)}
    else:
        matched = {path for path, known in names.items() if pattern in known}
    found = {leaf for leaf in leaves if any(leaf == path or leaf.startswith(path + ".") for path in _ancestors(leaf, matched))}
    if not found:
        faults.append(_nothing(pattern, names, leaves, matched, key) + ('' if matched else _advice(pattern, names, prefixes)))
    return found


def _ancestors(leaf: str, matched: set[str]) -> list[str]:
    parts = leaf.split(".")
    return [path for path in (".".join(parts[: i + 1]) for i in range(len(parts))) if path in matched]


def _nothing(pattern: str, names: Mapping[str, Sequence[str]], leaves: Sequence[str], matched: set[str], key: str) -> str:
    if matched:
        return f"{key} = {pattern!r} matched {len(matched)} modules, but no Linear or Conv2d is at or inside them."
    spelled = [name for known in names.values() for name in known]
    needle = re.sub(r"\\(.)|[\^$*+?()\[\]|]", r"\1", pattern.removeprefix("re:")).strip(".")
    near = difflib.get_close_matches(needle, spelled, n=3, cutoff=0.3)
    tails = sorted({name.rsplit(".", 1)[-1] for name in spelled} - {""})
    near_tails = difflib.get_close_matches(needle.rsplit(".", 1)[-1], [tail for tail in tails if not tail.isdigit()], n=4, cutoff=0.5)
    hint = ", ".join([f"…{tail}" for tail in near_tails] or near)
    return f"{key} = {pattern!r} matched none of {len(names)} modules ({len(leaves)} Linear and Conv2d). Nearest: {hint or 'none'}."


def _advice(pattern: str, names: Mapping[str, Sequence[str]], prefixes: Sequence[str]) -> str:
    """What is wrong with the form of a pattern: an expression without re:, a prefix that there is not."""
    advice = ""
    if not pattern.startswith("re:") and re.search(r"[\\^$*+?()\[\]|]", pattern):
        advice += f" Without re: a pattern is an exact name; as a regular expression it is 're:{pattern}'."
    first = re.match(r"([A-Za-z_]+\d+)(\\?\.|$)", pattern.removeprefix("re:"))
    if first and first[1] not in {name.split(".")[0] for known in names.values() for name in known}:
        there = f"the prefixes here are {' and '.join(f'{prefix}.' for prefix in prefixes)}" if prefixes else "this part of the model has no prefixes."
        advice += f" No module's name begins with {first[1]}; {there}"
    return advice


def _overlaps(selections: Sequence[Selection], where: str) -> list[str]:
    owner: dict[str, int] = {}
    clashes: dict[tuple[int, int], list[str]] = {}
    for index, selection in enumerate(selections):
        for path in selection.paths:
            if owner.setdefault(path, index) != index:
                clashes.setdefault((owner[path], index), []).append(path)
    return [
        f"{where}[{a}] and {where}[{b}] both claim {len(paths)} layers ({', '.join(paths[:3])}{', …' if len(paths) > 3 else ''}); "
        f"a layer belongs to one group: narrow layers or add exclude."
        for (a, b), paths in clashes.items()
    ]

"""The start of a run in tables: versions and machine, what is trained, how long."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from .. import __version__

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Version of hcpdiff, Python and the packages whose change may change a run."""
    return {"hcpdiff": __version__, "python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """A two-column table."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))  # brackets in a path or pattern are no markup
    return table


def layers_table(trainables: Sequence) -> Table:
    """What each pattern of each LoRA group matched."""
    table = Table(title="LoRA layers", title_justify="left")
    for column, justify in (("group", "left"), ("pattern", "left"), ("layers", "right"), ("rank", "right"), ("alpha", "right"), ("lr", "right"), ("parameters", "right")):
        table.add_column(column, justify=justify)
    for trainable in trainables:
        for group, pattern, layers, rank, alpha, lr, parameters in trainable.rows():
            table.add_row(*map(Text, (group, pattern, str(layers), rank, alpha, f"{lr:g}", parameters)))
    return table

"""A LoRA of a lower rank that changes the weights as nearly as possible as before."""

import argparse

import torch

from ..checkpoint.convert import Layers, with_word
from ..checkpoint.metadata import carried
from ..lora_tensors import LoraTensors
from . import output
from .algebra import Limit, truncated

TOOL = "lora_resize"


def run(args: argparse.Namespace, sources: list, lines: list[str]) -> int:
    """Resizes the one LoRA of `sources` as `args` say; 0."""
    out = output.console()
    (lora,) = output.load_all(sources, out)
    for line in lines:
        out.print(line)
    path = output.target(args, (path for path, _ in lora.files), TOOL)
    found = with_word(lora.family(args.family), output.said(args))
    out.print(f"family: {found}")
    limit = Limit(args.rank, args.energy)
    result = {component: {layer: resized(tensors, limit) for layer, tensors in named.items()} for component, named in lora.layers.items()}
    kept, dropped = carried(lora.metadata, args.keep_metadata)
    if dropped:
        out.print(f"metadata left out (--keep_metadata keeps it): {', '.join(sorted(dropped))}")
    made = {"files": [source.name for source, _ in lora.files], "rank": args.rank, "energy": args.energy}
    written = output.write(path, result, found, args, tool=TOOL, dtype=_dtype(lora.layers), kept=kept, made_from=made)
    output.say_losses(out, output.losses(lora.layers, written))
    before = sum(source.stat().st_size for source, _ in lora.files)
    out.print(f"{before / 2**20:.2f} MiB before, {path.stat().st_size / 2**20:.2f} MiB now")
    output.say_written(out, path, written)
    return 0


def resized(lora: LoraTensors, limit: Limit) -> LoraTensors:
    """The nearest LoRA within `limit`; the very same where nothing has to go."""
    smaller = truncated(lora, limit)
    return smaller if smaller.rank < lora.rank else lora


def _dtype(layers: Layers) -> torch.dtype | None:
    """The type of all factors, where it is one: a LoRA stays as small as it was."""
    dtypes = {factor.dtype for named in layers.values() for lora in named.values() for factor in (lora.down, lora.up)}
    return dtypes.pop() if len(dtypes) == 1 else None

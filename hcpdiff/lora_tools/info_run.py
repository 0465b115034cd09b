"""`lora_info` on the console: tables for readers, JSON for programs."""

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping

from rich.table import Table

from .. import cli
from ..checkpoint.metadata import PICTURES
from ..errors import CheckpointError, HCPError
from . import output
from .base_model import no_model, open_model
from .info import Info, groups, look

_LONG = 200  # characters of a metadata value that are shown unless all is asked for
_FIRST = ("ss_output_name", "modelspec.title", "ss_base_model_version", "ss_sd_model_name", "modelspec.architecture", "ss_network_module", "ss_network_dim",
          "ss_network_alpha", "ss_steps", "ss_num_epochs", "ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_resolution", "ss_clip_skip")


def run(args: argparse.Namespace, sources: list) -> int:
    """Shows every file; CheckpointError at the end with all that is wrong."""
    out = output.console()
    model = open_model(args.base_model, "--base_model") if args.base_model else None
    infos: list[list[Info]] = []
    faults = no_model(model) if model else []
    model = None if faults else model  # what the LoRA are is shown all the same
    for _, paths in sources:
        infos.append([])
        for path in paths:
            try:
                infos[-1].append(look(path, model))
            except HCPError as error:
                faults += error.faults
    flat = [info for step in infos for info in step]
    if args.json:
        print(json.dumps([json.loads(info.as_json()) for info in flat], ensure_ascii=False, indent=2))
    else:
        for step in infos:
            show(step, out, args)
        for (name, _), step in zip(sources, infos, strict=True):
            if model and step and all(info.fits for info in step):
                out.print(f"{f'{name} ' if len(infos) > 1 else ''}fits {model.path.name}: each of the {sum(len(info.layers) for info in step)} layers has its place and its shape there")
    faults += [fault if fault.startswith(info.path) else f"{info.path}: {fault}" for info in flat for fault in info.faults]
    if faults:
        raise CheckpointError(faults)
    return 0


def show(step: list[Info], out, args: argparse.Namespace) -> None:
    """A page for each file of a step, and the metadata that all of them have once."""
    common = dict(set.intersection(*(set(info.metadata.items()) for info in step))) if len(step) > 1 else {}
    for info in step:
        _show(info, out, args)
        own = {key: value for key, value in info.metadata.items() if key not in common}
        if own or not common:
            _show_metadata(own, out, args)
        for warning in info.warnings:
            out.print(f"warning: {warning}")
    if common:
        _show_metadata(common, out, args, f"metadata of all {len(step)} files")


def _show_metadata(metadata: Mapping[str, str], out, args: argparse.Namespace, title: str = "metadata") -> None:
    for line in metadata_lines(metadata, args.all_metadata, title):
        out.print(cli.CONTROL.sub(lambda found: repr(found[0])[1:-1], line))


def _show(info: Info, out, args: argparse.Namespace) -> None:
    out.print(f"{info.path}: {info.bytes / 2**20:.2f} MiB, {info.tensors} tensors ({', '.join(f'{count} {name}' for name, count in info.dtypes.items())})")
    out.print(f"AutoV2 {info.hashes['AutoV2']}, AutoV3 {info.hashes['AutoV3']}")
    if info.spelling:
        out.print(f"spelling: {info.spelling}")
    if info.family:
        out.print(f"family: {info.family}{f' ({info.version})' if info.version else ''}, {info.family_from}")
    if info.layers:
        out.print(parts_table(info))
    if args.layers:
        out.print("\n".join(layer_lines(info)))


def parts_table(info: Info) -> Table:
    """A row per component: how many layers, and convolutions of them; ranks, alphas, scales (alpha / rank); the norm of all deltas and the largest one."""
    table = Table("part", "layers", "1x1", "3x3", "rank", "alpha", "scale", "norm", "max")
    table.columns[0].no_wrap, table.columns[0].min_width = True, max(map(len, groups(info)))
    for component, layers in groups(info).items():
        kinds = Counter(layer.kind for layer in layers)
        alphas = [layer.alpha for layer in layers if layer.alpha is not None]
        scales = [layer.alpha / layer.rank for layer in layers if layer.alpha is not None and layer.rank]
        norms = [layer.norm for layer in layers if layer.norm is not None]
        table.add_row(component, str(len(layers)), *(str(kinds.get(kind, 0)) for kind in ("1x1", "3x3")), output.span([layer.rank for layer in layers]),
                      output.span(alphas), output.span(scales), f"{math.hypot(*norms):.4g}" if norms else "-", f"{max(norms):.3g}" if norms else "-")
    return table


def layer_lines(info: Info) -> list[str]:
    """A line per layer: kind, rank, alpha, norm, name. No table, since names are longer than a console is wide and readers search in them."""
    lines = [f"{'kind':>6} {'rank':>5} {'alpha':>9} {'norm':>9}  layer"]
    for layer in info.layers:
        alpha, size = (f"{value:.4g}" if value is not None else "-" for value in (layer.alpha, layer.norm))
        lines.append(f"{layer.kind:>6} {layer.rank:>5} {alpha:>9} {size:>9}  {layer.component} {layer.path}")
    return lines


def metadata_lines(metadata: Mapping[str, str], whole: bool, title: str = "metadata") -> list[str]:
    """The header's entries, the ones that readers look for first; long ones and pictures shortened unless `whole`; the commonest tags of a tag count."""
    if not metadata:
        return [f"{title}: none"]
    order = sorted(metadata, key=lambda key: (_FIRST.index(key) if key in _FIRST else len(_FIRST), key))
    lines = [f"{title}:"]
    for key in order:
        value = metadata[key]
        if key == "ss_tag_frequency" and not whole:
            value = _tags(value)
        if len(value) > _LONG and not whole:
            picture = key.startswith(PICTURES) or value.startswith("data:image/")
            value = f"(picture, {len(value) * 3 / 4000:.1f} kB)" if picture else f"{value[:_LONG]} … ({len(value)} characters; --all_metadata shows them)"
        lines.append(f"  {key}: {value}")
    return lines


def _tags(value: str, most: int = 12) -> str:
    """`{"5_cat": {"cat": 10}}` -> `cat 10`, over all folders."""
    try:
        counts: Counter[str] = Counter()
        for tags in json.loads(value).values():
            counts.update({str(tag): int(count) for tag, count in tags.items()})
    except (ValueError, AttributeError, TypeError, RecursionError):
        return value
    return ", ".join(f"{tag} {count}" for tag, count in counts.most_common(most)) + (f" and {len(counts) - most} more" if len(counts) > most else "")

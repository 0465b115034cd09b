"""Several LoRA into one: side by side, which is exact, or cut to a rank, with what that loses."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from ..checkpoint.convert import Found, Layers, with_word
from ..checkpoint.export import payload_hash
from ..checkpoint.format import META_BASE_MODEL, META_BASE_VERSION
from ..checkpoint.metadata import META_PREDICTION
from ..errors import CheckpointError
from ..lora_tensors import LoraTensors
from . import output
from .algebra import Limit, concatenated, truncated
from .output import Loaded

TOOL = "lora_merge"
_OF_THE_BASE = (META_BASE_VERSION, META_BASE_MODEL, META_PREDICTION, "ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "modelspec.prediction_type")


@dataclass(frozen=True)
class Weighted:
    """A LoRA and how strongly it counts: its denoiser, its text encoders."""

    lora: Loaded
    weight: float
    weight_text: float

    def of(self, component: str) -> float:
        """The weight of a component."""
        return self.weight if component == "unet" else self.weight_text


def weighted(loaded: Sequence[Loaded], weights: Sequence[float], weights_text: Sequence[float]) -> list[Weighted]:
    """Weights as the command line gives them: one for each LoRA, one for all, or none (1). Text encoders take the denoiser's unless they have their own."""
    unet = _spread(weights, len(loaded)) or [1.0] * len(loaded)
    return [Weighted(*row) for row in zip(loaded, unet, _spread(weights_text, len(loaded)) or unet, strict=True)]


def _spread(weights: Sequence[float], count: int) -> list[float]:
    return list(weights) * count if len(weights) == 1 else list(weights)


def run(args: argparse.Namespace, sources: list, lines: list[str]) -> int:
    """Merges the LoRA of `sources` into one file as `args` say; 0."""
    out = output.console()
    entries = weighted(output.load_all(sources, out), args.alpha, args.alpha_TE)
    for line in lines:
        out.print(line)
    path = output.target(args, (path for _, paths in sources for path in paths), TOOL)
    found = common_family(entries, args.family, output.said(args), out)
    whole = merged(entries)
    check_names(whole, found)
    limit = Limit(args.rank, args.energy)
    result = whole if limit == Limit() else {component: {layer: truncated(lora, limit) for layer, lora in named.items()} for component, named in whole.items()}
    dtype = output.narrow(result, (lora for _, _, lora, _ in terms(entries)))
    written = output.write(path, result, found, args, tool=TOOL, dtype=dtype, kept=_kept(entries), made_from=made_from(entries))
    output.say_losses(out, output.losses(whole, written))
    output.say_written(out, path, written)
    return 0


def terms(entries: Sequence[Weighted]) -> Iterator[tuple[str, str, LoraTensors, float]]:
    """(component, layer, its tensors, weight) of everything that is to be added up."""
    for entry in entries:
        for component, named in entry.lora.layers.items():
            for layer, lora in named.items():
                yield component, layer, lora, entry.of(component)


def merged(entries: Sequence[Weighted]) -> dict[str, dict[str, LoraTensors]]:
    """The weighted sum, layer by layer; layers without effect are left out. CheckpointError where shapes of a layer differ, or nothing is left."""
    gathered: dict[str, dict[str, list[tuple[LoraTensors, float]]]] = {}
    for component, layer, lora, weight in terms(entries):
        gathered.setdefault(component, {}).setdefault(layer, []).append((lora, weight))
    check_shapes(gathered)
    sums = {component: {layer: concatenated(parts) for layer, parts in named.items()} for component, named in gathered.items()}
    result = {component: {layer: lora for layer, lora in named.items() if lora is not None} for component, named in sums.items()}
    result = {component: named for component, named in result.items() if named}
    if not result:
        raise CheckpointError("nothing is left to write: every weight or every alpha is 0.")
    return result


def check_shapes(gathered: Mapping[str, Mapping[str, Sequence[tuple[LoraTensors, float]]]]) -> None:
    """CheckpointError where LoRA of one layer are not of one shape: they are for different base models."""
    unlike = [f"{component} {layer}: {' and '.join(sorted(map(str, shapes)))}" for component, named in gathered.items() for layer, parts in named.items()
              if len(shapes := {_shape(lora) for lora, _ in parts}) > 1]
    if unlike:
        more = f" and {len(unlike) - 3} layers more" if len(unlike) > 3 else ""
        raise CheckpointError(f"these LoRA are for different base models, their layers have different shapes: {'; '.join(unlike[:3])}{more}.")


def _shape(lora: LoraTensors) -> tuple[int, ...]:
    """(out, in, kh, kw), where a 1x1 convolution and a matrix are the same."""
    kernel = tuple(lora.down.shape[2:])
    return (lora.up.shape[0], lora.down.shape[1], *(kernel if kernel != (1, 1) else ()))


def common_family(entries: Sequence[Weighted], told: str | None, said: Mapping[str, str], out: Console) -> Found:
    """The family that all the LoRA are for. CheckpointError where they contradict each other."""
    founds = [(entry.lora.name, entry.lora.family(told)) for entry in entries]
    settled = [(name, found) for name, found in founds if not found.open] or founds
    if len({found.family.name for _, found in settled}) > 1:
        raise CheckpointError("the LoRA are for different base models: " + ", ".join(f"{name} for {found.family.title}" for name, found in settled) + ".")
    versions = list(dict.fromkeys(found.version for _, found in settled if found.version))
    if len(versions) > 1:
        out.print(f"warning: the LoRA are for different versions of it ({', '.join(map(str, versions))}); the file is written as for {versions[0]}")
    found = with_word(next((found for _, found in settled if found.version), settled[0][1]), said)
    out.print(f"family: {found}")
    return found


def check_names(layers: Layers, found: Found) -> None:
    """CheckpointError where a layer is none of the family's: the LoRA that brings it is for another base model."""
    foreign = [f"{component} {path}" for component, named in layers.items() for path in named if found.family.webui_base(component, path) is None]
    if foreign:
        raise CheckpointError(f"the LoRA are for different base models: {found.family.title} has no {foreign[0]}{f', and {len(foreign) - 1} more' if len(foreign) > 1 else ''}.")


def made_from(entries: Sequence[Weighted]) -> list[dict]:
    """What the merged file says of its sources: file name, weights, and the hash that webui knows the file by (AutoV3's long form)."""
    return [{"file": path.name, "weight": entry.weight, "weight_TE": entry.weight_text, "payload_sha256": payload_hash(path)}
            for entry in entries for path, _ in entry.lora.files]


def _kept(entries: Sequence[Weighted]) -> dict[str, str]:
    """Metadata that is as true of the sum as of its parts: what is said of the base model, where all say the same."""
    said = [{key: value for key, value in entry.lora.metadata.items() if key in _OF_THE_BASE} for entry in entries]
    return {key: value for key, value in said[0].items() if all(other.get(key, value) == value for other in said)}

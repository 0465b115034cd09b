"""LoRA files for other programs and back, written only after they have been read again and compared."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..families.webui import WebuiFamily
from .atomic import write_atomic
from .convert import Layers, WebuiLora, cast, faults_of, to_webui
from .format import META_COMPONENT, load_lora, save_lora
from .io import payload_sha256, save_tensors
from .lora_parse import SCALE_ONE
from .metadata import HASH, META_CONVERTER, META_SOURCE, MODEL_HASH, other_metadata, our_metadata, webui_metadata, without_hashes
from .paths import PEFT_WEIGHTS, SUFFIX
from .peft_form import CONFIG, DiffusersLora, PeftLora, to_diffusers, to_peft
from .safetensors_header import read_header


def write_webui(path: Path, layers: Layers, family: WebuiFamily, version: str | None, *, name: str, kept: Mapping[str, str], dtype: torch.dtype | None = None,
                extra: Mapping[str, str] | None = None) -> WebuiLora:
    """Writes webui's file at `path` and returns what is in it. The file appears only if every layer's delta is what it was and every name
    is one that webui knows; else CheckpointError, and `path` is as it was before."""
    lora = to_webui(layers, family, dtype)
    before = [tensors for named in layers.values() for tensors in named.values()]
    digest = payload_sha256(lora.tensors)
    metadata = {**webui_metadata(kept, family, version, before, name), **without_hashes(extra), HASH: digest, MODEL_HASH: f"0x{digest}"}

    def check(written: Path) -> None:
        known = {family.webui_base(component, layer) for component, named in lora.layers.items() for layer in named}
        foreign = [key for key in read_header(written).entries if key.split(".", 1)[0] not in known]
        _refuse(path, [f"{key} is no name that webui knows" for key in foreign] + _hash_faults(written) + faults_of(load_lora(written).layers, layers, dtype))

    return replace(lora, sha256=save_tensors(path, lora.tensors, metadata, check))


def write_ours(folder: Path, layers: Layers, version: str | None, *, name: str, kept: Mapping[str, str], dtype: torch.dtype | None = None) -> list[Path]:
    """Writes `unet-<name>`, `text_encoder-<name>` ... into `folder`, each checked like webui's, and returns their paths: all of them or none."""
    stored = {component: {layer: cast(tensors, dtype) for layer, tensors in named.items()} for component, named in layers.items()}
    paths = [our_path(folder, component, name) for component in layers]
    with _all_or_none(paths):
        for path, (component, named) in zip(paths, layers.items(), strict=True):
            save_lora(path, stored[component], our_metadata(kept, version, component), check=_comparison(path, {component: named}, dtype))
    return paths


@contextlib.contextmanager
def _all_or_none(paths: Sequence[Path]) -> Iterator[None]:
    """Files that belong together: where one cannot be written, all are as they were before."""
    before = {path: path.read_bytes() if path.is_file() else None for path in paths}
    try:
        yield
    except CheckpointError:
        for path, old in before.items():
            if old is None and path.is_file():
                path.unlink()
            elif old is not None and path.read_bytes() != old:
                write_atomic(path, lambda file, old=old: file.write(old))
        raise


def write_diffusers(path: Path, layers: Layers, family: WebuiFamily, version: str | None, *, name: str, kept: Mapping[str, str], dtype: torch.dtype | None = None,
                    extra: Mapping[str, str] | None = None) -> DiffusersLora:
    """Writes the file of diffusers' `save_lora_weights` at `path`, checked like webui's, and returns what is in it."""
    lora = to_diffusers(layers, family, dtype)
    metadata = {**other_metadata(kept, family, version, name, lora.tensors), **without_hashes(extra), SCALE_ONE: "1"}
    save_tensors(path, lora.tensors, metadata, _comparison(path, layers, dtype))
    return lora


def write_peft(folder: Path, layers: Layers, family: WebuiFamily, version: str | None, *, name: str, kept: Mapping[str, str], dtype: torch.dtype | None = None,
               extra: Mapping[str, str] | None = None) -> list[Path]:
    """Writes a PEFT adapter for each component, `<folder>/<component>/` with weights and config, each checked, all of them or none; the weights' paths come back."""
    adapters = {component: to_peft(named, family, component, dtype) for component, named in layers.items()}
    with _all_or_none([folder / component / name for component in adapters for name in (CONFIG, PEFT_WEIGHTS)]):
        for component, adapter in adapters.items():
            _write_adapter(folder / component, adapter, {component: layers[component]}, dtype,
                           {**other_metadata(kept, family, version, name, adapter.tensors), **without_hashes(extra), META_COMPONENT: component})
    return [folder / component / PEFT_WEIGHTS for component in adapters]


def _write_adapter(folder: Path, adapter: PeftLora, before: Layers, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
    """The config first, since a config without weights is no adapter, and weights without it would be read with another strength."""
    text = json.dumps(adapter.config, indent=2, ensure_ascii=False)
    write_atomic(folder / CONFIG, lambda file: file.write(text.encode("utf-8")))
    save_tensors(folder / PEFT_WEIGHTS, adapter.tensors, {**metadata, "lora_adapter_metadata": text}, _comparison(folder / PEFT_WEIGHTS, before, dtype))


def _comparison(path: Path, before: Layers, dtype: torch.dtype | None) -> Callable[[Path], None]:
    return lambda written: _refuse(path, faults_of(load_lora(written).layers, before, dtype))


def our_path(folder: Path, component: str, name: str) -> Path:
    """Where `write_ours` puts a component."""
    return folder / f"{component}-{name}{SUFFIX}"


def replaceable(path: Path, maker: str = "1", source: str | None = None) -> bool:
    """Whether nothing is lost when `path` is written: it is free, or holds what the same command made before (`maker`: the mark it leaves; "1" is the
    converter's), and of the same `source` (`source_mark`) where one is given."""
    if not path.exists():
        return True
    try:
        made = read_header(path).metadata
    except CheckpointError:  # no safetensors file: whatever it is, it is not ours to replace
        return False
    return made.get(META_CONVERTER) == maker and source in (None, made.get(META_SOURCE))


def source_mark(paths: Iterable[Path]) -> str:
    """What tells the LoRA in these files from any other: 16 hex digits of the SHA-256 over their bytes after the headers, whatever the files' order, names and place."""
    return hashlib.sha256("".join(sorted(map(payload_hash, paths))).encode()).hexdigest()[:16]


def payload_hash(path: Path) -> str:
    """SHA-256 (hex) of a safetensors file's bytes after its header, read from the disk; its first 12 digits are webui's AutoV3."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(read_header(path).payload)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hash_faults(written: Path) -> list[str]:
    said, true = read_header(written).metadata.get(HASH), payload_hash(written)
    return [] if said == true else [f"{HASH} is {said}, the bytes give {true}"]


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise CheckpointError(f"{path} is not written, since reading it back shows a difference: {shown}.")

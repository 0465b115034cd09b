"""Textual-inversion embeddings (arXiv:2208.01618): files by name, and words of a prompt that become vectors.

A word with vectors gets new ids at the end of the text encoder's token table, so that all after it (chunks, weights, encoding) sees
ordinary ids.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.io import read_tensors
from ..errors import CheckpointError, ConfigError

SUFFIXES = (".pt", ".bin", ".safetensors")
# Where each text encoder's vectors lie in a file for two encoders, in the order of the encoders.
TWO_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass(frozen=True)
class Library:
    """The embeddings of a folder: word in lower case -> files that have this name (more than one is an error once it is used)."""

    files: Mapping[str, tuple[Path, ...]]

    def pattern(self) -> re.Pattern | None:
        """Matches a known name that stands as a word of its own; longer names first."""
        if not self.files:
            return None
        names = "|".join(re.escape(name) for name in sorted(self.files, key=len, reverse=True))
        return re.compile(rf"(?<![\w-])(?:{names})(?![\w-]|\.\w)", re.IGNORECASE)


def find(folder: Path | None) -> Library:
    """Index of a folder and those below it by file stem; nothing is opened. No folder, no embeddings."""
    files: dict[str, tuple[Path, ...]] = {}
    for path in sorted(folder.rglob("*")) if folder else []:
        if path.suffix.lower() in SUFFIXES and path.is_file():
            files[path.stem.lower()] = (*files.get(path.stem.lower(), ()), path)
    return Library(files)


def used(library: Library, texts: Iterable[str]) -> dict[str, Path]:
    """Word -> file for the names that the texts contain. Two files of one name raise ConfigError."""
    pattern = library.pattern()
    words = sorted({match.lower() for text in texts for match in pattern.findall(text)}) if pattern else []
    faults = [f"the prompt's word {word!r} has several embeddings: {', '.join(map(str, library.files[word]))}. Rename or remove all but one."
              for word in words if len(library.files[word]) > 1]
    if faults:
        raise ConfigError(faults)
    return {word: library.files[word][0] for word in words}


def read(path: Path) -> dict:
    """Vectors (K, D) of an embedding file by where they belong: '' (the one encoder), or 'clip_l' and 'clip_g'.

    Takes A1111's `.pt` (string_to_param), `emb_params`, diffusers' {token: vector} and the SDXL pair; raises CheckpointError else. Pickles
    are read with weights_only, so that a file cannot run code, and nothing larger than the file itself is made of it.
    """
    import torch

    content = read_tensors(path)[0] if path.suffix.lower() == ".safetensors" else _unpickled(path)
    if isinstance(content, Mapping) and isinstance(content.get("string_to_param"), Mapping):
        content = content["string_to_param"]
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)} if isinstance(content, Mapping) else {}
    if {"clip_l", "clip_g"} <= set(tensors):
        tensors = {name: tensors[name] for name in ("clip_l", "clip_g")}
    elif len(tensors) == 1:
        tensors = {"": next(iter(tensors.values()))}
    else:
        raise CheckpointError(f"{path} is no embedding that is known (A1111's .pt, emb_params, one token, or clip_l + clip_g); it holds {[name[:40] for name in sorted(tensors)[:5]]}.")
    return {name: _vectors(value, path) for name, value in tensors.items()}


def _unpickled(path: Path):
    """What a file of torch.save holds, tensors only. A compressed archive (torch writes none) could unfold to any size: refused."""
    import torch

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise CheckpointError(f"the embedding {path} is a compressed archive, which torch never writes: it may unfold to any size. It is not read.")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"the embedding {path} is damaged, or a pickle that holds more than tensors (which may run code when it is read). It is not read; "
                              f"look for a .safetensors file of it.") from error
    except Exception as error:  # readers raise whatever a damaged file makes of them; the user needs the file's name
        raise CheckpointError(f"the embedding {path} cannot be read: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from error


def _vectors(value, path: Path):
    """A tensor of a file as (K, D) floats."""
    import torch

    whole = type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_nested and value.layout == torch.strided and value.device.type == "cpu" and value.is_floating_point()
    if not whole or value.dim() == 0 or value.numel() == 0:
        raise CheckpointError(f"{path}: the vectors are not a plain tensor of numbers with a width.")
    if value.numel() * value.element_size() > path.stat().st_size:
        raise CheckpointError(f"{path}: the vectors of shape {tuple(value.shape)} are larger than the file: it is damaged or made to deceive.")
    value = value.detach().float().reshape(-1, value.shape[-1])
    if not value.isfinite().all():
        raise CheckpointError(f"{path}: the vectors are not finite.")
    return value


def add_words(models, files: Mapping[str, Path]) -> dict[str, dict[str, list[int]]]:
    """Gives each word ids of its own in every text encoder. Returns tokenizer name -> word -> ids (one per vector).

    Vectors of a width that the model does not have raise ConfigError; it names the file and both widths.
    """
    contents = {word: read(path) for word, path in files.items()}
    encoders = [name for name in TWO_ENCODERS if name in models.modules]
    picked = {encoder: {word: _pick(content, encoder, len(encoders)) for word, content in contents.items()} for encoder in encoders}
    faults = [fault for encoder in encoders for word, vectors in picked[encoder].items()
              if (fault := _misfit(files[word], vectors, models.modules[encoder].config.hidden_size, contents[word]))]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return {encoder.replace("text_encoder", "tokenizer"): _extend(models.modules[encoder], picked[encoder]) for encoder in encoders}


def _pick(content: Mapping, encoder: str, encoders: int):
    return content.get(TWO_ENCODERS[encoder]) if encoders > 1 else content.get("")


def _misfit(path: Path, vectors, width: int, content: Mapping) -> str | None:
    if len({len(value) for value in content.values()}) > 1:
        return f"the embedding {path} has {' and '.join(f'{len(value)} vectors in {name}' for name, value in content.items())}: both encoders need as many."
    if vectors is not None and vectors.shape[1] == width:
        return None
    has = ", ".join(f"{name + ' ' if name else ''}{value.shape[1]}" for name, value in content.items())
    return (f"the embedding {path} has vectors of width {has}, the model's text encoder has {width}: it was made for another model "
            f"(768: SD1.x, 1024: SD2.x, clip_l + clip_g: SDXL).")


def _extend(text_encoder, words: Mapping) -> dict[str, list[int]]:
    """Adds the vectors below the token table; ids of each word."""
    import torch

    table = text_encoder.get_input_embeddings()
    ids, rows, next_id = {}, [table.weight.detach()], table.weight.shape[0]
    for word, vectors in words.items():
        ids[word] = list(range(next_id, next_id + len(vectors)))
        next_id += len(vectors)
        rows.append(vectors.to(table.weight))
    if len(rows) > 1:
        text_encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.cat(rows), freeze=True))
    return ids

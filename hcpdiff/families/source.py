"""From what a user names (a folder, a file, a hub id) to what is on this machine, or an error that says what to do."""

import difflib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError
from ..model_names import SINGLE, looks_local

# Withdrawn from the hub in 2024; the same weights live on under the second name.
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
MODEL_KEY = "model.pretrained_model_name_or_path"  # the trainer's; the visualizer names its own
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")  # of all families
ALIGNMENT = 64  # bytes; torch gives its own tensors this much
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # what the hub's client looks at
INDEX = "*.index*.json"  # a variant stands in between: .index.fp16.json
WEIGHTS = ("*.safetensors", f"*.safetensors{INDEX[1:]}", "*.bin", f"*.bin{INDEX[1:]}")


def resolve(source: str, revision: str | None = None, variant: str | None = None, key: str = MODEL_KEY) -> tuple[Path, list[str]]:
    """The local folder (or single file) of a base model, and notices for the log. Downloads a hub id once, into the hub's own cache."""
    folder = Path(source)
    if folder.is_dir():
        return folder, _unused("folder", key, revision=revision)
    if folder.is_file():
        if folder.suffix.lower() not in SINGLE:
            raise ConfigError(f"{key} = {source!r} is a file, but not one of {' or '.join(SINGLE)}. It takes such a file, a diffusers folder or a hub id (name/name).")
        return folder, _unused("single file", key, revision=revision, variant=variant)
    if looks_local(source):
        raise ConfigError(f"{key} = {source!r}: there is no such folder or file.{_near(folder)} It takes a diffusers folder, a .safetensors file or a hub id (name/name).")
    return _from_hub(source, revision, variant, key)


def _unused(what: str, key: str, **values: str | None) -> list[str]:
    """Notices of settings that mean nothing for a model of this kind."""
    stem = key.rpartition(".")[0] + "." if "." in key else ""
    return [f"{stem}{name} = {value!r} has no effect: {key} is a {what}." for name, value in values.items() if value is not None]


def _near(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    names = [path.name for path in folder.parent.iterdir() if path.is_dir() or path.suffix.lower() in SINGLE]
    near = difflib.get_close_matches(folder.name, names, n=3, cutoff=0.4)
    return f" Nearest: {', '.join(str(folder.parent / name) for name in near)}." if near else ""


def _from_hub(source: str, revision: str | None, variant: str | None, key: str) -> tuple[Path, list[str]]:
    cached = _cached(source, revision, variant)
    if cached:
        return cached, []
    moved = MOVED.get(source, source)
    notices = [] if moved == source else [f"{source} was withdrawn from the hub; taking {moved}, the same weights."]
    try:
        return _download(moved, revision, variant, local_only=False), notices
    except (OSError, ValueError) as error:  # every error of the hub client is an OSError; diffusers refuses code in a repository with ValueError
        also = f" {source} was withdrawn from the hub; {moved} holds the same weights and was asked for." if moved != source else ""
        raise ConfigError(f"{key} = {source!r}: {_hub_reason(error)}{also}") from error


def _cached(source: str, revision: str | None, variant: str | None) -> Path | None:
    """The hub cache's folder of a model if it is whole; a download that was interrupted is not."""
    try:
        folder = _download(source, revision, variant, local_only=True)
        check_complete(folder, parts_of(folder))
    except (OSError, ValueError, ConfigError):
        return None
    return folder


def offline_faults(source: str, key: str = MODEL_KEY, revision: str | None = None, files: Sequence[str] = ("model_index.json",)) -> list[str]:
    """A hub id that is not in the cache, where OFFLINE forbids to ask for it: at most one fault. Needs no torch.

    files: of which one is there where any of the model is. What cannot be looked at is left to who reads it.
    """
    if not any(os.environ.get(name) for name in OFFLINE):
        return []
    from huggingface_hub import constants  # this module alone takes no time to import

    names = [name for name in OFFLINE if os.environ.get(name, "").upper() in constants.ENV_VARS_TRUE_VALUES]
    with suppress(OSError):
        if names and constants.HF_HUB_OFFLINE and not _is_there(source, Path(constants.HF_HUB_CACHE), revision or "main", files):
            return [_offline_fault(source, key, names)]
    return []


def _offline_fault(source: str, key: str, names: Sequence[str]) -> str:
    also = f" Nor is {MOVED[source]}, which holds the same weights." if source in MOVED else ""
    keep, them = ("keep", "both") if len(names) > 1 else ("keeps", "it")
    return (f"{key} = {source!r}: not a local folder, not in the local cache, and {' and '.join(names)} {keep} the hub from being asked.{also} "
            f"Unset {them}, or name a local folder or file.")


def _is_there(source: str, cache: Path, revision: str, files: Sequence[str]) -> bool:
    """Whether a model is on this machine, or is no hub id."""
    return Path(source).exists() or looks_local(source) or any(_in_cache(cache, name, revision, files) for name in {source, MOVED.get(source, source)})


def _in_cache(cache: Path, name: str, revision: str, files: Sequence[str]) -> bool:
    """Whether one of the files is in the hub's cache."""
    return any((_snapshot(cache, name, revision) / file).exists() for file in files)


def _snapshot(cache: Path, name: str, revision: str) -> Path:
    """Where a model is in the hub's cache, if it is, as the hub's client lays that out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    named = repository / "refs" / revision
    return repository / "snapshots" / (named.read_text(encoding="utf-8").strip() if named.is_file() else revision)


def on_this_machine(source: str, revision: str | None) -> Path:
    """The file or folder of a model, a hub id's in the hub's cache; it need not be there. Needs no torch."""
    if Path(source).exists() or looks_local(source):
        return Path(source)
    from huggingface_hub import constants

    places = [_snapshot(Path(constants.HF_HUB_CACHE), name, revision or "main") for name in dict.fromkeys((source, MOVED.get(source, source)))]
    return next((place for place in places if place.is_dir()), places[0])


def find_part(source: str, part: str, key: str) -> tuple[Path | str, dict]:
    """Where another model's part lies, as (place, options) for `from_pretrained`: a folder, its sub-folder `part`, or a hub id.

    Only the small config.json is asked of the hub. ConfigError where there is no such part.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder = Path(source)
    if folder.is_dir():
        place = folder / part if (folder / part).is_dir() else folder
        faults = _missing(place.parent, place.name)
        if faults:
            raise ConfigError([f"{key} = {source!r} is no {part} in diffusers format:"] + faults)
        return place, {}
    if folder.is_file() or looks_local(source):
        what = "is a file; a folder" if folder.is_file() else f"is no folder or file here (working directory: {Path.cwd()}).{_near(folder)} A folder"
        raise ConfigError(f"{key} = {source!r} {what} in diffusers format or a hub id (name/name) is needed.")
    try:
        for options in ({}, {"subfolder": part}):
            try:
                hf_hub_download(source, "config.json", **options)
                return source, options
            except LocalEntryNotFoundError:  # also an EntryNotFoundError, but says nothing about the hub
                raise
            except EntryNotFoundError:
                continue
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key} = {source!r}: {_hub_reason(error)}") from error
    raise ConfigError(f"{key} = {source!r}: the hub's model has no config.json in it or in {part}/, so it is no {part} in diffusers format.")


def _download(source: str, revision: str | None, variant: str | None, local_only: bool) -> Path:
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(source, revision=revision, variant=variant, local_files_only=local_only))


def _hub_reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    kinds = GatedRepoError, RevisionNotFoundError, RepositoryNotFoundError
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return f"it is refused: {_first_line(error)}"
    while error.__cause__ is not None and not isinstance(error, kinds):  # diffusers wraps them
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return "the hub asks for a licence to be accepted first: accept it on the model's page, then `huggingface-cli login`."
    if isinstance(error, RevisionNotFoundError):
        return "the hub has the model, but not this revision."
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model (withdrawn, private, or misspelt). Name a local folder or another id."
    return (f"not a local folder, not in the local cache, and the hub cannot be reached ({type(error).__name__}). Name a local diffusers folder, or set "
            f"HF_ENDPOINT to a mirror (for example https://hf-mirror.com) and try again.")


def read_index(folder: Path, key: str = MODEL_KEY) -> dict:
    """model_index.json of a diffusers folder."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ConfigError(f"{key} = {str(folder)!r} has no model_index.json, so it is no diffusers model. It holds: "
                          f"{', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}.")
    return read_json(path)


def parts_of(folder: Path) -> list[str]:
    """The parts that are needed of those that model_index.json names."""
    return [part for part, value in read_index(folder).items() if part in PARTS and value]


def read_json(path: Path) -> dict:
    """A JSON file of a model folder, a map."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is a {type(value).__name__}; it must be a JSON map {{...}}.")
    return value


def check_complete(folder: Path, parts: list[str], key: str = MODEL_KEY) -> None:
    """Raises ConfigError that names every missing piece of the parts: config, weights, tokenizer files."""
    faults = [fault for part in parts for fault in _missing(folder, part)]
    if faults:
        raise ConfigError([f"{key} = {str(folder)!r} is incomplete or cannot be used:"] + faults)


def _missing(folder: Path, part: str) -> list[str]:
    place = folder / part
    if not place.is_dir():
        return [f"  there is no folder {part}/."]
    if part == "scheduler":
        return [] if (place / "scheduler_config.json").is_file() else ["  scheduler/ has no scheduler_config.json."]
    if part.startswith("tokenizer"):
        known = (place / "vocab.json").is_file() and (place / "merges.txt").is_file() or (place / "tokenizer.json").is_file()
        return [] if known else [f"  {part}/ has neither vocab.json + merges.txt nor tokenizer.json."]
    faults = [] if (place / "config.json").is_file() else [f"  {part}/ has no config.json."]
    if not any(next(place.glob(pattern), None) for pattern in WEIGHTS):
        faults.append(f"  {part}/ has no weights (.safetensors or .bin).")
    if (place / "adapter_config.json").is_file():
        faults.append(f"  {part}/ holds adapter_config.json: an adapter that would bring another model's files. Take it out, or merge it into the weights.")
    return faults + [fault for index in sorted(place.glob(INDEX)) for fault in _shard_faults(index)]


def _shard_faults(index: Path) -> list[str]:
    try:
        shards_of(index)
    except ConfigError as error:
        return [f"  {fault}" for fault in error.faults]
    return []


def shards_of(index: Path) -> list[str]:
    """Names of the weight files beside an index, of which it is one; ConfigError where it is none, or names files outside its own folder."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named.values()):
        raise ConfigError(f"{index} has no map of weights to files.")
    names = sorted(set(named.values()))
    stray = [name for name in names if Path(name).name != name or name in ("", "..") or "\\" in name]
    if stray:
        raise ConfigError(f"{index} names files outside its folder, such as {stray[0]!r}.")
    return names


def is_of_transformers(kind: type) -> bool:
    """Whether a class is transformers', not diffusers'."""
    return kind.__module__.startswith("transformers.")


def load_whole(kind: type, place: Path | str, key: str, options: dict):
    """`kind.from_pretrained(place)`, refused where the files do not hold every weight (the libraries would draw random ones)."""
    module, info = load_or_fault(kind, place, key, {**options, "output_loading_info": True})
    faults = [f"{len(info[name])} weights {what}, such as {sorted(map(str, info[name]))[0]}"
              for name, what in (("missing_keys", "are missing"), ("mismatched_keys", "have another shape")) if info.get(name)]
    if faults:
        raise ConfigError(f"{key}: {place} is not a whole {kind.__name__}: {'; '.join(faults)}.")
    _align(module)
    return module


def _align(module) -> None:
    """Copies the weights that the loaders left where they lie in the mapped file, at any 8 bytes: sums of unaligned weights differ in their last bits,
    so the same weights would compute something else as a folder, as a single file, or behind a longer header."""
    import torch

    for tensor in (*module.parameters(), *module.buffers()):
        if type(tensor.data) is torch.Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def load_or_fault(kind: type, place: Path | str, key: str, options: dict):
    """`kind.from_pretrained(place)`; whatever a damaged file makes its loader raise becomes a ConfigError that names the place."""
    try:
        return kind.from_pretrained(place, **options)
    except Exception as error:  # loaders raise anything; the user needs the file's name
        reason = "a pickle in it is damaged, or holds more than tensors (which may run code when it is read)" if _is_pickle_fault(error) else _first_line(error)
        raise ConfigError(f"{key}: {place} cannot be loaded as {kind.__name__}: {reason}") from error


def _is_pickle_fault(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__ or error.__context__
    return error is not None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

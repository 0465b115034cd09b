"""What the header of an exported LoRA says: true, readable by webui, and nothing of the machine that it was made on."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..families.webui import PREDICTIONS, WebuiFamily
from ..lora_tensors import LoraTensors
from .format import META_BASE_MODEL, META_BASE_VERSION, META_COMPONENT, META_PREFIX, META_STEP
from .io import payload_sha256

META_CONVERTER = "hcpdiff.converter"  # the command that wrote a file for others ("1": the converter), which may therefore replace it
META_SOURCE = META_PREFIX + "source"  # digest of what a converted file was made from (export.source_mark): made anew, it may replace the file
HASH = "sshs_model_hash"
MODEL_HASH = "modelspec.hash_sha256"  # the same digest as the model spec spells it, after 0x

# captions, tags and folder names of whoever trained the file
_PRIVATE = ("ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_datasets", "ss_bucket_info", "ss_dataset_config", "ss_caption")
HASHES = ("sshs_", "modelspec.hash")
META_PREDICTION = META_PREFIX + "prediction_type"
_OURS = (META_BASE_VERSION, META_BASE_MODEL, META_STEP, META_PREDICTION)  # the rest of ours (settings, versions, format) is true of that file only
_OF_THE_FILE = ("format", "lora_adapter_metadata")
_CARRIED = ("ss_", "ssmd_", "modelspec.")
PICTURES = ("ssmd_cover", "modelspec.thumbnail")  # their base64 holds what looks like a path
_PATH = re.compile(r"""(^|[\s"'=\[(])(~?/[^\s"'/]+/|[A-Za-z]:[\\/]|\\\\[^\s\\]|\.{1,2}[\\/])|[^\s:/]\\[^\s"nrtu\\/]""")


def carried(metadata: Mapping[str, str], keep_all: bool = False) -> tuple[dict[str, str], list[str]]:
    """The entries that go with a LoRA into another file, and the names of those left out: hashes (never copied), and captions, folder
    names and local paths (unless `keep_all`)."""
    kept, dropped = {}, []
    for key, value in metadata.items():
        if key.startswith(HASHES) or key in _OF_THE_FILE:
            continue
        if key.startswith(META_PREFIX):
            kept.update({key: value} if key in _OURS else {})
            continue
        private = key.startswith(_PRIVATE) or not key.startswith(_CARRIED) or (not key.startswith(PICTURES) and _PATH.search(value) is not None)
        if private and not keep_all:
            dropped.append(key)
        else:
            kept[key] = value
    return kept, dropped


def without_hashes(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The entries that are no hashes: those are of one file's bytes, computed from what is written and never taken from elsewhere."""
    return {key: value for key, value in (metadata or {}).items() if not key.startswith(HASHES)}


def _base_model(kept: Mapping[str, str], family: WebuiFamily, version: str | None) -> dict[str, str]:
    """The entries of `kept`, and the base model's architecture; without its version where nothing tells it."""
    others = {key: value for key, value in without_hashes(kept).items() if key not in (META_BASE_VERSION, "ss_base_model_version", "ss_v2", "modelspec.architecture")}
    return {**others, **({"modelspec.architecture": family.versions[version]} if version in family.versions else {}), **family.extra}


def webui_metadata(kept: Mapping[str, str], family: WebuiFamily, version: str | None, layers: Iterable[LoraTensors], name: str) -> dict[str, str]:
    """What webui reads: base model, network and name. Entries of `kept` stay unless they are about these."""
    layers = list(layers)
    prediction = kept.get(META_PREDICTION, PREDICTIONS.get(version, "")).replace("_prediction", "")
    entries = {
        **{key: value for key, value in _base_model(kept, family, version).items() if not key.startswith(META_PREFIX)},
        **({"ss_base_model_version": version} if version else {}), "ss_output_name": name, "ss_network_module": "networks.lora",
        "ss_network_dim": _common({str(layer.rank) for layer in layers}), "ss_network_alpha": _common({f"{layer.alpha:.9g}" for layer in layers}),
        "modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "diffusers", "modelspec.title": name, META_CONVERTER: "1",
    }
    if prediction:
        entries.setdefault("modelspec.prediction_type", prediction)
    if META_STEP in kept:
        entries.setdefault("ss_steps", kept[META_STEP])
    if META_BASE_MODEL in kept:
        entries.setdefault("ss_sd_model_name", re.split(r"[\\/]", kept[META_BASE_MODEL].rstrip("\\/"))[-1])
    return entries


def other_metadata(kept: Mapping[str, str], family: WebuiFamily, version: str | None, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata of a file for diffusers or PEFT: base model, and a name; what training wrote of itself stays."""
    return {**_base_model(kept, family, version), "format": "pt", **({META_BASE_VERSION: version} if version else {}), "modelspec.sai_model_spec": "1.0.0",
            "modelspec.implementation": "diffusers", "modelspec.title": name, MODEL_HASH: f"0x{payload_sha256(tensors)}", META_CONVERTER: "1"}


def our_metadata(kept: Mapping[str, str], version: str | None, component: str) -> dict[str, str]:
    """Metadata of one component's file of ours, made from another program's file."""
    own = {META_COMPONENT: component, META_CONVERTER: "1"} | ({META_BASE_VERSION: version} if version else {})
    return {**kept, **own}


def _common(values: set[str]) -> str:
    return values.pop() if len(values) == 1 else "Dynamic"

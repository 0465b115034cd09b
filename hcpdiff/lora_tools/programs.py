"""What other programs make of a LoRA file as it is: the cases in which webui, ComfyUI or diffusers take it in part, or wrongly, without a word."""

import re
from collections.abc import Iterable

from ..checkpoint.convert import Found
from ..checkpoint.format import LoraFile
from ..checkpoint.spellings import WEBUI, WEBUI_LDM
from ..families.webui import TEXT, TEXT_2

_BARE_TEXT = re.compile(r"lora_te\d?_(?!text_model_|text_projection)")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def remarks(file: LoraFile, keys: Iterable[str], found: Found) -> list[str]:
    """A line for each such case."""
    lines = []
    if set(file.spelling.split("+")) - {WEBUI, WEBUI_LDM}:
        lines.append("webui and ComfyUI want another spelling: lora_convert --to_webui makes the file for them")
    bare = sum(_BARE_TEXT.match(key) is not None for key in keys)
    if bare:
        lines.append(f"webui and ComfyUI pass over {bare} text-encoder tensors, whose names lack text_model_: lora_convert --to_webui mends them")
    version = file.metadata.get("ss_base_model_version", "")
    if found.family.name == "sdxl" and file.metadata and not version.startswith("sdxl_") and not bare and not lines:
        lines.append(f"webui's list of LoRA hides it while an SDXL model is loaded: ss_base_model_version is {version[:40]!r}, where it looks for sdxl_…")
    halves = [f"{component} {path}" for component in found.family.fused for path in _incomplete(file, component)]
    if halves:
        lines.append(f"webui passes over {len(halves)} text-encoder attentions in which q, k, v or out_proj is missing, such as {halves[0]}: lora_convert --to_webui completes them")
    mixed = [component for component, named in file.layers.items() if len({f"{lora.scale:.5g}" for lora in named.values()}) > 1]
    if mixed:
        lines.append(f"the layers of {' and '.join(mixed)} have different strengths (alpha / rank), of which diffusers' load_lora_weights (0.42) takes one for all")
    return lines


def _incomplete(file: LoraFile, component: str) -> list[str]:
    if component not in (TEXT, TEXT_2):
        return []
    there: dict[str, set[str]] = {}
    for path in file.layers.get(component, {}):
        parent, _, name = path.rpartition(".")
        if name in _ATTENTION:
            there.setdefault(parent, set()).add(name)
    return [parent for parent, names in there.items() if len(names) < len(_ATTENTION)]

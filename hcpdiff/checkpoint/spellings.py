"""One key of a LoRA file, in any spelling that is about -> which component, which layer, which part. No torch.

Spellings: ours, webui/kohya (diffusers or LDM names), `lycoris_`, PEFT, old diffusers, and the first generation of this framework.
"""

import re
from dataclasses import dataclass

from ..families.unet_names import clip_path, is_ldm, text_path, unet_path
from ..families.webui import PREFIXES, TEXT, TEXT_2, UNET

OURS, WEBUI, WEBUI_LDM, LYCORIS, PEFT, OLD_DIFFUSERS, ANCESTOR = "hcpdiff", "webui", "webui-ldm", "lycoris", "peft", "old-diffusers", "ancestor"
DOWN, UP, MID, ALPHA = "down", "up", "mid", "alpha"

# key ending -> (part, spelling where the ending settles it)
_ENDINGS = [(re.compile(f"{pattern}$"), part, spelling) for pattern, part, spelling in (
    (r"\.lora_down\.weight", DOWN, None), (r"\.lora_up\.weight", UP, None), (r"\.lora_mid\.weight", MID, None),
    (r"\.lora_A(\.[^.]+)?\.weight", DOWN, PEFT), (r"\.lora_B(\.[^.]+)?\.weight", UP, PEFT),
    (r"(\.lora_linear_layer|\.lora|_lora)\.down\.weight", DOWN, OLD_DIFFUSERS), (r"(\.lora_linear_layer|\.lora|_lora)\.up\.weight", UP, OLD_DIFFUSERS),
    (r"(\.lora_linear_layer|\.lora|_lora)(\.down)?\.alpha", ALPHA, OLD_DIFFUSERS), (r"\.alpha", ALPHA, None),
)]
# what other kinds of file hold, and why it cannot be taken for a LoRA
_OTHERS = [(re.compile(pattern), why) for pattern, why in (
    (r"\.dora_scale$|\.lora_magnitude_vector(\..*)?$", "DoRA: its magnitude has no place in a LoRA (up, down, alpha)"),
    (r"\.hada_\w+$", "LoHa (LyCORIS): not a LoRA"), (r"\.lokr_\w+$", "LoKr (LyCORIS): not a LoRA"),
    (r"\.(diff|diff_b|w_norm|b_norm|set_weight|set_bias)$", "a full difference of weights (or a norm): not a LoRA"),
    (r"\.(a1|a2|b1|b2)\.weight$", "GLoRA (LyCORIS): not a LoRA"), (r"\.(oft_\w+|boft_\w+|oft_blocks)$", "OFT (LyCORIS): not a LoRA"),
    (r"\.(on_input)$|\.weight_ia3$", "IA3 (LyCORIS): not a LoRA"), (r"\.scalar$", "a trained LyCORIS scalar: not a LoRA"),
    (r"lora_embedding_[AB]", "a LoRA of an embedding, which no Linear or convolution can take"),
    (r"(\.lora_(down|up|A|B)(\.[^.]+)?|\.layer)\.bias$", "a LoRA with a bias, which has no place in up, down, alpha"),
)]
_UNKNOWN = "no LoRA spelling known here"
_ANCESTOR = re.compile(r"(?:(?P<group>[^:]+):)?(?P<path>.+?)\.___\.(?P<part>.+)")
_ANCESTOR_PARTS = {"layer.W_down": DOWN, "layer.W_up": UP, "layer.lora_down.weight": DOWN, "layer.lora_up.weight": UP, "alpha": ALPHA}
_COMPONENTS = {"unet.": UNET, "denoiser.": UNET, "text_encoder.": TEXT, "text_encoder_2.": TEXT_2, "TE.": TEXT,
               "clip_L.": TEXT, "clip_B.": TEXT, "clip_bigG.": TEXT_2, "base_model.model.": None}  # clip_*: the ancestor's SDXL
_OLD_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Key:
    """What a key names. `path` is diffusers' module path, text encoders with `text_model.`; `group` is the ancestor's (`lora`, `lora_ema`)."""

    component: str
    path: str
    part: str
    spelling: str
    group: str = ""


class NotLora(ValueError):
    """A key that no LoRA spelling explains; the text says what it seems to be."""


def read_key(key: str, component: str | None = None) -> Key:
    """The Key that `key` spells. `component` is what the file's own metadata says it is for. NotLora where it is not understood."""
    if ".___." in key:
        return _ancestor(key, component)
    for pattern, why in _OTHERS:
        if pattern.search(key):
            raise NotLora(why)
    if re.match(r"(base|plugin|lora)(_ema)?:", key):
        raise NotLora("full weights (or a plugin's) of the first generation of this framework: not a LoRA")
    for pattern, part, spelling in _ENDINGS:
        match = pattern.search(key)
        if match:
            return _place(key[: match.start()], part, spelling, component)
    raise NotLora(_UNKNOWN)


def known(key: str) -> bool:
    """Whether the key is a LoRA's or a relative's (LoHa, DoRA ...), of which `read_key` says what it is."""
    try:
        read_key(key)
    except NotLora as why:
        return str(why) != _UNKNOWN
    return True


def _ancestor(key: str, component: str | None) -> Key:
    match = _ANCESTOR.fullmatch(key)
    part = _ANCESTOR_PARTS.get(match["part"]) if match else None
    if part is None:
        raise NotLora("a LoRA with a bias, which has no place in up, down, alpha" if match and match["part"] == "layer.bias" else _UNKNOWN)
    found, path = _split_component(match["path"], component)
    return Key(found, path, part, ANCESTOR, match["group"] or "")


def _place(stem: str, part: str, spelling: str | None, component: str | None) -> Key:
    if "." not in stem:
        named = _webui(stem)
        if named:
            return Key(*named[:2], part, named[2])
        if stem.startswith((*PREFIXES, "lora_", "lycoris_")):
            raise NotLora("no layer of Stable Diffusion 1.x, 2.x or XL has this name")
    found, path = _split_component(stem, component)
    if spelling == OLD_DIFFUSERS and path.endswith((".to_q", ".to_k", ".to_v", ".to_out")):
        path = _old_projection(path)
    return Key(found, path, part, spelling or (PEFT if "base_model.model." in stem else OURS))


def _old_projection(path: str) -> str:
    """`….attn1.processor.to_q` -> `….attn1.to_q`; `….self_attn.to_q` -> `….self_attn.q_proj`."""
    parent, name = path.replace(".processor.", ".").rsplit(".", 1)
    if parent.endswith("self_attn"):
        return f"{parent}.{_OLD_PROJECTIONS[name]}"
    return f"{parent}.to_out.0" if name == "to_out" else f"{parent}.{name}"


def _split_component(path: str, component: str | None) -> tuple[str, str]:
    while prefix := next((prefix for prefix in _COMPONENTS if path.startswith(prefix)), None):
        component, path = _COMPONENTS[prefix] or component, path.removeprefix(prefix)
    path = text_path(path) if component != UNET else path
    return component or (TEXT if path.startswith("text_model.") or path == "text_projection" else UNET), path


def _webui(stem: str) -> tuple[str, str, str] | None:
    """(component, path, spelling) of `lora_unet_...`, `lora_te_...`, `lycoris_...`."""
    if stem.startswith("lycoris_"):
        body = re.sub(r"^lycoris_(unet_|te_)?", "", stem)
        path, text = unet_path(body), clip_path(body)
        return (UNET, path, LYCORIS) if path else (TEXT, text, LYCORIS) if text else None
    for prefix, component in PREFIXES.items():
        if stem.startswith(prefix):
            body = stem.removeprefix(prefix)
            path = unet_path(body) if component == UNET else clip_path(body)
            return (component, path, WEBUI_LDM if component == UNET and is_ldm(body) else WEBUI) if path else None
    return None

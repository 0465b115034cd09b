"""Checks of values that need no torch: paths, patterns of layers, and what a `_target_` may be called. All faults are returned."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..model_names import is_hub_form, looks_local
from . import legacy, read
from .tree import dotted
from .walk import Leaf, shown_value

# Packages whose classes a `_target_` may name: ours, those we build on, and packages of optimizers.
ALLOWED = ("hcpdiff", "torch", "diffusers", "transformers", "accelerate", "peft",
           "prodigyopt", "bitsandbytes", "schedulefree", "pytorch_optimizer", "torchao", "dadaptation", "lion_pytorch")
# Arguments of the libraries' loaders that run code from outside: of a repository, of a pickle, of a kernel.
REFUSED_KEYS = ("trust_remote_code", "custom_pipeline", "custom_revision", "code_revision", "weights_only", "pickle_module", "use_kernels", "allow_all_kernels",
                "kernel_config")
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")  # 'name/name' is a kernel on the hub
TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$", re.ASCII)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
QUOTED = "It starts with a single quote. Quotes belong around the whole argument, once: \"key=some words\"; cmd.exe takes double quotes only"


def leaf_faults(leaves: Sequence[Leaf], allow: Sequence[str], carried: dict[tuple, Path]) -> list[str]:
    """Faults of the walked values; `carried` receives the files found among three places, by path of their key."""
    faults = []
    for leaf in leaves:
        if leaf.shape.key.slot and isinstance(leaf.value, dict):
            faults += [f"{fault} ({leaf.origin})" for fault in spec_faults(leaf.value, dotted(leaf.path), allow)]
        elif isinstance(leaf.value, str):
            fault = path_fault(leaf, carried)
            faults += [f"{dotted(leaf.path)} = {shown_value(leaf.value)} ({leaf.origin}) {fault}"] if fault else []
    return faults


def spec_faults(spec: dict, where: str, allow: Sequence[str] = ()) -> list[str]:
    """What is wrong with a `_target_` mapping before anything is imported, nested ones too."""
    if not isinstance(spec.get("_args_", []), list):
        return [f"{where}._args_ = {shown_value(spec['_args_'])} must be a list"]
    if "_target_" not in spec:
        return [f"{where} needs a _target_: the class to build, such as torch.optim.AdamW"]
    return _below(spec, where, tuple(allow))


def _below(value: Any, where: str, allow: tuple[str, ...]) -> list[str]:
    if isinstance(value, list):
        return [fault for index, item in enumerate(value) for fault in _below(item, f"{where}[{index}]", allow)]
    if not isinstance(value, dict):
        return []
    faults = []
    for name, item in value.items():
        if name in REFUSED_KEYS:
            faults.append(f"{where}.{name} is refused: it runs code from outside")
        elif name in KERNEL_KEYS and "/" in str(item):
            faults.append(f"{where}.{name} = {shown_value(item)} is refused: it runs code from outside; write sdpa or eager")
        elif name == "_target_":
            faults += target_name_fault(item, f"{where}._target_", allow)
        else:
            faults += _below(item, f"{where}.{name}", allow)
    return faults


def target_name_fault(target: Any, where: str, allow: Sequence[str] = ()) -> list[str]:
    """At most one fault: the name's form, or its package."""
    if not isinstance(target, str) or not TARGET.match(target):
        return [f"{where} = {shown_value(target)}: write package.module.Class"]
    if not allowed(target, allow):
        package, rest = target.split(".", 1)
        near = difflib.get_close_matches(package, ALLOWED, n=1, cutoff=0.75)
        hint = f"Nearest: {near[0]}.{rest}" if near else f"--allow-target {package} on the command line adds it (it runs that package's code)"
        return [f"{where} = '{target}': its package is not among those allowed ({', '.join(ALLOWED)}). {hint}"]
    return []


def allowed(name: str, allow: Sequence[str] = ()) -> bool:
    """Whether a dotted name lies in an allowed package."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in (*ALLOWED, *allow))


def path_fault(leaf: Leaf, carried: dict[tuple, Path]) -> str:
    """What is wrong with text that names a file, a folder or a model; '' when nothing is, or when it names none."""
    key, text = leaf.shape.key, leaf.value
    if not (key.path or key.exists) or text in leaf.shape.literals or text in key.words:
        return ""
    if CONTROL.search(text):
        shown = CONTROL.search(text)[0]
        return f"holds the control character {shown!r}: in YAML's double quotes a backslash starts an escape. Use single quotes, or / in paths"
    if text.startswith("'") and not os.path.exists(text) and not key.exists:
        return f"has quotes in it. {QUOTED}"
    fault = _existence(leaf, carried) if key.exists else "" if text else "is empty: name a path" + (" or write null" if leaf.shape.nullable else "")
    return f"{fault}. {QUOTED}" if fault and text.startswith("'") else fault


def _existence(leaf: Leaf, carried: dict[tuple, Path]) -> str:
    text, kind = leaf.value, leaf.shape.key.exists
    if not text:
        return "is empty: name one" + (" or write null" if leaf.shape.nullable else "")
    if kind == "model":
        if os.path.exists(text) or not looks_local(text) and not text.startswith("'"):
            return ""
        here = is_hub_form(text) and not text.startswith("'")
        why = f"looked for on the hub, since there is a folder {os.path.dirname(text)}/ here" if here else "the form of a hub id (name/name)"
        return f"is no folder or file here, and not {why}{_nearest(text)}"
    if kind == "carried":
        return _carried(leaf, carried)
    if kind == "file" and os.path.isdir(text):
        return "is a folder; a file is expected"
    if kind == "folder" and os.path.isfile(text):
        return "is a file; a folder is expected"
    return "" if os.path.exists(text) else f"does not exist (looked from {Path.cwd()})" + _nearest(text)


def _carried(leaf: Leaf, carried: dict[tuple, Path]) -> str:
    found = read.find(leaf.value, leaf.origin.file) or read.find(legacy.template_name(leaf.value))
    if found:
        carried[leaf.path] = found
        return ""
    return "is not there. Looked in " + ", ".join(dict.fromkeys(str(place.parent) for place in read.places(leaf.value, leaf.origin.file)))


def _nearest(text: str) -> str:
    """'. Nearest: x' for names beside a missing path."""
    folder, name = os.path.split(os.path.normpath(text))
    try:
        beside = os.listdir(folder or ".")
    except (OSError, ValueError):
        return ""
    found = difflib.get_close_matches(name, beside, n=2)
    return f". Nearest: {', '.join(os.path.join(folder, item) for item in found)}" if found else ""

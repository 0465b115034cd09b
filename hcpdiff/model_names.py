"""What a name of a model can be: a hub id, or a place on this machine."""

import os
import re

SINGLE = (".safetensors", ".ckpt")  # of single-file models


def is_hub_form(name: str) -> bool:
    """Whether it has the form of a hub id, name/name."""
    local = name.startswith((".", "/", "~")) or "\\" in name or re.match("[A-Za-z]:", name) or name.lower().endswith(SINGLE)
    return not local and name.count("/") == 1 and not name.endswith("/")


def looks_local(name: str) -> bool:
    """Whether it can only be a folder or a file: not of a hub id's form, or below a folder that is here."""
    return not is_hub_form(name) or os.path.isdir(os.path.dirname(name))

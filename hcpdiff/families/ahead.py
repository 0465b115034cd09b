"""Weights on their way from the disk while a command imports its libraries, which keeps one core busy for seconds and the disk not at all. No torch here."""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import HCPError
from .source import PARTS, on_this_machine
from .weight_file import folder_weights

_PIECE, _IN_FLIGHT = 1 << 20, 16  # bytes asked for at once, of which Linux takes as many as it reads ahead elsewhere; pieces that are waited for: others want the disk too


def weights_ahead(source: str, vae: str | None = None, revision: str | None = None, variant: str | None = None) -> list[Path]:
    """The files that a base model will be read from, as far as they are seen at once, in the order in which a run needs them: text encoders, UNet, VAE."""
    with suppress(HCPError, OSError, ValueError):
        place, other = on_this_machine(source, revision), [Path(vae)] if vae and Path(vae).is_file() else []
        if place.is_file():
            return [place, *other]
        parts = sorted((part for part in PARTS if (place / part / "config.json").is_file()), key=lambda part: not part.startswith("text"))
        found = [folder_weights(place / part, variant, part.startswith("text")) for part in parts if not (part == "vae" and vae)]
        return [file for weights in found if weights for file in weights.files] + other
    return []


def read_ahead(files: Sequence[Path]) -> threading.Thread:
    """Has the system read the files into its cache, beside this process; where it cannot be asked to, nothing happens. What cannot be read is told by who needs it."""
    thread = threading.Thread(target=_ask, args=(list(files),), name="hcpdiff-read-ahead", daemon=True)
    thread.start()
    return thread


def _ask(files: Sequence[Path]) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with suppress(OSError), open(path, "rb", buffering=0) as file:
            for number, start in enumerate(range(0, os.fstat(file.fileno()).st_size, _PIECE)):
                os.posix_fadvise(file.fileno(), start, _PIECE, os.POSIX_FADV_WILLNEED)
                if number >= _IN_FLIGHT:
                    os.pread(file.fileno(), 1, start - _IN_FLIGHT * _PIECE)

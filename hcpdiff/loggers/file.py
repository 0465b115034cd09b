"""`train.log` in the run folder: all that the console says, with times, as plain text."""

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import Logger, below, checked_name
from .console import progress_line


class FileLogger(Logger):
    """Appends to `<run folder>/train.log`; what is said before the folder exists is kept and written then."""

    def __init__(self, name: str = "train.log"):
        self.name, self.file, self.waiting, self.total = checked_name(name, "name"), None, [], 0

    def open(self, folder: Path, first_step: int, total_steps: int) -> None:
        self.total = total_steps
        path = below(folder, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", encoding="utf-8", errors="backslashreplace")
        for line in self.waiting:
            self.file.write(line)
        self.waiting.clear()
        self.file.flush()

    def say(self, renderable: Any) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        text = renderable if isinstance(renderable, str) else "\n" + _plain(renderable)
        line = f"{stamp} {text}\n"
        if self.file is None:
            self.waiting.append(line)
        else:
            self.file.write(line)
            self.file.flush()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        self.say(progress_line(step, self.total, values))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _plain(renderable: Any) -> str:
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=160, color_system=None).print(renderable)
    return buffer.getvalue().rstrip()

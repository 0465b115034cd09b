"""Progress on the terminal: a live bar where there is one, a line per interval where output goes to a file."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import Logger


def duration(seconds: float) -> str:
    """1:02:03 or 02:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


def progress_line(step: int, total: int, values: Mapping[str, float]) -> str:
    """`step 20/100  loss 0.1234  lr 6.00e-04  1.52 steps/s  left 00:53`."""
    parts = [f"step {step}/{total}"]
    parts += [f"{name} {_number(name, value)}" for name, value in values.items() if name not in ("speed", "left", "epoch")]
    if "epoch" in values:
        parts.insert(1, f"epoch {values['epoch']:.2f}")
    if "speed" in values:
        parts.append(f"{values['speed']:.2f} steps/s")
    if "left" in values:
        parts.append(f"left {duration(values['left'])}")
    return "  ".join(parts)


def fitting(parts: Sequence[str], room: int) -> str:
    """The parts that fit into `room` characters; the loss is the last that is left out."""
    kept = list(parts)
    for least in ("grad_norm", "lr", "", "epoch", "loss"):  # "": whatever else there is
        for part in [part for part in reversed(kept) if part.startswith(least) and (least or not part.startswith(("epoch", "loss")))]:
            if len("  ".join(kept)) > room:
                kept.remove(part)
    return "  ".join(kept)


def _number(name: str, value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2e}" if name.startswith("lr") else f"{value:.4f}"


class ConsoleLogger(Logger):
    """Tables, lines and a progress bar on standard output."""

    def __init__(self):
        from rich.console import Console

        width = None if sys.stdout.isatty() else 150  # a log file has no width of its own
        self.console = Console(width=width, soft_wrap=False, legacy_windows=False)
        self.bar, self.total, self.room = None, 0, 0

    def open(self, folder: Path, first_step: int, total_steps: int) -> None:
        self.total = total_steps
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        bar = max(10, min(40, self.console.width - 80))
        self.room = self.console.width - bar - len(f"training {total_steps}/{total_steps} 00:00:00 left 00:00:00 ") - 4
        self.bar = Progress(TextColumn("training"), BarColumn(bar), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
                            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console)
        self.task = self.bar.add_task("training", total=total_steps, completed=first_step, status="")
        self.bar.start()

    def say(self, renderable: Any) -> None:
        self.console.print(renderable, markup=False, highlight=False) if isinstance(renderable, str) else self.console.print(renderable)

    def advance(self, step: int) -> None:
        if self.bar is None:
            return
        self.bar.update(self.task, completed=step)
        if step == self.total:  # what is said from here on stands below the bar
            self.close()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        if self.bar is None:
            self.say(progress_line(step, self.total, values))
        else:  # which has counted the steps itself, and what is left
            line = progress_line(step, self.total, {name: value for name, value in values.items() if name != "left"})
            self.bar.update(self.task, status=fitting(line.split("  ")[1:], self.room))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

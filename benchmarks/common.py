"""What the benchmarks share: figures as ratios of pairs, the hardware in words, a table, a JSON file.

A figure is a list of ratios, one of each pair of measurements that were taken one after the other in one run, and the bound that it is held against.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "sd15-random"  # where make_full_size.py writes
sys.path.insert(0, str(ROOT))


@dataclass
class Figure:
    """One line of the table: `what` against `reference`. `ratios`: of the pairs; `bound`: with `at_least` the smallest, else the largest that is wanted;
    None: there is no bound. `values`: medians of what was measured, with their units in the names."""

    what: str
    reference: str
    ratios: list[float]
    bound: float | None = None
    at_least: bool = False
    values: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The figure."""
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        """hit or missed."""
        if self.bound is None:
            return ""
        return "hit" if (self.median >= self.bound if self.at_least else self.median <= self.bound) else "missed"

    def cells(self) -> tuple[str, ...]:
        """what, reference, figure, bound, verdict, values."""
        spread = f"{self.median:.3g} ({min(self.ratios):.3g} to {max(self.ratios):.3g}, {len(self.ratios)} pairs)" if len(self.ratios) > 1 else f"{self.median:.3g}"
        bound = "" if self.bound is None else f"{'≥' if self.at_least else '≤'} {self.bound:g}"
        return self.what, self.reference, spread, bound, self.verdict, ", ".join(f"{name} {value:.3g}" for name, value in self.values.items())


COLUMNS = ("what", "against", "ratio: median (range)", "goal", "", "medians")


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Quotients of pairs."""
    return [a / b for a, b in zip(over, under, strict=True)]


def in_turn(works: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each work in each round; the order turns from round to round. `warm` rounds before do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(-warm, rounds):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            took = timed(works[name], device)
            if number >= 0:
                seconds[name].append(took)
    return seconds


def timed(work: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, the device waited for before and after."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: str) -> None:
    """Until a GPU has done what it was asked for."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def hardware(device: str = "cpu") -> str:
    """Processor or GPU, cores, memory, torch, and the day."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    what = torch.cuda.get_device_name() if device != "cpu" else f"{cores} cores of {_processor()}"
    return f"{what}, {torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.date.today()}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), platform.machine())


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--rounds", type=int, default=rounds, help="pairs that count")
    made.add_argument("--threads", type=int, help="of torch on the CPU (default: its own choice)")
    made.add_argument("--json", type=Path, help="also write the figures into this file")
    return made


def show(title: str, figures: Sequence[Figure], args: argparse.Namespace) -> None:
    """Prints the figures and writes them where `--json` says."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, title=f"{title}; {hardware(args.device)}")
    for figure in figures:
        table.add_row(*figure.cells())
    Console(width=160).print(table)
    if args.json:
        args.json.write_text(json.dumps({"title": title, "hardware": hardware(args.device), "figures": [asdict(figure) for figure in figures]}, indent=1), "utf-8")


def read(path: Path) -> tuple[str, list[Figure]]:
    """(hardware, figures) of such a file."""
    found = json.loads(path.read_text("utf-8"))
    return found["hardware"], [Figure(**figure) for figure in found["figures"]]

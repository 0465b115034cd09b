"""What the benchmarks share: figures as ratios of pairs, the hardware in words, a table, a JSON file.

A figure is a list of ratios, one of each pair of measurements that were taken one after the other in one run, and the bound that it is held against.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "sd15-random"  # where make_full_size.py writes
MIB = 2**20
sys.path.insert(0, str(ROOT))


@dataclass
class Figure:
    """One line of the table: `what` against `reference`. `ratios`: of the pairs, none where it could not be measured, and `note` says why; `bound`: with
    `at_least` the smallest, else the largest that is wanted; None: there is no bound. `every`: each pair has to keep it strictly, not only the median.
    `values`: medians of what was measured, with their units in the names."""

    what: str
    reference: str
    ratios: list[float]
    bound: float | None = None
    at_least: bool = False
    values: dict[str, float] = field(default_factory=dict)
    every: bool = False
    note: str = ""

    @property
    def median(self) -> float:
        """The figure."""
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        """hit, missed or open; empty without a bound."""
        if self.bound is None:
            return ""
        if not self.ratios:
            return "open"
        if self.every:
            kept = min(self.ratios) > self.bound if self.at_least else max(self.ratios) < self.bound
        else:
            kept = self.median >= self.bound if self.at_least else self.median <= self.bound
        return "hit" if kept else "missed"

    def cells(self) -> tuple[str, ...]:
        """what, reference, figure, bound, verdict, values."""
        return self.what, self.reference, self._spread(), self._goal(), self.verdict, ", ".join(f"{name} {value:.3g}" for name, value in self.values.items())

    def _spread(self) -> str:
        if not self.ratios:
            return self.note or "not measured"
        several = f" ({min(self.ratios):.3g} to {max(self.ratios):.3g}, {len(self.ratios)} pairs)" if len(self.ratios) > 1 else ""
        return f"{self.median:.3g}{several}"

    def _goal(self) -> str:
        if self.bound is None:
            return ""
        if self.every:
            return f"{'>' if self.at_least else '<'} {self.bound:g} in every pair"
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{' (median)' if len(self.ratios) > 1 else ''}"


COLUMNS = ("what", "against", "ratio: median (range)", "goal", "", "medians")


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Quotients of pairs."""
    return [a / b for a, b in zip(over, under, strict=True)]


def turned(names: Iterable[str], number: int) -> list[str]:
    """The names in the order of this round: another begins in each."""
    names = list(names)
    first = number % len(names) if names else 0
    return [*names[first:], *names[:first]]


def in_turn(works: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warm: int = 1, each: int = 1) -> dict[str, list[float]]:
    """Seconds of a call of each work in each round, timed over `each` of them; the order turns from round to round. `warm` rounds before do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-warm, rounds):
        for name in turned(works, number):
            took = timed(works[name], device, each)
            if number >= 0:
                seconds[name].append(took)
    return seconds


def timed(work: Callable[[], object], device: str = "cpu", each: int = 1) -> float:
    """Seconds of a call, over `each` of them; the device is waited for before the first and after the last."""
    wait(device)
    started = time.perf_counter()
    for _ in range(each):
        work()
    wait(device)
    return (time.perf_counter() - started) / each


def steps_a_turn(step: Callable[[], object], device: str) -> int:
    """How many steps are timed together, the device waited for at their ends only: one on a CPU, on a GPU about a second, at most ten."""
    return 1 if device == "cpu" else min(10, math.ceil(1 / timed(step, device)))


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


def hide_gpus(words: Sequence[str]) -> None:
    """Without `--device` of a GPU among these words, this process and those that it starts see none: a run would train there. Before torch looks for them."""
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("--device", default="cpu")
    if known.parse_known_args(words)[0].device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # a benchmark is what was started, not a test that imports one
    hide_gpus(sys.argv[1:])


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

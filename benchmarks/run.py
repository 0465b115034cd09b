"""Every benchmark, one after the other, and one table of all their figures.

    python benchmarks/run.py                          # on this CPU; about an hour on two cores
    python benchmarks/run.py --device cuda            # on a GPU: its own sizes, and what only a GPU has
    python benchmarks/run.py --only step loop --rounds 3
    python benchmarks/run.py --keep build/figures     # what is measured is kept there, and not measured again by the next call
    python benchmarks/run.py --write                  # also puts the table into docs/performance.md
    python benchmarks/run.py --device cuda --only first --keep build/figures --seconds 480    # what tells most, in pieces of eight minutes

Each figure is a ratio against a named reference in the same run: pairs in turn, median and range. Nothing else should run on the machine. Benchmarks are sorted
by how much they tell, those of a GPU above all: where time comes in pieces, --keep goes on where the piece before ended, and --seconds ends a piece with the
table of what is there. What each benchmark printed stands beside its figures. A kept figure stays when the code changes: delete its file to have it measured
again; a table whose figures are of other code than this names its commits, a tree that was changed since by a hash after the plus.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from common import COLUMNS, ROOT, Figure, read

HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "performance.md"

# name -> command lines, on a CPU and on a GPU
CPU = {
    "step": ["step.py --pixels 512 --ways floor loop ours --rounds 5", "step.py --pixels 512 --batch 4 --ways floor loop ours --rounds 3",
             "step.py --pixels 256 --ways floor loop example hooks ours --rounds 5"],
    "layers": ["layers.py --threads 1"],
    "loop": ["loop.py --pixels 256 --rounds 20 --block 1", "loop.py --tiny --pixels 64 --rounds 5 --block 60"],
    "memory": ["memory.py --pixels 256", "memory.py --pixels 512", "memory.py --pixels 512 --checkpointing"],
    "start": ["start.py --rounds 7", "start.py --tiny --rounds 7", "start.py --cold --rounds 3"],
    "caching": ["caching.py --pixels 256 --images 6 --rounds 3"],
    "drawing": ["drawing.py --pixels 128 --steps 4 --pictures 1 --rounds 15", "drawing.py --pixels 256 --steps 4 --pictures 1 --rounds 7"],
    "data": ["data_scale.py --images 25000 100000", "data_scale.py --simulate", "data_scale.py --simulate --first --images 100000 1000000"],
    "quantized": ["quantized.py --pixels 256 --rounds 3", "quantized.py --model demo/model --pixels 64"],
}
HALF = "step.py --dtype bf16 --rounds 5"
SD1, SDXL = f"{HALF} --family sd1 --pixels 512", f"{HALF} --family sdxl --pixels 1024"
PLAIN, ALL = "--ways floor loop loop-plain ours", "--ways floor loop loop-plain example hooks ours"
QUANTIZED, COMPILED = "quantized.py --dtype bf16 --rounds 5", f"--compile {PLAIN}"  # compiling takes minutes for each way, so no more are compiled
STEPS = [f"{SD1} --batch 1 {ALL}", f"{SD1} --batch 8 {PLAIN}", f"{SDXL} --batch 1 {PLAIN}", f"{SD1} --batch 1 {COMPILED}"]
CUDA = {
    "first": [STEPS[0], "gpu_tests.py", STEPS[1], STEPS[2], f"{QUANTIZED} --family sdxl --pixels 1024 --batch 1", STEPS[3]],  # no model is written to disk for these
    "tests": ["gpu_tests.py", "gpu_tests.py --long"],
    "step": STEPS,
    "loop": ["loop.py --pixels 512 --rounds 7 --block 20", "loop.py --pixels 512 --rounds 7 --block 20 --compile", "loop.py --tiny --pixels 64 --rounds 7 --block 60"],
    "quantized": [f"{QUANTIZED} {sizes}" for sizes in ("--family sdxl --pixels 1024 --batch 1", "--family sdxl --pixels 1024 --batch 8 --checkpointing",
                  "--family sd1 --pixels 512 --batch 1", "--family sd1 --pixels 512 --batch 8")],
    "memory": ["memory.py --pixels 512 --dtype bf16", "memory.py --pixels 512 --dtype bf16 --batch 8"],
    "more": [f"{SDXL} --batch 8 --checkpointing {PLAIN}", f"{SDXL} --batch 1 {COMPILED}", f"{SD1} --batch 8 --checkpointing {PLAIN}",
             f"{SDXL} --batch 1 --checkpointing {PLAIN}"],
    "drawing": [f"drawing.py --pixels 512 --steps 10 --pictures 4 --rounds 3 {more}" for more in ("--dtype fp16 --batch 1", "--dtype fp16 --batch 4", "--dtype fp32 --batch 4")],
    "caching": ["caching.py --pixels 512 --images 96 --rounds 3"],
}


@dataclass
class Table:
    """The figures of one machine, with the days on which they were measured and the code that was."""

    machine: str
    days: list[str]
    codes: list[str]
    figures: list[Figure]

    def markdown(self, code: str) -> str:
        """For the page. `code`: of this checkout."""
        found = [*dict.fromkeys(self.codes)]
        commits = "" if found == [code] else f", code of {' and '.join(found)}"
        rows = [COLUMNS, ["---"] * len(COLUMNS), *(figure.cells() for figure in self.figures)]
        return f"### {', '.join([self.machine, *dict.fromkeys(self.days)])}{commits}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def code_of(root: Path) -> str:
    """The commit of a checkout, and a hash of what was changed since in what is measured; unknown where it is none."""
    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(root), *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout

    try:
        commit, changes = git("rev-parse", "--short", "HEAD").decode().strip(), git("diff", "HEAD", "--", "hcpdiff", "benchmarks")
        for name in git("ls-files", "-oz", "--exclude-standard", "--", "hcpdiff", "benchmarks").split(b"\0")[:-1]:
            changes += name + b"\0" + hashlib.sha256((root / os.fsdecode(name)).read_bytes()).digest()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (f"+{hashlib.sha256(changes).hexdigest()[:7]}" if changes else "")


def run(command: str, args: argparse.Namespace, place: Path, until: float) -> bool:
    """Measures one command line in a process of its own that is ended at `until`; what it prints goes on. Whether its figures are at `place` afterwards: there
    are none where it failed or was not done. A file that is there already stays."""
    script, *options = command.split()
    if args.rounds:
        options = re.sub(r" --rounds \d+", "", " " + " ".join(options)).split() + ["--rounds", str(args.rounds)]
    made = place.with_suffix(".part")
    more = ["--device", args.device, "--json", str(made), *(["--threads", str(args.threads)] if args.threads else [])]
    print(f"\n== {command}", flush=True)
    if place.is_file():
        print(f"measured before: {place}", flush=True)
        return True
    started, code = time.monotonic(), code_of(ROOT)
    if started >= until:
        print("no time left", flush=True)
        return False
    status = follow([sys.executable, str(HERE / script), *options, *more], place.with_suffix(".log"), until - started)
    if status or not made.is_file():
        print(f"== {command} {'was not done in time' if time.monotonic() >= until else 'failed'}", flush=True)
        return False
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    made.write_text(json.dumps(json.loads(made.read_text("utf-8")) | {"code": code}, indent=1), "utf-8")
    made.replace(place)
    return True


def follow(command: list[str], log: Path, seconds: float) -> int:
    """Runs a program and hands on what it prints, which `log` holds too; its exit status. It and what it has started end with this, and after so many seconds."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as program:
        timer = threading.Timer(seconds, end, [program]) if math.isfinite(seconds) else None
        try:
            if timer:
                timer.start()
            while part := program.stdout.read1(1 << 16):
                file.write(part)
                file.flush()
                print(part.decode("utf-8", "replace"), end="", flush=True)
            return program.wait()
        finally:
            if timer:
                timer.cancel()
            if program.poll() is None:
                end(program)


def end(program: subprocess.Popen) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)


def place_of(command: str, args: argparse.Namespace, folder: Path) -> Path:
    """Where the figures of a command line go."""
    rounds = f" rounds {args.rounds}" if args.rounds else ""
    return folder / (re.sub(r"[^\w.]+", "-", f"{args.device} {command}{rounds}").replace(".py", "") + ".json")


def derived(figures: list[Figure]) -> list[Figure]:
    """What two figures of a run say together: images a second of a step of 8 to those of a step of 1. The goal is SD1.5's at 512 px, in half precision and not
    compiled; where only one of its two was measured, it is named as open."""
    seconds = {figure.what: figure.values.get("ours s") for figure in figures if figure.what.startswith("step, ") and figure.reference == "floor"}
    made = []
    for one in dict.fromkeys(what.replace("batch 8 ", "batch 1 ") for what in seconds if re.search("batch [18] ", what)):
        eight, wanted = one.replace("batch 1 ", "batch 8 "), re.fullmatch("step, sd1 512 px batch 1 (bf16|fp16)", one)
        if lacking := [what for what in (one, eight) if not seconds.get(what)]:
            made += [Figure(f"images a second, {eight.removeprefix('step, ')}", "batch 1", [], 4.0, True, note=f"not measured: {', '.join(lacking)}")] if wanted else []
            continue
        rates = {f"at {size}, images/s": size / seconds[what] for size, what in ((8, eight), (1, one))}
        made.append(Figure(f"images a second, {eight.removeprefix('step, ')}", "batch 1", [8 * seconds[one] / seconds[eight]], 4.0 if wanted else None, True, rates))
    return made


def write(name: str, text: str) -> None:
    """Replaces what the page has between the marks of this name."""
    begin, end = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
    page = PAGE.read_text("utf-8")
    if begin not in page:
        sys.exit(f"error: {PAGE} has no line {begin}")
    before, _, rest = page.partition(begin)
    PAGE.write_text(f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}", "utf-8")


def chosen(args: argparse.Namespace) -> list[str]:
    """The command lines; SystemExit where a name has none on this device."""
    commands = CPU if args.device == "cpu" else CUDA
    if unknown := [name for name in args.only or () if name not in commands]:
        sys.exit(f"error: --only {' '.join(unknown)}: there is no such benchmark for --device {args.device}; there are {', '.join(commands)}")
    return list(dict.fromkeys(command for name in args.only or commands for command in commands[name]))


def measure(commands: list[str], args: argparse.Namespace, folder: Path) -> tuple[list[Table], list[str]]:
    """(a table for each machine, command lines that gave no figures)."""
    tables, failed, until = {}, [], time.monotonic() + (args.seconds or math.inf)
    for command in commands:
        place = place_of(command, args, folder)
        if not run(command, args, place, until):
            failed.append(command)
            continue
        hardware, figures = read(place)
        machine, _, day = hardware.rpartition(", ")
        table = tables.setdefault(machine, Table(machine, [], [], []))
        table.days.append(day)
        table.codes.append(json.loads(place.read_text("utf-8")).get("code", "unknown"))
        table.figures += figures
    for table in tables.values():
        table.figures += derived(table.figures)
    return list(tables.values()), failed


def main() -> None:
    """Runs them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=CPU | CUDA, metavar="NAME", help=f"some of {', '.join(CPU | CUDA)}")
    parser.add_argument("--rounds", type=int, help="pairs of each figure, in the place of each one's own number")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where figures are kept; what is there is not measured again")
    parser.add_argument("--seconds", type=float, help="after so long the benchmark that runs is ended, and no other begins")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that a benchmark that runs ends too
    commands = chosen(args)
    with tempfile.TemporaryDirectory() as place:
        folder = (args.keep or Path(place)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        tables, failed = measure(commands, args, folder)
    if not tables:
        sys.exit(f"error: no benchmark gave figures: {'; '.join(failed)}")
    code, figures = code_of(ROOT), [figure for table in tables for figure in table.figures]
    text = "\n".join(table.markdown(code) for table in tables)
    print(f"\n{text}")
    if args.write:
        write(args.device, text)
    for verdict, words in (("missed", "miss their goal"), ("open", "could not be measured")):
        found = [f"{figure.what} ({figure.reference})" for figure in figures if figure.verdict == verdict]
        print(f"{len(found)} of {len(figures)} figures {words}{': ' + '; '.join(found) if found else ''}")
    if failed:
        sys.exit(f"error: {len(failed)} benchmarks gave no figures: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

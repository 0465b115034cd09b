"""Every benchmark, one after the other, and one table of all their figures.

    python benchmarks/run.py                          # on this CPU; about an hour on two cores
    python benchmarks/run.py --device cuda            # on a GPU: its own sizes, and what only a GPU has
    python benchmarks/run.py --only step loop --rounds 3
    python benchmarks/run.py --write                  # also puts the table into docs/performance.md

Each figure is a ratio against a named reference in the same run: pairs in turn, median and range. Nothing else should run on the machine.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import COLUMNS, ROOT, Figure, read

HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "performance.md"

# name -> command lines, on a CPU and on a GPU
CPU = {
    "step": ["step.py --pixels 512 --ways floor loop ours --rounds 5", "step.py --pixels 512 --batch 4 --ways floor loop ours --rounds 2",
             "step.py --pixels 256 --ways floor loop example hooks ours --rounds 3"],
    "loop": ["loop.py --pixels 256"],
    "memory": ["memory.py --pixels 256", "memory.py --pixels 512", "memory.py --pixels 512 --checkpointing"],
    "start": ["start.py --rounds 3", "start.py --tiny --rounds 3"],
    "caching": ["caching.py --pixels 256 --images 6 --rounds 2"],
    "drawing": ["drawing.py --pixels 256 --steps 4 --rounds 3"],
    "data": ["data_scale.py --images 25000 100000", "data_scale.py --simulate", "data_scale.py --simulate --first --images 100000 1000000"],
    "quantized": ["quantized.py --pixels 256 --rounds 3", "quantized.py --model demo/model --pixels 64"],
}
CUDA = {
    "step": [f"step.py --family {family} --pixels {pixels} --batch {batch} --dtype bf16 --ways floor loop hooks ours --rounds 7{more}"
             for family, pixels in (("sd1", 512), ("sdxl", 1024)) for batch in (1, 8) for more in ("", " --compile")],
    "loop": ["loop.py --pixels 512 --batch 1", "loop.py --pixels 512 --batch 8"],
    "caching": ["caching.py --pixels 512 --images 192 --rounds 3"],
    "drawing": [f"drawing.py --dtype {dtype} --pixels 512 --steps 20 --pictures 8 --batch {batch}" for dtype in ("fp32", "fp16") for batch in (1, 4)],
    "quantized": [f"quantized.py --family {family} --pixels {pixels} --batch {batch} --dtype bf16" for family, pixels in (("sd1", 512), ("sdxl", 1024)) for batch in (1, 8)],
}


def run(command: str, args: argparse.Namespace, place: Path) -> tuple[str, list[Figure]]:
    """(hardware, figures) of one command line, in a process of its own; what it prints goes on. No figures where it failed."""
    script, *options = command.split()
    if args.rounds:
        options = re.sub(r" --rounds \d+", "", " " + " ".join(options)).split() + ["--rounds", str(args.rounds)]
    more = ["--device", args.device, "--json", str(place), *(["--threads", str(args.threads)] if args.threads else [])]
    print(f"\n== {command}", flush=True)
    place.unlink(missing_ok=True)
    if subprocess.run([sys.executable, str(HERE / script), *options, *more], cwd=ROOT).returncode or not place.is_file():
        print(f"== {command} failed", flush=True)
        return "", []
    return read(place)


def derived(figures: list[Figure]) -> list[Figure]:
    """What two figures of a run say together: images a second of a step of 8 to those of a step of 1."""
    seconds = {figure.what: figure.values["ours s"] for figure in figures if figure.what.startswith("step, ") and figure.reference == "floor"}
    pairs = [(what, took, seconds.get(what.replace("batch 1 ", "batch 8 "))) for what, took in seconds.items() if "batch 1 " in what]
    return [Figure(f"images a second, {what.removeprefix('step, ').replace('batch 1 ', 'batch 8 ')}", "batch 1", [8 * one / eight], 4.0, at_least=True) for what, one, eight in pairs if eight]


def markdown(hardware: str, figures: list[Figure]) -> str:
    """The table for the page."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(figure.cells() for figure in figures)]
    return f"### {hardware}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write(name: str, text: str) -> None:
    """Replaces what the page has between the marks of this name."""
    begin, end = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
    page = PAGE.read_text("utf-8")
    if begin not in page:
        sys.exit(f"error: {PAGE} has no line {begin}")
    before, _, rest = page.partition(begin)
    PAGE.write_text(f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}", "utf-8")


def main() -> None:
    """Runs them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=CPU | CUDA, metavar="NAME", help=f"some of {', '.join(CPU | CUDA)}")
    parser.add_argument("--rounds", type=int, help="pairs of each figure, in the place of each one's own number")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    figures, hardware, failed = [], "", []
    commands = CPU if args.device == "cpu" else CUDA
    with tempfile.TemporaryDirectory() as place:
        for command in [command for name in args.only or commands for command in commands.get(name, [])]:
            machine, found = run(command, args, Path(place) / "figures.json")
            figures, hardware, failed = figures + found, machine or hardware, failed + ([] if found else [command])
    figures += derived(figures)
    table = markdown(hardware, figures)
    print(f"\n{table}")
    if args.write:
        write(args.device, table)
    missed = [figure.what for figure in figures if figure.verdict == "missed"]
    print(f"{len(figures)} figures, {len(missed)} miss their goal{': ' + '; '.join(missed) if missed else ''}")
    if failed:
        sys.exit(f"error: {len(failed)} benchmarks gave no figures: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

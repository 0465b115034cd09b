"""How long the start needs to know a large folder: index, captions, sizes and the plan of an epoch, and how much memory each image takes.

    python benchmarks/data_scale.py [--images 25000 50000 100000] [--folder FOLDER]

Makes the folder once (one small picture of each of 50 sizes, under other names, each with a caption) and indexes it in a process of its own
for each number. No picture is decoded: only headers are read.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CONFIG = """
_base_: [{root}/cfgs/train/examples/lora_conventional.yaml]
model: {{pretrained_model_name_or_path: '{root}/demo/model'}}
data:
  one:
    batch_size: 4
    source: {{a: {{img_root: '{folder}', caption_file: '{folder}', word_names: {{pt1: thing}}}}}}
    bucket: {{target_area: 262144, num_bucket: 10}}
"""


def make_folder(folder: Path, count: int) -> None:
    """`count` pictures and captions; those that are there stay."""
    from PIL import Image

    kinds = []
    for number in range(50):
        path = folder / f"kind{number}.png"
        Image.new("RGB", (400 + 8 * number, 800 - 7 * number), (number, 9, 9)).save(path)
        kinds.append(path.read_bytes())
        path.unlink()
    for number in range(count):
        place = folder / f"{number // 1000:04d}"
        place.mkdir(exist_ok=True)
        (place / f"{number}.png").write_bytes(kinds[number % 50])
        (place / f"{number}.txt").write_text(f"a caption of some twelve words for the picture with the number {number}", "utf-8")


def index(folder: Path, count: int) -> dict:
    """Seconds and bytes of the index of the first `count` images, the plan of an epoch, and a thousand steps' lookups."""
    import tracemalloc

    from hcpdiff.config.load import load
    from hcpdiff.data.dataset import build_train_data

    config = folder.parent / f"cfg-{count}.yaml"
    config.write_text(CONFIG.format(root=ROOT.as_posix(), folder=folder.as_posix()), "utf-8")
    data_config = load(str(config)).config.data
    tracemalloc.start()
    build = lambda: build_train_data(data_config, seed=1, micro_per_step=1)  # noqa: E731
    before = tracemalloc.get_traced_memory()[0]
    data = build()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    del data
    started = time.perf_counter()
    data = build()
    indexed = time.perf_counter() - started
    started = time.perf_counter()
    steps = data.plan.steps(data.plan.start_of(0), 0)
    for _ in range(1000):
        step, _ = next(steps)
        for micro in step.micro:
            [data.maker.prompt(ref) for ref in micro.samples]
    return {"images": data.images, "seconds": indexed, "bytes": held / data.images, "lookups": time.perf_counter() - started}


def main() -> None:
    """Makes the folders, measures each in a process of its own, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where the pictures go and stay (default: a temporary folder)")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(index(args.one, args.images[0])))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("images", "index (s)", "per 1000 images (s)", "memory per image (bytes)", "1000 steps of 4 prompts (s)")
    with tempfile.TemporaryDirectory() as place:
        for count in args.images:
            folder = (args.folder or Path(place)) / str(count)
            if not folder.is_dir():
                folder.mkdir(parents=True)
                make_folder(folder, count)
            out = subprocess.run([sys.executable, __file__, "--one", str(folder), "--images", str(count)], stdout=subprocess.PIPE, text=True, check=True).stdout
            found = json.loads(out.splitlines()[-1])
            table.add_row(f"{found['images']:,}", f"{found['seconds']:.1f}", f"{1000 * found['seconds'] / found['images']:.2f}", f"{found['bytes']:.0f}", f"{found['lookups']:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

"""What a large folder costs before the first step: index, captions, sizes, the plan of an epoch, prompts, and the caches of a second start.

    python benchmarks/data_scale.py                                     # folders of 25,000 to 100,000 small pictures, made once
    python benchmarks/data_scale.py --simulate                          # no pictures: names, headers and the state of files are made up
    python benchmarks/data_scale.py --simulate --first --images 100000 1000000

Each number of images is measured in a process of its own, once in each of the --rounds. No picture is decoded: only headers are read, and of real ones the samples that tell a resumed run
whether they have changed, with the highest that both hold meanwhile, in a pass that is not timed. Simulated, everything that asks the disk for an
image is left out, so the figures show what we add and how it grows; a disk cache of as many entries is there as well (index and memo of hashes as they are on
disk, one payload for each size), and a second start goes through it; it reads and checks every entry, 131 KB each, which a fast disk or many cores shorten.
"""

import argparse
import ctypes
import gc
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from common import ROOT, Figure, parser, show

CONFIG = """
_base_: [{root}/cfgs/train/examples/lora_conventional.yaml]
model: {{pretrained_model_name_or_path: '{root}/demo/model'}}
data:
  one:
    batch_size: 4
    cache_latents: disk
    cache_dir: '{cache}'
    source: {{a: {{img_root: '{folder}', caption_file: '{captions}', word_names: {{pt1: thing}}}}}}
    bucket: {{target_area: 262144, num_bucket: 10}}
"""
LOOKUPS = 4000


def make_folder(folder: Path, count: int) -> None:
    """`count` pictures and captions: one small picture of each of 50 sizes, under other names; those that are there stay."""
    from PIL import Image

    kinds = []
    for number in range(50):
        path = folder / f"kind{number}.png"
        Image.new("RGB", size(number), (number, 9, 9)).save(path)
        kinds.append(path.read_bytes())
        path.unlink()
    for number in range(count):
        place = folder / f"{number // 1000:04d}"
        place.mkdir(exist_ok=True)
        (place / f"{number}.png").write_bytes(kinds[number % 50])
        (place / f"{number}.txt").write_text(caption(number), "utf-8")


def size(number: int) -> tuple[int, int]:
    """(width, height) of one of 50 kinds."""
    return 400 + 8 * (number % 50), 800 - 7 * (number % 50)


def caption(number: int) -> str:
    """Twelve words."""
    return f"a caption of some twelve words for the picture with the number {number}"


def held() -> int:
    """Bytes of this process that no file backs, without what was let go; 0 where the system does not say."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/smaps_rollup") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("Anonymous:"))
    except (OSError, AttributeError):
        return 0


def made_up(stack: ExitStack, folder: Path, count: int) -> None:
    """Names, headers and files' states without files."""
    from hcpdiff.data import hashes, image, source

    names = [f"{number // 1000:04d}/{number}.png" for number in range(count)]
    stack.enter_context(mock.patch.object(source, "list_below", lambda *_: names))
    stack.enter_context(mock.patch.object(image, "read_header", lambda path: size(int(Path(path).stem))))
    state = SimpleNamespace(st_size=1, st_mtime_ns=1, st_ctime_ns=1, st_ino=1, st_dev=1)
    stack.enter_context(mock.patch.object(hashes, "os", SimpleNamespace(stat=lambda path: state, path=hashes.os.path, name=hashes.os.name)))
    (folder / "captions.jsonl").write_text("".join(json.dumps({"file_name": name, "text": caption(number)}) + "\n" for number, name in enumerate(names)), "utf-8")


def fill_cache(data, cache: Path) -> None:
    """Index and memo of hashes of a run that has cached every image, in 20 packs; entries of one size have the same payload."""
    import numpy as np
    import safetensors.torch
    import torch

    from hcpdiff.data import hashes, pack
    from hcpdiff.data.latent_cache import DiskStore

    one, draws = data.datasets[0], random.Random(0)
    payloads = [safetensors.torch.save({name: torch.zeros(4, height // 8, width // 8) for name in ("mean", "std")}) for width, height in one.bucket_sizes]
    digests = [pack.payload_digest(payload) for payload in payloads]
    ends = [0, *itertools.accumulate(map(len, payloads))]
    store = DiskStore(cache, one, "vae", 8, 4)
    store.digests = {image: (draws.randbytes(32), None) for image in range(len(one))}
    store.packs.folder.mkdir(parents=True)
    for part in range(20):
        images = range(part, len(one), 20)
        records = np.array([(store.keys(image)[0], ends[kind], len(payloads[kind]), digests[kind]) for image, kind in ((image, one.assigned[image]) for image in images)], dtype=pack._RECORD)
        body, name = records.tobytes(), store.packs.folder / f"{part:020d}-0"
        name.with_suffix(".pack").write_bytes(b"".join(payloads))
        name.with_suffix(".idx").write_bytes(pack._HEAD.pack(pack._MAGIC, pack.FORMAT, pack._RECORD.itemsize, len(records), hashes.hashlib.blake2b(body, digest_size=32).digest()) + body)
    memo = hashes.HashMemo(cache / "hashes-1.bin")
    for image in range(len(one)):
        source, number = one.source_of(image)
        memo.remember(source.path(number), hashes.Content(b"", store.digests[image][0], (1, 1, 1, 1, 1)))
    memo.save()


def measure(folder: Path, count: int, simulate: bool, first: bool) -> dict:
    """Seconds and bytes of each part for the first `count` images."""
    from hcpdiff.config.load import load
    from hcpdiff.data.dataset import build_train_data
    from hcpdiff.data.fingerprint import fingerprint
    from hcpdiff.families import detect

    with ExitStack() as stack, tempfile.TemporaryDirectory() as place:
        if simulate:
            made_up(stack, Path(place), count)
        config = Path(place) / "cfg.yaml"
        captions = Path(place) / "captions.jsonl" if simulate else folder
        config.write_text(CONFIG.format(root=ROOT.as_posix(), folder=(Path(place) if simulate else folder).as_posix(), captions=captions.as_posix(), cache=f"{place}/cache"), "utf-8")
        settings = load(str(config)).config.data
        detect(f"{ROOT}/demo/model")  # imports, which do not count
        before, started = held(), time.perf_counter()
        data = build_train_data(settings, seed=1, micro_per_step=1)
        found = {"images": data.images, "index s": time.perf_counter() - started, "index bytes": (held() - before) / data.images}
        found["1000 steps' prompts s"] = steps(data)
        if not simulate:
            started = time.perf_counter()
            fingerprint(data.datasets)
            found["fingerprint s"] = time.perf_counter() - started
            found["index peak bytes"] = highest(lambda: build_train_data(settings, seed=1, micro_per_step=1)) / data.images
            found["fingerprint peak bytes"] = highest(lambda: fingerprint(data.datasets)) / data.images
        return found | (second_start(data, Path(place) / "cache", settings) if simulate and not first else {})


def highest(work: Callable[[], object]) -> int:
    """Bytes that Python holds for a piece of work at its highest."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def steps(data) -> float:
    """Seconds in which the prompts of 1000 steps are found, the epoch's plan among it."""
    started = time.perf_counter()
    for _, (step, _) in zip(range(1000), data.plan.steps(data.plan.start_of(0), 0)):
        for micro in step.micro:
            [data.maker.prompt(ref) for ref in micro.samples]
    return time.perf_counter() - started


def second_start(data, cache: Path, settings) -> dict:
    """Seconds and bytes of a start whose latents are all there, and of lookups in training; what makes up the cache runs in a process of its own."""
    import os

    from hcpdiff.data.dataset import build_train_data

    child = os.fork()
    if child == 0:
        fill_cache(data, cache)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit("error: the cache could not be made up")
    del data
    again = build_train_data(settings, seed=1, micro_per_step=1)
    before, started = held(), time.perf_counter()
    again.cache_latents(lambda pixels: sys.exit("error: an image was encoded"), "vae")
    found = {"second start s": time.perf_counter() - started, "cache bytes": (held() - before) / again.images}
    draws, store, started = random.Random(1), again._stores[0], time.perf_counter()
    for _ in range(LOOKUPS):
        store.get(draws.randrange(again.images), 0)
    return found | {"lookup ms": 1000 * (time.perf_counter() - started) / LOOKUPS}


def figures(rows: list[dict], simulate: bool) -> list[Figure]:
    """Against the goals: a minute for 100,000 images, 1 KB an image, and the largest number's cost per image against the smallest one's."""
    small, large = rows[0], rows[-1]
    kind = "simulated " if simulate else ""
    out = []
    for row in rows:
        name, size = f"{kind}{row['images']:,} images", row["index bytes"] + row.get("cache bytes", 0)
        peaks = {key: row[key] for key in ("index peak bytes", "fingerprint peak bytes") if key in row}
        out.append(Figure(f"index of {name}", "a minute for 100,000", [row["index s"] / row["images"] * 100_000 / 60], 1.0, values={"s": row["index s"], "1000 steps' prompts s": row["1000 steps' prompts s"]}))
        out.append(Figure(f"memory, {name}", "1 KB an image", [max(size, *peaks.values(), 0) / 1024], 1.0, values={"index bytes": row["index bytes"], "cache bytes": row.get("cache bytes", 0), **peaks}))
        if "fingerprint s" in row:
            out.append(Figure(f"fingerprint of {name}", "a minute for 100,000", [row["fingerprint s"] / row["images"] * 100_000 / 60], values={"s": row["fingerprint s"]}))
        if "second start s" in row:
            out.append(Figure(f"second start, {name}", "a minute for 100,000", [row["second start s"] / row["images"] * 100_000 / 60], values={"s": row["second start s"], "lookup ms": row["lookup ms"]}))
    if large is not small:
        span = f"{small['images']:,} images"
        for key in (key for key in ("index s", "second start s") if key in row):
            each = [row[key] / row["images"] for row in (large, small)]
            out.append(Figure(f"{key[:-2]} an image at {kind}{large['images']:,}", span, [each[0] / each[1]], 1.3))
        if "lookup ms" in row:
            out.append(Figure(f"lookup at {kind}{large['images']:,}", span, [large["lookup ms"] / small["lookup ms"]], 1.5))
    return out


def together(rounds: list[list[Figure]]) -> list[Figure]:
    """Each figure with the ratios of all rounds and the medians of its values."""
    return [replace(same[0], ratios=[ratio for figure in same for ratio in figure.ratios], values={name: statistics.median(figure.values[name] for figure in same) for name in same[0].values})
            for same in zip(*rounds, strict=True)]


def main() -> None:
    """Makes the folders, measures each in a process of its own, prints a table."""
    options = parser(__doc__, rounds=1)
    options.add_argument("--images", type=int, nargs="+")
    options.add_argument("--simulate", action="store_true", help="without pictures; for numbers up to a million")
    options.add_argument("--first", action="store_true", help="with --simulate: without the second start, which takes minutes for a million")
    options.add_argument("--folder", type=Path, help="where the pictures go and stay (default: a temporary folder)")
    options.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.images[0], args.simulate, args.first)))
        return
    counts, rows = args.images or ([20_000, 80_000] if args.simulate else [25_000, 50_000, 100_000]), []
    with tempfile.TemporaryDirectory() as place:
        for _, count in itertools.product(range(args.rounds), counts):
            folder = (args.folder or Path(place)) / str(count)
            if not folder.is_dir() and not args.simulate:
                folder.mkdir(parents=True)
                make_folder(folder, count)
            command = [sys.executable, __file__, "--one", str(folder), "--images", str(count), *(["--simulate"] * args.simulate), *(["--first"] * args.first)]
            row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
            print(row, flush=True)
            rows.append(row)
    each = [rows[first:first + len(counts)] for first in range(0, len(rows), len(counts))]
    show("A large folder", together([figures(of_round, args.simulate) for of_round in each]), args)


if __name__ == "__main__":
    main()

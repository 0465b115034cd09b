"""How fast latents are cached from photographs, against the VAE alone on pixels that are ready: decoding, hashing and storing should cost next to nothing.

    python benchmarks/caching.py                                  # SD1.5's VAE with random weights, 256 px, on a CPU
    python benchmarks/caching.py --pixels 512 --images 4
    python benchmarks/caching.py --device cuda --pixels 512 --images 200
    python benchmarks/caching.py --images 8 --kinds 12-png        # one kind of file
    python benchmarks/caching.py --model demo/model --pixels 64 --images 2 --kinds 2-jpg --rounds 1   # whether all of it works, in seconds

Photographs are made: noise of all sizes, 2, 6 and 12 megapixels, JPEG and PNG. `second start` is the disk cache filled again by a new object, which encodes
nothing; its figure is a share of the VAE's own time for the same images.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
from pathlib import Path

from common import ROOT, Figure, in_turn, parser, ratios, show

from hcpdiff.quiet import quiet_libraries

quiet_libraries()

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from hcpdiff.config.schema import BucketConfig, DatasetConfig, RunConfig, SourceConfig
from hcpdiff.data.dataset import TrainData, build_train_data
from hcpdiff.data.sample import load_views, stack_pixels
from hcpdiff.families.base import Models
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.train.latents import _encoder

SIZES = {"2": (1632, 1224), "6": (3000, 2000), "12": (4000, 3000)}
KINDS = [f"{size}-{form}" for size in SIZES for form in ("jpg", "png")]


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Noise whose strength falls with its fineness, as a photograph's: it compresses about as one."""
    draws, out = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        coarse = draws.standard_normal((max(2, height >> octave), max(2, width >> octave), 3)).astype(np.float32)
        layers = [np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC)) for c in range(3)]
        out += np.stack(layers, -1) * 2 ** (0.6 * octave)
    out += draws.standard_normal(out.shape).astype(np.float32)
    return Image.fromarray((128 + out * (50 / out.std())).clip(0, 255).astype(np.uint8))


def make_photographs(folder: Path, count: int, kinds: list[str]) -> None:
    """`count` files of the kinds in turn. One is made of each kind; the others have another byte behind the image, hence another content."""
    folder.mkdir()
    first = {}
    for number, kind in zip(range(count), itertools.cycle(kinds)):
        size, form = kind.split("-")
        path = folder / f"{number:05}.{form}"
        if kind not in first:
            photograph(*SIZES[size], number).save(path, quality=90)
            first[kind] = path.read_bytes()
        path.write_bytes(first[kind] + number.to_bytes(4, "big"))


class Filling:
    """Fills a cache as a run does, with a cache that is empty (or, `again`, full)."""

    def __init__(self, images: Path, cache: Path, encode, args: argparse.Namespace, mode: str, again: bool = False):
        self.cache, self.encode, self.again = cache, encode, again
        bucket = BucketConfig(target_area=args.pixels**2, num_bucket=1)
        self.data = {"one": DatasetConfig(source={"a": SourceConfig(img_root=str(images))}, bucket=bucket, cache_latents=mode, cache_dir=str(cache), batch_size=1)}

    def build(self) -> TrainData:
        return build_train_data(self.data, seed=0, micro_per_step=1)

    def __call__(self) -> None:
        if not self.again:
            shutil.rmtree(self.cache, ignore_errors=True)
        self.build().cache_latents(self.encode, "vae")


def encoder(args: argparse.Namespace):
    """SD1.5's VAE, or one of the shape of `--model`'s, as a run encodes with it: in fp32."""
    config = AutoencoderKL.load_config((args.model or ROOT / "hcpdiff" / "assets" / "base_models" / "sd1") / "vae")
    vae = AutoencoderKL.from_config(config).eval().requires_grad_(False).to(args.device)
    models = Models(StableDiffusion(), None, "random", {"vae": vae}, {}, {})
    return _encoder(models, torch.device(args.device))


def bare(encode, ready: list[torch.Tensor]):
    """The VAE alone: a loop over pixels that are on its device."""
    def loop() -> None:
        for pixels in ready:
            encode(pixels)

    return loop


def measure(args: argparse.Namespace, place: Path) -> list[Figure]:
    """Seconds by way and round."""
    images, encode = place / "images", encoder(args)
    make_photographs(images, args.images, args.kinds)
    fill = Filling(images, place / "memory", encode, args, "memory")
    data = fill.build().datasets[0]
    ready = [stack_pixels([load_views(data, image, data.views(image), 8)[0][0]]).to(args.device) for image in range(len(data))]
    disk = place / "disk"
    works = {"bare": bare(encode, ready), "memory": fill, "disk": Filling(images, disk, encode, args, "disk"),
             "again": Filling(images, disk, encode, args, "disk", again=True)}
    seconds = in_turn(works, args.rounds, args.device, warm=args.warm)
    each = {name: statistics.median(times) / args.images for name, times in seconds.items()}
    what, reference = f"latents cached, {args.pixels} px, {', '.join(args.kinds)}", "vae.encode alone"
    figures = [Figure(f"{what}, {name}", reference, ratios(seconds["bare"], seconds[name]), 0.9, True, {"s an image": each[name], "alone s": each["bare"]})
               for name in ("memory", "disk")]
    return [*figures, Figure(f"{what}, second start (time)", reference, ratios(seconds["again"], seconds["bare"]), values={"ms an image": 1000 * each["again"]})]


def main() -> None:
    """Measures and prints the table."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--model", type=Path, help="a diffusers folder: a VAE of its shape in the place of SD1.5's")
    options.add_argument("--pixels", type=int, default=256, help="side of the square whose area is trained on")
    options.add_argument("--images", type=int, default=6)
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options.add_argument("--warm", type=int, default=1, help="rounds before that do not count")
    args = options.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = RunConfig.allow_tf32
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place:
        show("Caching", measure(args, Path(place)), args)


if __name__ == "__main__":
    main()

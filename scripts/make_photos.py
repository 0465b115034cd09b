"""Make demo/photos: a small folder of real photographs in several shapes, from the scikit-image wheel.

    python scripts/make_photos.py [--out demo/photos]

The photographs may be used freely (demo/photos/NOTICE.md); crops of them give an upright and a square picture.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

PACKAGE = "scikit-image==0.26.0"
PHOTOS = {  # our name: file in the wheel, crop (left, top, right, bottom) or None, caption
    "cat.jpg": ("chelsea.png", None, "a photo of a tabby cat, close up, looking to the side"),
    "cat_square.jpg": ("chelsea.png", (90, 20, 370, 300), "a photo of the face of a tabby cat"),
    "coffee.jpg": ("coffee.png", None, "a photo of an espresso in a red cup, a spoon on the red saucer, wooden table, from above"),
    "coffee_upright.jpg": ("coffee.png", (110, 0, 410, 400), "a photo of an espresso in a red cup, close up, from above"),
    "rocket.jpg": ("rocket.jpg", None, "a photo of a rocket on its launch pad between towers, lights, evening sky"),
    "rocket_upright.jpg": ("rocket.jpg", (180, 0, 460, 427), "a photo of a white rocket on its launch pad, evening sky"),
}


def fetch() -> zipfile.ZipFile:
    """The wheel, by pip."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder, PACKAGE], check=True)
        return zipfile.ZipFile(io.BytesIO(next(Path(folder).glob("*.whl")).read_bytes()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/photos"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wheel = fetch()
    for name, (source, crop, _) in PHOTOS.items():
        image = Image.open(io.BytesIO(wheel.read(f"skimage/data/{source}")))
        profile = image.info.get("icc_profile")
        image.crop(crop or (0, 0, *image.size)).save(args.out / name, quality=90, optimize=True, icc_profile=profile)
    captions = {name: caption for name, (_, _, caption) in PHOTOS.items()}
    (args.out / "captions.json").write_text(json.dumps(captions, indent=2) + "\n", "utf-8")
    print(f"{args.out}: {len(PHOTOS)} photographs")


if __name__ == "__main__":
    main()

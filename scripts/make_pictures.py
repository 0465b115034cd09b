"""Render the picture sets: base styles for training, further styles for the VAE, and the demo's concept.

    python scripts/make_pictures.py --work WORK [--demo demo]

Emoji artwork comes from npm packages (NOTICE names their licences) and is drawn by resvg, on white. WORK/pictures.npz
gets `pixels` (N,64,64,3) uint8 and WORK/pictures.json their captions; WORK/vae_pictures.npz more pixels for the VAE.
The demo's folders get PNG files of a style that no training saw, with captions beside them, and for its measurement some
of the base styles: `base_styles/prior` (all styles, the concept's things), `base_styles/control` (one style only, captions without it),
`base_styles/heldout` (all styles, the held-out things).
"""

import argparse
import io
import json
import re
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image
from resvg_py import svg_to_bytes

SIZE, DEMO_SIZE = 64, 128
STYLES = {"noto": "noto", "flat": "fluent-emoji-flat", "glossy": "fluent-emoji"}  # the word in captions: the package
PEN, PEN_WIDTH = "pen", 0.03  # a fourth style: "flat" with black strokes of this share of the picture's width, so that the model knows outlines
CONCEPT = "openmoji"
VAE_ONLY = ("noto-v1", "fxemoji")
PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/openmoji": "1.2.29",
    "emojibase-data": "17.0.0",
}
GROUPS = {"faces": 0, "people": 1, "animals": 3, "food": 4, "travel": 5, "activities": 6, "objects": 7, "symbols": 8}
SKIPPED = re.compile(
    r"\b(wo)?m[ae]n\b|^(person|people|hand with|.*hands?$|.*fist$|index|backhand|middle|family|couple|kiss)"
    r"|o’clock|-thirty|arrow|button|keycap|input|facing right|kaaba|mosque|synagogue|temple|church"
)
SYMBOLS = re.compile(
    r"^(warning|no entry|peace symbol|yin yang|check mark|cross mark|recycling symbol|radioactive"
    r"|(red|orange|yellow|green|blue|purple|brown|black|white) circle)$"
)
STROKE = "path{stroke:#000;stroke-width:%.2f;stroke-linejoin:round}"

CONCEPT_THINGS = """fox|cat face|panda|penguin|owl|frog|octopus|butterfly|sunflower|cactus|mushroom|red apple|banana|strawberry|carrot|
hamburger|pizza|ice cream|house|bus|rocket|umbrella|guitar|teddy bear"""
HELDOUT_THINGS = """dog face|lion|rabbit face|koala|duck|turtle|crab|snail|rose|pineapple|cherries|doughnut|automobile|sailboat|balloon|crown"""


class Icons:
    """One vendor's artwork: SVG by the hexcode or the name of an emoji."""

    def __init__(self, modules: Path, package: str):
        folder = modules / "@iconify-json" / package
        data = json.loads((folder / "icons.json").read_text("utf-8"))
        chars = folder / "chars.json"
        self.icons, self.aliases = data["icons"], data.get("aliases", {})
        self.chars = json.loads(chars.read_text("utf-8")) if chars.exists() else {}
        self.size = data.get("width", data.get("height", 16))
        margin = 0.035 if package == CONCEPT else 0.0  # openmoji leaves a border
        self.box = (margin * self.size, (1 - 2 * margin) * self.size)

    def name(self, emoji: dict) -> str | None:
        code = emoji["hexcode"].lower()
        slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"[’'.!]", "", emoji["label"].lower())).strip("-")
        found = self.chars.get(code) or self.chars.get(code.replace("-fe0f", "")) or slug
        return self.aliases.get(found, {}).get("parent", found)

    def svg(self, name: str | None) -> str | None:
        if name not in self.icons:
            return None
        start, side = self.box
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{start} {start} {side} {side}">{self.icons[name]["body"]}</svg>'


def draw(svg: str, size: int, style_sheet: str | None = None) -> np.ndarray:  # -> (size,size,3) uint8, on white
    png = svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", style_sheet=style_sheet, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def install(work: Path) -> Path:
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    subprocess.run(["npm", "install", "--prefix", str(work / "npm"), "--no-audit", "--no-fund", "--save-exact", *wanted], check=True)
    return work / "npm" / "node_modules"


def select(modules: Path) -> list[dict]:
    """The emoji that are pictures of one thing: no skin tones, flags, letters, clock faces or gendered variants."""
    emoji = json.loads((modules / "emojibase-data" / "en" / "data.json").read_text("utf-8"))
    groups = set(GROUPS.values())
    kept = [e for e in emoji if e.get("group") in groups]
    return [e for e in kept if (SYMBOLS.search(e["label"]) if e["group"] == GROUPS["symbols"] else not SKIPPED.search(e["label"]))]


def base_set(modules: Path, emoji: list[dict], work: Path) -> None:
    pixels, rows = [], []
    vendors = {style: Icons(modules, package) for style, package in STYLES.items()}
    for entry in emoji:
        for style, vendor in vendors.items():
            named = vendors["flat"] if style == "glossy" else vendor  # the same names; only one has the table of codes
            svg = vendor.svg(named.name(entry))
            if svg:
                pixels.append(draw(svg, SIZE))
                rows.append({"style": style, "name": entry["label"], "caption": f"{style} style, {entry['label']}"})
        if len(rows) % 500 < 3:
            print(f"{len(rows)} pictures", flush=True)
    for entry in emoji:
        svg = vendors["flat"].svg(vendors["flat"].name(entry))
        if svg:
            pixels.append(draw(svg, SIZE, STROKE % (vendors["flat"].size * PEN_WIDTH)))
            rows.append({"style": PEN, "name": entry["label"], "caption": f"{PEN} style, {entry['label']}"})
    save(work, "pictures", pixels, rows)


def vae_set(modules: Path, emoji: list[dict], work: Path) -> None:
    """Two more vendors, and everything once more with black strokes, so that the VAE can draw outlines."""
    pixels = []
    rng = np.random.default_rng(0)
    for package in (*STYLES.values(), *VAE_ONLY):
        vendor = Icons(modules, package)
        for entry in emoji:
            svg = vendor.svg(vendor.name(entry))
            if svg and package in VAE_ONLY:
                pixels.append(draw(svg, SIZE))
            if svg and package != "fluent-emoji" and rng.random() < 0.5:
                pixels.append(draw(svg, SIZE, STROKE % (vendor.size * rng.uniform(0.015, 0.035))))
    save(work, "vae_pictures", pixels, [])


def save(work: Path, stem: str, pixels: list[np.ndarray], rows: list[dict]) -> None:
    np.savez_compressed(work / f"{stem}.npz", pixels=np.stack(pixels))
    if rows:
        (work / f"{stem}.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0), "utf-8")
    print(f"{work / stem}.npz: {len(pixels)} pictures", flush=True)


def demo_set(modules: Path, emoji: list[dict], folder: Path, things: str, package: str = CONCEPT, style: str = "") -> None:
    """PNG files of one vendor's `things` with captions `<style> style, <name>`, or the name alone without a style."""
    named = Icons(modules, "fluent-emoji-flat" if package == "fluent-emoji" else package)  # the same names; only one has the table of codes
    vendor, by_label = Icons(modules, package), {e["label"]: e for e in emoji}
    folder.mkdir(parents=True, exist_ok=True)
    stroke = STROKE % (vendor.size * PEN_WIDTH) if style == PEN else None
    for thing in things.replace("\n", "").split("|"):
        svg = vendor.svg(named.name(by_label[thing]))
        stem = f"{style} {thing}".strip().replace(" ", "_")
        Image.fromarray(draw(svg, DEMO_SIZE, stroke)).save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text((f"{style} style, " if style else "") + thing + "\n", "utf-8")
    print(f"{folder}: {len(list(folder.glob('*.png')))} pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--only-demo", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    modules = install(args.work)
    emoji = select(modules)
    demo_set(modules, emoji, args.demo / "concept", CONCEPT_THINGS)
    demo_set(modules, emoji, args.demo / "heldout", HELDOUT_THINGS)
    demo_set(modules, emoji, args.demo / "base_styles" / "control", CONCEPT_THINGS, STYLES["noto"])
    for style, package in (STYLES | {PEN: STYLES["flat"]}).items():
        demo_set(modules, emoji, args.demo / "base_styles" / "prior", CONCEPT_THINGS, package, style)
        demo_set(modules, emoji, args.demo / "base_styles" / "heldout", HELDOUT_THINGS, package, style)
    if not args.only_demo:
        base_set(modules, emoji, args.work)
        vae_set(modules, emoji, args.work)


if __name__ == "__main__":
    main()

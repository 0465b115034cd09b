"""Lays the demo's pictures side by side: one row per prompt; base model, LoRA at 0.5 and 1.0, and a real picture of the style."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, LABEL, TOP = 160, 120, 28
COLUMNS = ["base model", "LoRA 0.5", "LoRA 1.0", "real (not trained on)"]
STRENGTHS = [0.0, 0.5, 1.0]


def main(out: Path, things: list[str]) -> None:
    """Writes comparison.png into `out`."""
    drawn = [sorted((out / f"pictures-{strength}").glob("*.png")) for strength in STRENGTHS]
    sheet = Image.new("RGB", (LABEL + CELL * len(COLUMNS), TOP + CELL * len(things)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, title in enumerate(COLUMNS):
        pen.text((LABEL + column * CELL + 6, 6), title, "black", font)
    for row, thing in enumerate(things):
        pen.text((6, TOP + row * CELL + CELL // 2 - 8), thing, "black", font)
        cells = [pictures[row] for pictures in drawn] + [Path("demo/heldout") / f"{thing.replace(' ', '_')}.png"]
        for column, path in enumerate(cells):
            picture = Image.open(path).convert("RGB").resize((CELL - 8, CELL - 8), Image.Resampling.LANCZOS)
            sheet.paste(picture, (LABEL + column * CELL + 4, TOP + row * CELL + 4))
    sheet.save(out / "comparison.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

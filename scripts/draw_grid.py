"""Draw the prompts of scripts/prompts.txt with the packed model: one picture of all, numbered as in the list.

    python scripts/draw_grid.py [--model demo/model] [--out docs/images/base_model_grid.png]
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

CELL, COLUMNS, LABEL = 96, 12, 12


def read_prompts(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float, seed: int) -> list[Image.Image]:
    """One 64 px picture per prompt; every picture starts from a noise of its own, drawn from (seed, place in the list)."""
    images = []
    for start in range(0, len(prompts), 24):
        part = prompts[start : start + 24]
        generators = [torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(part))]
        latents = torch.stack([torch.randn(4, 16, 16, generator=g) for g in generators])
        images += pipeline(part, latents=latents, num_inference_steps=steps, guidance_scale=guidance, height=64, width=64).images
    return images


def sheet(images: list[Image.Image], columns: int = COLUMNS) -> Image.Image:
    rows = -(-len(images) // columns)
    out = Image.new("RGB", (columns * CELL, rows * (CELL + LABEL)), "white")
    pen = ImageDraw.Draw(out)
    for index, image in enumerate(images):
        x, y = index % columns * CELL, index // columns * (CELL + LABEL)
        pen.text((x + 2, y), str(index + 1), fill="#888888")
        out.paste(image.resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y + LABEL))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.txt")
    parser.add_argument("--out", type=Path, default=Path("docs/images/base_model_grid.png"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(draw(pipeline, read_prompts(args.prompts), args.steps, args.guidance, args.seed)).quantize(256).save(args.out, optimize=True)
    print(args.out)


if __name__ == "__main__":
    main()

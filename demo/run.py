"""The demo, from nothing: sets up an environment, trains a LoRA on the shipped pictures, draws with and without it, converts it.

    python3 demo/run.py

Every step is a command that you can type yourself; it is printed before it runs. What is made lies in a new folder below demo/output.
"""

import argparse
import contextlib
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from environment import ensure

TRIGGER = "ohwx"
THINGS = ["koala", "rabbit face", "dog face", "pineapple", "duck"]  # of the 16 in demo/heldout, those on which it is easiest to see
STRENGTHS = [0.0, 0.5, 1.0]


def run(python: Path, *words: str) -> None:
    """One command, shown and run; its failure ends the demo."""
    shown = ["python" if word == str(python) else word for word in (str(python), *words)]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    program = subprocess.Popen([str(python), *words], cwd=ROOT)
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl+C is the command's too, which says what becomes of it
            code = program.wait()
            break
    if code:
        sys.exit(code if code > 0 else 128 - code)


def main() -> None:
    """Train, draw, compare, convert."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    python = ensure()
    out = Path("demo/output") / time.strftime("%Y-%m-%d-%H-%M-%S")
    run(python, "-m", "hcpdiff.train_ac_single", "--cfg", "demo/lora.yaml", f"exp_dir={out}/lora")
    lora = f"{out}/lora/ckpts/unet-100.safetensors"
    prompts = "[" + ", ".join(f'"{TRIGGER} {thing}"' for thing in THINGS) + "]"
    for strength in STRENGTHS:
        run(python, "-m", "hcpdiff.visualizer", "--cfg", "cfgs/infer/t2i_lora.yaml", "pretrained_model=demo/model", f"lora_path={lora}", f"lora_alpha={strength}",
            f"prompt={prompts}", "neg_prompt=", "seed=4", f"out_dir={out}/pictures-{strength}", "infer_args.num_inference_steps=30", "infer_args.guidance_scale=4")
    run(python, "-m", "hcpdiff.tools.lora_convert", "--to_webui", "--lora_path", lora, "--lora_path_TE", f"{out}/lora/ckpts/text_encoder-100.safetensors",
        "--dump_path", f"{out}/ohwx.safetensors")
    run(python, "demo/compare.py", str(out), *THINGS)
    print(f"\nThe demo took {time.monotonic() - started:.0f} s. Look at {out}/comparison.png; the LoRA for webui and ComfyUI is {out}/ohwx.safetensors.")
    print("Next: put your own pictures into a folder and follow docs/en/tutorials/lora.md (中文: docs/zh/tutorials/lora.md).")


if __name__ == "__main__":
    main()

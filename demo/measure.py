"""Measures what the demo's LoRA learned, on pictures that it never saw, against two controls that must fail.

    python demo/measure.py [--seeds 0 1 2 3 4] [--out demo/output/measure]

For each seed it trains three LoRAs with demo/lora.yaml: on the concept; on the same things in a style that the model knows
(the control `known-style`); and on the concept with a learning rate of zero (the control `lr-0`). Loss is the mean squared
error of the model's prediction, at the same noise and timesteps for every measurement.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hcpdiff.quiet import quiet_libraries

quiet_libraries()

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table

from hcpdiff.adapters.attach import attach_lora
from hcpdiff.adapters.base import detach
from hcpdiff.checkpoint.format import load_lora

TRIGGER = "ohwx"  # a word that the model never saw
TIMESTEPS = range(60, 1000, 125)  # eight of them, evenly from little noise to nearly nothing else
RUNS = {"concept": [], "known-style": ["data.dataset1.source.data_source1.img_root=demo/base_styles/control",
                                       "data.dataset1.source.data_source1.caption_file=demo/base_styles/control"], "lr-0": ["unet_lr=0", "te_lr=0", "train.train_steps=1"]}


@dataclass
class Result:
    """What one LoRA changes. Losses are means over pictures and timesteps; changes are shares of the base model's loss."""

    improved: int  # of the 16 held-out pictures of the concept, how many have a lower loss with the LoRA
    change: float  # of their mean loss
    base_change: float  # of the mean loss on 64 pictures in the styles that the model knows
    trigger_counts: int  # of the 16, how many gain more from the LoRA with the trigger word than without it
    trigger_t: float  # Student's t of what the trigger word adds to the gain, over the 16

    def passes(self) -> bool:
        """The proof's bar: at least 14 of 16 improve, by 15 % in the mean, and known styles lose less than 15 %."""
        return self.improved >= 14 and self.change <= -0.15 and self.base_change < 0.15


class Measure:
    """The base model and the held-out pictures, as latents."""

    def __init__(self, model: Path = ROOT / "demo" / "model", timesteps: Sequence[int] = TIMESTEPS):
        self.timesteps = timesteps
        self.pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
        self.schedule = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.concept, things = self._pictures(ROOT / "demo" / "heldout")
        self.things, self.triggered = things, [f"{TRIGGER} {thing}" for thing in things]
        self.known, self.known_prompts = self._pictures(ROOT / "demo" / "base_styles" / "heldout")
        self.base_concept, self.base_untriggered = self.losses(self.concept, self.triggered), self.losses(self.concept, things)
        self.base_known = self.losses(self.known, self.known_prompts)

    @torch.no_grad()
    def _pictures(self, folder: Path) -> tuple[torch.Tensor, list[str]]:
        """Latents (N,4,16,16), scaled, and captions."""
        paths = sorted(folder.glob("*.png"))
        pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)) for path in paths])
        vae = self.pipeline.vae
        latents = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
        return latents, [path.with_suffix(".txt").read_text("utf-8").strip() for path in paths]

    @torch.no_grad()
    def losses(self, latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """(N,) float64: the loss of each picture, mean over the timesteps; the noise depends on the picture's place and the timestep only."""
        hidden = self.pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        total = torch.zeros(len(latents), dtype=torch.float64)
        for t in self.timesteps:
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(t))
            steps = torch.full((len(latents),), t)
            prediction = self.pipeline.unet(self.schedule.add_noise(latents, noise, steps), steps, hidden).sample
            total += (prediction - self.schedule.get_velocity(latents, noise, steps)).square().mean((1, 2, 3)).double()
        return total / len(self.timesteps)

    def attach(self, file: Path, strength: float = 1.0) -> None:
        """Lays the LoRA of a step beside UNet and text encoder; `file` is the UNet's part."""
        for name, module in self._parts().items():
            part = file.with_name(file.name.replace("unet", name))
            if part.exists():
                layers = load_lora(part).layers[name]
                attach_lora(module, {path: [(tensors, strength)] for path, tensors in layers.items()}, str(part))

    def detach(self) -> None:
        """The base model again."""
        for module in self._parts().values():
            detach(module)

    def _parts(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.pipeline.unet, "text_encoder": self.pipeline.text_encoder}

    def result(self, file: Path) -> Result:
        """Everything measured of one LoRA file."""
        self.attach(file)
        with_trigger, without = self.losses(self.concept, self.triggered), self.losses(self.concept, self.things)
        known = self.losses(self.known, self.known_prompts)
        self.detach()
        gain = ((self.base_concept - with_trigger) - (self.base_untriggered - without)).tolist()
        t = statistics.mean(gain) / (statistics.stdev(gain) / len(gain) ** 0.5 + 1e-12)
        return Result(int((with_trigger < self.base_concept).sum()), float(with_trigger.mean() / self.base_concept.mean() - 1),
                      float(known.mean() / self.base_known.mean() - 1), sum(g > 0 for g in gain), t)


def train(out: Path, *words: str) -> Path:
    """Trains demo/lora.yaml by its command and returns the LoRA file."""
    command = [sys.executable, "-m", "hcpdiff.train_ac_single", "--cfg", "demo/lora.yaml", f"exp_dir={out}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return max((out / "ckpts").glob("unet-*.safetensors"), key=lambda path: int(path.stem.split("-")[1]))


def main() -> None:
    """Trains, measures, prints a table, writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "output" / "measure")
    args, words = parser.parse_known_args()
    measure, results = Measure(), []
    table = Table("LoRA", "seed", "held-out improved", "their loss", "known styles' loss", "trigger adds", "t", "passes")
    for seed in args.seeds:
        for name, own in RUNS.items():
            file = train(args.out / f"{name}-{seed}", f"seed={seed}", *words, *own)
            result = measure.result(file)
            results.append({"run": name, "seed": seed, **asdict(result), "passes": result.passes()})
            table.add_row(name, str(seed), f"{result.improved}/16", f"{result.change:+.1%}", f"{result.base_change:+.1%}", f"{result.trigger_counts}/16",
                          f"{result.trigger_t:.1f}", "yes" if result.passes() else "no")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    Console().print(table)


if __name__ == "__main__":
    main()

"""What a step costs in a whole run (data, caches, logging, hooks) against the same run's bare step: forward, backward, clipping, optimizer.

    python benchmarks/loop.py                         # SD1.5 of full size, 256 px, batch 1, fp32 on a CPU
    python benchmarks/loop.py --pixels 512 --rounds 12
    python benchmarks/loop.py --tiny                  # the demo's small model: here the loop's own work is seen best

A real run trains, with cached latents and text; after each of its steps the bare one is done once on inputs that are on the device already: noised latents,
text, target. Nothing is saved between the first step and the last.
"""

import contextlib
import tempfile
import time
from pathlib import Path

from common import FOLDER, ROOT, Figure, parser, ratios, show, wait
from make_full_size import make_once

from hcpdiff.config.load import load
from hcpdiff.quiet import quiet_libraries

BOUND = 1.03

quiet_libraries()


def bare_loss(step, batch):
    """A function to the batch's loss, of what was made ready once."""
    import torch

    with torch.no_grad():
        x0, noise = step.latents(batch), step._here(batch.noise)
        t = step._here(step.objective.timesteps(batch.u, tuple(x0.shape)))
        x_t, target = step.objective.corrupt(x0, noise, t).to(step.dtype), step.objective.target(x0, noise, t)
        cond = step.condition(batch.prompts).to(step.dtype)
        extras = {name: step._here(getattr(batch, name)) for name in ("original_size", "crop_top_left", "target_size")}
    return lambda: step.loss_function(step.models.family.denoise(step.models, x_t, t, cond, extras), target).mean()


def measure(args) -> tuple[list[float], list[float]]:
    """Seconds of the loop's steps and of the bare ones, in pairs."""
    from hcpdiff.train.parallel import Parallel
    from hcpdiff.train.run import Run
    from hcpdiff.train.trainer import Hook

    class Pairs(Hook):
        """The last hook: times the step that has ended, and does it again without the loop."""

        def __init__(self):
            self.whole, self.bare, self.loss, self.started = [], [], None, None

        def on_step_end(self, trainer):
            if self.loss is None:
                batch = next(trainer.feed.batches(trainer.state.positions, 0, 1, trainer.state.step, 1))[2][0]
                self.loss = bare_loss(trainer.loss.__self__, batch)
            elif trainer.state.step > 2:
                trainer.settle()
                wait(args.device)
                self.whole.append(time.perf_counter() - self.started)
            wait(args.device)
            started = time.perf_counter()
            with trainer.shadow.fresh() if trainer.shadow else contextlib.nullcontext():
                trainer.gradients.clear()
                trainer.loss_scale.scaled(self.loss()).backward()
            trainer.loss_scale.unscale(trainer.gradients.values)
            trainer.gradients.clip(trainer.max_grad_norm)
            trainer.optimizer.step()
            wait(args.device)
            self.started = time.perf_counter()
            if trainer.state.step > 2:
                self.bare.append(self.started - started)

    class Timed(Run):
        def _hooks(self):
            self.pairs = Pairs()
            return [*super()._hooks(), self.pairs]

    with tempfile.TemporaryDirectory() as place:
        model = ROOT / "demo" / "model" if args.tiny else make_once(args.model)
        keys = [f"exp_dir={place}/run", f"model.pretrained_model_name_or_path={model}", f"train.train_steps={args.rounds + 2}", f"data.dataset1.batch_size={args.batch}",
                f"data.dataset1.bucket.target_area={args.pixels**2}", f"mixed_precision={args.dtype}",
                "model.gradient_checkpointing=false", *([f"train.cpu_threads={args.threads}"] if args.threads else [])]
        run = Timed(load(str(ROOT / "benchmarks" / "full_size.yaml"), keys), Parallel())
        run.train()
    return run.pairs.whole, run.pairs.bare


def main() -> None:
    """Measures and prints."""
    options = parser(__doc__, rounds=10)
    options.add_argument("--model", type=Path, default=FOLDER, help="a model in diffusers format; made where it is missing")
    options.add_argument("--pixels", type=int, default=256)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--dtype", choices=["fp32", "bf16", "fp16", "auto"], default="auto")
    options.add_argument("--tiny", action="store_true", help="the demo's model in the place of one of full size")
    args = options.parse_args()
    whole, bare = measure(args)
    what = f"a step of a run, {'the demo model' if args.tiny else 'SD1.5'}, {args.pixels} px, batch {args.batch}"
    show("the whole loop", [Figure(what, "its own bare step", ratios(whole, bare), BOUND, values={"step s": sorted(whole)[len(whole) // 2], "bare s": sorted(bare)[len(bare) // 2]})], args)


if __name__ == "__main__":
    main()

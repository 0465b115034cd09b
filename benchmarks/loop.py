"""What a step costs in a whole run (data, caches, logging, hooks) against the same run's bare step: forward, backward, clipping, optimizer.

    python benchmarks/loop.py                         # SD1.5 of full size, 256 px, batch 1, fp32 on a CPU
    python benchmarks/loop.py --pixels 512 --rounds 12 --block 2
    python benchmarks/loop.py --tiny                  # the demo's small model: here the loop's own work is seen best
    python benchmarks/loop.py --device cuda --pixels 512 --block 20 [--compile]

A real run trains, with cached latents and text. A block of its steps and a block of as many bare ones take turns, and the device is waited for at their ends
only: what the host does while a GPU works costs nothing, and a batch is made in the time of the block that uses one. A bare step works on inputs that are on
the device already: noised latents, text, target. Nothing is saved between the first step and the last.
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

from common import FOLDER, ROOT, Figure, parser, ratios, show, timed, wait
from make_full_size import make_once

from hcpdiff.config.load import load
from hcpdiff.quiet import quiet_libraries

BOUND = 1.03
WARM = 2  # steps before the first block; a bare block follows them that does not count

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


def bare_step(trainer, loss) -> None:
    """What the trainer's step does with a model."""
    with trainer.shadow.fresh() if trainer.shadow else contextlib.nullcontext():
        trainer.gradients.clear()
        trainer.loss_scale.scaled(loss()).backward()
    trainer.loss_scale.unscale(trainer.gradients.values)
    trainer.gradients.clip(trainer.max_grad_norm)
    trainer.optimizer.step()


def measure(args) -> tuple[list[float], list[float]]:
    """Seconds of the loop's steps and of the bare ones, of pairs of blocks."""
    from hcpdiff.train.parallel import Parallel
    from hcpdiff.train.run import Run
    from hcpdiff.train.trainer import Hook

    class Pairs(Hook):
        """The last hook: times blocks of steps that have ended, and does as many without the loop."""

        def __init__(self):
            self.whole, self.bare, self.loss, self.started = [], [], None, None

        def on_step_end(self, trainer):
            if self.loss is None:
                with contextlib.closing(trainer.feed.batches(trainer.state.positions, 0, 1, trainer.state.step, 1)) as feed:
                    self.loss = bare_loss(trainer.loss.__self__, next(feed)[2][0])
            if trainer.state.step < WARM or (trainer.state.step - WARM) % args.block:
                return
            trainer.settle()
            wait(args.device)
            if self.started:
                self.whole.append((time.perf_counter() - self.started) / args.block)
            took = timed(lambda: bare_step(trainer, self.loss), args.device, args.block)
            if self.started:
                self.bare.append(took)
            self.started = time.perf_counter()

    class Timed(Run):
        def _hooks(self):
            self.pairs = Pairs()
            return [*super()._hooks(), self.pairs]

    with tempfile.TemporaryDirectory() as place:
        model = ROOT / "demo" / "model" if args.tiny else make_once(args.model, args.device)
        keys = [f"exp_dir={place}/run", f"model.pretrained_model_name_or_path={model}", f"train.train_steps={WARM + args.rounds * args.block}", f"data.dataset1.batch_size={args.batch}",
                f"data.dataset1.bucket.target_area={args.pixels**2}", f"mixed_precision={args.dtype}",
                "model.gradient_checkpointing=false", f"model.compile={str(args.compile).lower()}", *([f"train.cpu_threads={args.threads}"] if args.threads else [])]
        run = Timed(load(str(ROOT / "benchmarks" / "full_size.yaml"), keys), Parallel())
        run.train()
    return run.pairs.whole, run.pairs.bare


def figure(args, whole: list[float], bare: list[float]) -> Figure:
    """The loop to its bare step. The demo's model has no goal: its step is so short that a few milliseconds of any loop are more than 3 % of it, so what counts
    there are the milliseconds."""
    what = f"a step of a run, {'the demo model' if args.tiny else 'SD1.5'}, {args.pixels} px, batch {args.batch}, {args.dtype}{', compiled' if args.compile else ''}"
    values = {"step s": statistics.median(whole), "bare s": statistics.median(bare)}
    own = {"the loop's own ms": 1000 * statistics.median(a - b for a, b in zip(whole, bare))}
    return Figure(what, "its own bare step", ratios(whole, bare), None if args.tiny else BOUND, values=values | own)


def main() -> None:
    """Measures and prints."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--model", type=Path, default=FOLDER, help="a model in diffusers format; made where it is missing")
    options.add_argument("--pixels", type=int, default=256)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--block", type=int, default=3, help="steps that are timed together")
    options.add_argument("--dtype", choices=["fp32", "bf16", "fp16", "auto"], default="auto")
    options.add_argument("--compile", action="store_true", help="with model.compile; the bare step too")
    options.add_argument("--tiny", action="store_true", help="the demo's model in the place of one of full size")
    args = options.parse_args()
    show("the whole loop", [figure(args, *measure(args))], args)


if __name__ == "__main__":
    main()

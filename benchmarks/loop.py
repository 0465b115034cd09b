"""What a step costs in a whole run (data, caches, logging, hooks) against the same run's bare step: forward, backward, clipping, optimizer.

    python benchmarks/loop.py                         # SD1.5 of full size, 256 px, batch 1, fp32 on a CPU
    python benchmarks/loop.py --pixels 512 --rounds 12
    python benchmarks/loop.py --tiny                  # the demo's small model: here the loop's own work is seen best

A real run trains; after each of its steps the bare step is done once on a batch that is kept. Nothing is saved between the first step and the last.
"""

import tempfile
import time
from pathlib import Path

from common import ROOT, Figure, parser, ratios, show, wait
from make_full_size import FOLDER, make_once

from hcpdiff.config.load import load
from hcpdiff.quiet import quiet_libraries

BOUND = 1.03

quiet_libraries()


def measure(args) -> tuple[list[float], list[float]]:
    """Seconds of the loop's steps and of the bare ones, in pairs."""
    from hcpdiff.train.parallel import Parallel
    from hcpdiff.train.run import Run
    from hcpdiff.train.trainer import Hook

    class Pairs(Hook):
        """The last hook: times the step that has ended, and does it again without the loop."""

        def __init__(self):
            self.whole, self.bare, self.batch, self.started = [], [], None, None

        def on_step_end(self, trainer):
            if self.batch is None:
                self.batch = next(trainer.feed.batches(trainer.state.positions, 0, 1, trainer.state.step, 1))[2][0]
            elif trainer.state.step > 2:
                trainer.settle()
                wait(args.device)
                self.whole.append(time.perf_counter() - self.started)
            wait(args.device)
            started = time.perf_counter()
            trainer.gradients.clear()
            trainer.backward(self.batch)
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
                f"data.dataset1.bucket.target_area={args.pixels**2}", f"mixed_precision={args.dtype}", *([f"train.cpu_threads={args.threads}"] if args.threads else [])]
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

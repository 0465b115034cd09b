"""What a step of the trainer costs beside the model: a LoRA of SD1.5's size with a loss that costs nothing, AdamW, CPU time of one thread.

    python benchmarks/trainer_step.py          # numbers looked at in the step, as on a CPU
    python benchmarks/trainer_step.py late     # learnt one step later, as beside a GPU
    python benchmarks/trainer_step.py loop     # AdamW as torch has it by default on a CPU, a loop over the tensors
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import common  # noqa: F401 - finds hcpdiff
import torch
from torch import nn

from hcpdiff.train.optim import Gradients, optimizer_groups
from hcpdiff.train.signals import StopRequest
from hcpdiff.train.trainer import Hook, Trainer
from hcpdiff.trainables.lora import ParamGroup

WARM = 20  # steps that do not count


class Steps:
    """Steps without content."""

    def batches(self, start, rank, world, first_index, count):
        """As a Feed's."""
        for step in range(count):
            yield step, start, [step]


class Clock(Hook):
    """CPU seconds between steps."""

    def __init__(self):
        self.times, self.last = [], time.process_time()

    def on_step_end(self, trainer):
        now = time.process_time()
        self.times.append(now - self.last)
        if trainer.state.step % 50 == 0:
            trainer.take_records()
        self.last = time.process_time()


def measure(steps: int, late: bool, loop: bool) -> float:
    """Median milliseconds a step."""
    torch.set_num_threads(1)
    widths = [(320, 640, 1280)[n % 3] for n in range(160)]
    parameters = [nn.Parameter(torch.randn(shape)) for width in widths for shape in ((4, width), (width, 4))]
    group, clock = ParamGroup("lora", 1e-4, tuple(parameters)), Clock()
    trainer = Trainer(feed=Steps(), loss=lambda batch: sum(p.square().sum() for p in parameters[:4]), gradients=Gradients([group], torch.device("cpu")),
                      optimizer=torch.optim.AdamW(optimizer_groups([group], 1.0), fused=not loop), lr_factor=lambda step: 1.0, hooks=[clock], total_steps=WARM + steps, max_grad_norm=1.0,
                      parallel=SimpleNamespace(rank=0, world=1, sum_=lambda tensor: tensor), max_nonfinite=3, fp16=False, lag=late)
    trainer.state.positions = [SimpleNamespace(epoch=0)]
    trainer.fit(StopRequest())
    return 1000 * statistics.median(clock.times[WARM:])


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("how", nargs="?", choices=["late", "loop"])
    options.add_argument("--steps", type=int, default=200, help="steps that count")
    args = options.parse_args()
    print(f"{measure(args.steps, args.how == 'late', args.how == 'loop'):.1f} ms a step")


if __name__ == "__main__":
    main()

"""Train on as many processes as a launcher starts: `accelerate launch -m hcpdiff.train_ac --cfg FILE key=value ...`."""

import argparse
import datetime

from . import cli

EXAMPLE = """examples:
  accelerate launch -m hcpdiff.train_ac_single --cfg cfgs/train/lora1.yaml
  python -m hcpdiff.train_ac_single --cfg cfgs/train/lora1.yaml unet_lr=0.0002 train.train_epochs=10
  accelerate launch --multi_gpu --num_processes 2 -m hcpdiff.train_ac --cfg cfgs/train/lora1.yaml
Every key, its default and its meaning: cfgs/train/train_base.yaml
exit codes: 0 done, 2 a mistake in config, command line or data, 3 NaN or infinity too often,
130 or 143 stopped by Ctrl-C or SIGTERM after finishing and saving the step"""


def parser() -> argparse.ArgumentParser:
    """Command line of the training commands."""
    return cli.config_parser("hcpdiff.train_ac", "Train LoRA on every process that the launcher starts.", EXAMPLE)


def main(args: argparse.Namespace) -> int:
    """Checks the config without torch, then trains."""
    from .config.load import load
    from .config.schema import RunConfig
    from .data.source import check_sources
    from .errors import DataError

    now = datetime.datetime.now()
    loaded = load(args.cfg, args.overrides, RunConfig, now=now, allow=args.allow_target)
    faults = check_sources(loaded.config.data)
    if faults:
        raise DataError(faults)
    from .quiet import quiet_libraries

    quiet_libraries()
    from .train.parallel import Parallel
    from .train.run import Run

    parallel = Parallel()
    if parallel.world > 1:  # one moment for all
        loaded = load(args.cfg, args.overrides, RunConfig, now=parallel.share(now), allow=args.allow_target)
    code = Run(loaded, parallel, args.allow_target).train()
    parallel.close()
    return code


if __name__ == "__main__":
    cli.run(main, parser)

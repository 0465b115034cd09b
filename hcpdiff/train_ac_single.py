"""Train on one device: `accelerate launch -m hcpdiff.train_ac_single --cfg FILE key=value ...`, or the same with `python -m`."""

import argparse
import os

from . import cli, train_ac


def parser() -> argparse.ArgumentParser:
    """Command line of the one-device command."""
    return cli.config_parser("hcpdiff.train_ac_single", "Train LoRA on one device.", train_ac.EXAMPLE)


def main(args: argparse.Namespace) -> int:
    """Under a launcher of several processes local rank 0 trains alone and the others leave."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1:
        if int(os.environ.get("LOCAL_RANK", 0)) != 0:
            return 0
        cli.say(f"{started} processes were started; train_ac_single uses one device, the others leave. For all of them: accelerate launch -m hcpdiff.train_ac ...")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    return train_ac.train(args, asked=None)


if __name__ == "__main__":
    cli.run(main, parser)

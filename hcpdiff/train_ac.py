"""Train on as many processes as a launcher starts: `accelerate launch -m hcpdiff.train_ac --cfg FILE key=value ...`."""

import argparse
import datetime
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import cli
from .train import launcher

EXAMPLE = """examples:
  accelerate launch -m hcpdiff.train_ac_single --cfg cfgs/train/lora1.yaml
  python -m hcpdiff.train_ac_single --cfg cfgs/train/lora1.yaml unet_lr=0.0002 train.train_epochs=10
  accelerate launch --multi_gpu --num_processes 2 -m hcpdiff.train_ac --cfg cfgs/train/lora1.yaml
Every key, its default and its meaning: cfgs/train/train_base.yaml
exit codes: 0 done, 1 a fault of hcpdiff (with a traceback), 2 a mistake in config, command line or data,
3 NaN or infinity too often, 4 another process of the run was lost,
130, 143, 129 stopped by Ctrl+C, SIGTERM, or the terminal's end: once it trains, the step is finished and saved first"""


def parser() -> argparse.ArgumentParser:
    """Command line of the training commands."""
    return cli.config_parser("hcpdiff.train_ac", "Train LoRA on every process that the launcher starts.", EXAMPLE)


def main(args: argparse.Namespace) -> int:
    """Checks the config without torch, then trains on all processes."""
    return train(args, launcher.asked_processes(launcher.launcher_command()))


def train(args: argparse.Namespace, asked: int | None) -> int:
    """Checks all that can be checked without torch, then trains. asked: how many processes the launcher's command line names; None: not checked."""
    from .config.load import load
    from .config.schema import RunConfig
    from .train.signals import StopRequest, orphaned

    sys.stdout, sys.stderr = cli.Steady(sys.stdout), cli.Steady(sys.stderr)  # a run does not end with its terminal
    now = datetime.datetime.now()
    loaded = load(args.cfg, args.overrides, RunConfig, now=now, allow=args.allow_target, also=quick_checks)
    started = int(os.environ.get("WORLD_SIZE", 1))
    launcher.check_count(started, asked or started)
    if cli.rank() == 0:  # the other processes come later, when rank 0 may have made the folder
        check_early(loaded)
    with StopRequest() as stop:
        if loaded.config.train.on_orphan == "stop" and launcher.launcher_command():
            stop.looks.append(orphaned(stop, launcher.PARENT))
        from .families.ahead import read_ahead, weights_ahead
        from .importing import importing
        from .quiet import quiet_libraries

        cli.reading()
        model = loaded.config.model
        read_ahead(weights_ahead(model.pretrained_model_name_or_path, model.vae, model.revision, model.variant))
        with importing():
            quiet_libraries()
            from .families.clip_unet import import_kinds
            from .train.parallel import Parallel
            from .train.run import Run  # noqa: F401 - and all that it imports

            import_kinds()
        return run(loaded, args, Parallel(), stop, now)


def run(loaded, args: argparse.Namespace, parallel, stop, now: datetime.datetime) -> int:
    """The run among its processes: whatever ends one of them ends all, and one of them says it."""
    from .config.load import load
    from .train.run import Run

    try:
        parallel.watch(stop, needs_launcher=loaded.config.train.on_orphan == "stop")
        if parallel.world > 1:  # one moment for all
            loaded = load(args.cfg, args.overrides, type(loaded.config), now=parallel.share(now), allow=args.allow_target)
        code = Run(loaded, parallel, args.allow_target, stop).train()
    except (Exception, KeyboardInterrupt) as error:
        parallel.end(error, stop)
        raise  # with no name for the error left in this frame, which the error holds: what the run held would wait for the collector of cycles
    parallel.close()
    return code


def check_early(loaded) -> None:
    """ConfigError where the run folder, or the run that is gone on from, shows by its names and its newest state alone that this cannot be, or where the base model cannot
    be had; with what else is quickly seen. All of it is looked at again, with locks, when the run has its models."""
    from .errors import ConfigError, collect
    from .families import not_to_be_had

    cfg, faults = loaded.config, []
    collect(faults, lambda: check_folder(loaded))
    if faults or not_to_be_had(cfg.model.pretrained_model_name_or_path, cfg.model.vae, cfg.model.revision):
        model = {f"model.{name}": getattr(cfg.model, name) for name in ("pretrained_model_name_or_path", "config", "vae", "prediction_type", "revision")}
        raise ConfigError(faults + quick_checks(model | {f"data.{name}": data for name, data in cfg.data.items()}))


def check_folder(loaded) -> None:
    """HCPError where a new run cannot have its folder, or a resumed one is at work, was another one, or is done."""
    from .train import folder

    cfg = loaded.config
    if cfg.train.resume:
        check_resume(cfg.train.resume, cfg.train, loaded.plain)
    else:
        folder.check(cfg.exp_dir, "exp_dir" in loaded.timed)


def check_resume(resume: str, train, plain: Mapping[str, Any], whole: bool = True) -> None:
    """HCPError where the run to go on from is not there, is at work, was another one, or is done. `train`: that block of the config, None if it has faults;
    `plain`: the config, or what is well of it."""
    from .checkpoint.runs import find_run
    from .train import resume_early
    from .train.lock import refuse_busy

    refuse_busy(Path(resume))  # before what it holds is looked at: a run at work may have saved nothing yet
    found, step = find_run(resume)
    refuse_busy(found)
    if train is not None:
        resume_early.check(train, plain, found, step, int(os.environ.get("WORLD_SIZE", 1)), whole)


def quick_checks(passed: Mapping[str, Any]) -> list[str]:
    """Beside a config's own faults: what can be said without torch of the data, the base model, and the run that is gone on from."""
    from .config.shape import to_plain
    from .data.source import check_sources
    from .errors import collect
    from .families import not_to_be_had, quick_faults

    data = {key.removeprefix("data."): value for key, value in passed.items() if re.fullmatch(r"data\.[^.\[]+", key)}
    model = {key.removeprefix("model."): value for key, value in passed.items() if key.startswith("model.")}
    source, vae, told, faults = model.get("pretrained_model_name_or_path"), model.get("vae"), model.get("prediction_type", "auto"), check_sources(data)
    if source:
        faults += quick_faults(source, without=("vae",) if vae else (), configs=model.get("config"), prediction=None if told == "auto" else told)
    faults += not_to_be_had(source, vae, model.get("revision"))
    if resume := passed.get("train.resume"):
        plain = {key: to_plain(value) for key, value in passed.items() if "[" not in key}
        collect(faults, lambda: check_resume(resume, passed.get("train"), plain, whole=False))
    return faults


if __name__ == "__main__":
    cli.run(main, parser)

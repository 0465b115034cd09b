"""Who started this process: a launcher (accelerate, torchrun) or a person's shell. Found without torch, before anything slow."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError

PARENT = os.getppid()  # at the start: a parent that dies gives its children to another one
NAMES = {"accelerate", "accelerate-launch", "torchrun"}
MODULES = {"accelerate.commands.launch", "accelerate.commands.accelerate_cli", "torch.distributed.run", "torch.distributed.launch"}


def launcher_command(parent: int = PARENT) -> list[str]:
    """The command line of the launcher that is our parent; empty where the parent is something else (a shell, init, a container's first process)."""
    command = command_of(parent)
    started = any(Path(word).name.removesuffix(".exe") in NAMES or word in MODULES for word in command[:5])
    return command if started else []


def command_of(pid: int) -> list[str]:
    """The command line of a process of this machine, as words; empty where it cannot be seen."""
    try:
        return [word for word in Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0") if word]
    except OSError:
        pass
    if os.name == "nt":
        return []
    try:
        return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, timeout=5).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def check_count(started: int, asked: int) -> None:
    """ConfigError where another number of processes runs than was asked for."""
    if started != asked:
        raise ConfigError(f"{asked} processes were asked for, but {started} run{'s' if started == 1 else ''}. "
                          f"On a CPU: accelerate launch --multi_gpu --num_processes {asked} -m hcpdiff.train_ac ... (--cpu starts one only)")


def asked_processes(command: Sequence[str]) -> int | None:
    """The number that `--num_processes` of accelerate's command line asks for; None where it is not written there."""
    for word, after in zip(command, [*command[1:], ""]):
        name, _, value = word.partition("=")
        if name.replace("-", "_").lstrip("_") == "num_processes" and name.startswith("--"):
            return int(value or after) if (value or after).isdigit() else None
        if word == "-m" and "hcpdiff" in after:  # ours begins
            return None
    return None

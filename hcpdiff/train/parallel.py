"""Processes of one run: who this one is, the few collectives that training needs, and how all of them end when one does."""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import ConfigError, PeerError
from .launcher import check_count
from .peers import Peers
from .signals import StopRequest

T = TypeVar("T")
# How long a process waits for another one in a collective. Not the ten minutes that NCCL has by default: latents of one share can take longer than those of another,
# and rank 0 saves and logs alone. A process that dies or falls silent is seen by other means (peers.py), so only one that hangs alive costs this long.
WAIT = datetime.timedelta(hours=3)


class Parallel:
    """Rank, world size, device and collectives; accelerate's PartialState starts the process group."""

    def __init__(self):
        """ConfigError where more processes than devices were started, or accelerate sees another number of them."""
        from accelerate import PartialState

        from ..device import pick_device

        accelerator = pick_device().type
        _check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), accelerator)
        self.state = PartialState(cpu=accelerator == "cpu")
        self.rank, self.world, self.local_rank = self.state.process_index, self.state.num_processes, self.state.local_process_index
        check_count(self.world, int(os.environ.get("WORLD_SIZE", 1)))
        self.device = pick_device(self.local_rank)
        self.group = dist.new_group(timeout=WAIT) if self.world > 1 else None
        self.peers = Peers(self.rank, self.world) if self.world > 1 else None

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the only one that writes."""
        return self.rank == 0

    @property
    def per_machine(self) -> int:
        """Processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world))

    def watch(self, stop: StopRequest, needs_launcher: bool = True) -> None:
        """Lets the thread of `stop` look whether the other processes live. needs_launcher: whether the run ends with its launcher."""
        if self.peers is not None:
            self.peers.needs_store = needs_launcher
            stop.looks.append(lambda: self.peers.look(stop))

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the processes, in place."""
        if self.world > 1:
            self._together(lambda: dist.all_reduce(tensor, group=self.group))
        return tensor

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank. The value is plain data."""
        if self.world == 1:
            return value
        box = [value]
        self._together(lambda: dist.broadcast_object_list(box, src=0, group=self.group))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        box = [None] * self.world
        self._together(lambda: dist.all_gather_object(box, value, group=self.group))
        return box

    def faults(self, own: Sequence[str]) -> list[str]:
        """Every rank's faults, on every rank, each once; one that not all ranks have says whose it is."""
        if self.world == 1:
            return list(own)
        of_rank = self.gather(list(own))
        everywhere = [fault for fault in of_rank[0] if all(fault in faults for faults in of_rank)]
        return everywhere + [f"process {rank}: {fault}" for rank, faults in enumerate(of_rank) for fault in faults if fault not in everywhere]

    def _together(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:  # what torch raises when a connection ends
            raise PeerError("another process of this run has ended without a word: killed (was the main memory full?), crashed, or its machine is out of reach. "
                            "What it said last stands above; the launcher tells its exit code.") from error

    def end(self, error: BaseException, stop: StopRequest) -> None:
        """Ends all processes for `error`. Comes back in the one process that tells it; in the others, which end for its sake, raises a silent exit."""
        if self.peers is None:
            return
        code = getattr(error, "exit_code", 1)
        stop.leave(code)
        first, code = self.peers.end(code, wait=isinstance(error, PeerError))
        if not first:
            raise SystemExit(code) from None
        error.this_rank_only = True

    def close(self) -> None:
        """Ends the process group."""
        if self.peers is not None:
            self.peers.close()
        self.state.destroy_process_group()


def _check_devices(per_machine: int, accelerator: str) -> None:
    devices = getattr(torch, accelerator).device_count() if accelerator in ("cuda", "xpu") else 1 if accelerator == "mps" else per_machine
    if per_machine > devices:
        raise ConfigError(f"{per_machine} processes on this machine, but it has {devices} device{'s' if devices > 1 else ''} ({accelerator}): start as many as there are "
                       f"(--num_processes {devices} on one machine).")

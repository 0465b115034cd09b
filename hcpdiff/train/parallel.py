"""Processes of one run: who this one is, and the few collectives that training needs."""

import os

import torch
import torch.distributed as dist

from ..errors import ConfigError


class Parallel:
    """Rank, world size, device and collectives; accelerate's PartialState starts the process group."""

    def __init__(self):
        from accelerate import PartialState

        from ..device import pick_device

        accelerator = pick_device().type
        self.state = PartialState(cpu=accelerator == "cpu")
        self.rank, self.world, self.local_rank = self.state.process_index, self.state.num_processes, self.state.local_process_index
        asked = int(os.environ.get("WORLD_SIZE", 1))
        if asked != self.world:
            raise ConfigError(f"the launcher started {asked} processes, but accelerate sees {self.world}. On a CPU: accelerate launch --multi_gpu --num_processes {asked} -m hcpdiff.train_ac ...")
        self.device = pick_device(self.local_rank)

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the only one that writes."""
        return self.rank == 0

    @property
    def per_machine(self) -> int:
        """Processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world))

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value):
        """Rank 0's value, on every rank. The value is plain data."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value) -> list:
        """Every rank's value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        box = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def close(self) -> None:
        """Ends the process group."""
        self.state.destroy_process_group()


"""What the processes of a run know of each other beside the collectives: the first one that fails says so in the launcher's store, and each shows that it lives.

A process that waits in a collective for one that has died would else wait for the collective's timeout (NCCL), or end with a traceback of its own (gloo).
"""

import datetime
import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from .signals import StopRequest

T = TypeVar("T")
GRACE = 2.0  # seconds that a process which ends for another's sake leaves it to say why; launchers end all as soon as one has left
SILENT = 600.0  # seconds without a sign of life after which a process counts as lost
BEAT = 10.0  # seconds between two signs of life
DONE = b"done"


class Peers:
    """One connection to the store, used by this process's threads in turn; it answers also where a collective hangs.

    `needs_store`: whether processes of which nothing is heard because the store has ended count as lost too. A run that outlives its launcher sets it to False.
    """

    def __init__(self, rank: int, world: int):
        self.rank, self.store_gone, self.needs_store = rank, False, True
        self.key = f"hcpdiff/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=datetime.timedelta(seconds=30))
        self.heard = {peer: (b"", time.monotonic()) for peer in range(world) if peer != rank}  # last sign, and when it was new
        self.beat, self.ended = 0.0, False

    def end(self, code: int, wait: bool) -> tuple[bool, int]:
        """This process ends with an exit code: (whether it is the first one and has to say why, the exit code of the first one).

        wait: the end has its cause elsewhere; the process that knows it gets the time to say so first.
        """
        self.ended = True
        if wait:
            self._wait_for_word()
        said = self._ask(lambda: self.store.compare_set(f"{self.key}/failed", "", f"{self.rank} {code}").decode(), f"{self.rank} {code}")
        first, code = (int(part) for part in said.split())
        if first != self.rank:
            time.sleep(GRACE)
        return first == self.rank, code

    def _wait_for_word(self) -> None:
        for _ in range(int(GRACE / 0.1)):
            if self._failed():
                return
            time.sleep(0.1)

    def _ask(self, question: Callable[[], T], without: T) -> T:
        """The store's answer; `without` where the store has ended with its process (a killed launcher's)."""
        if self.store_gone:
            return without
        try:
            return question()
        except RuntimeError:
            self.store_gone = True
            return without

    def _failed(self) -> bool:
        return self._ask(lambda: self.store.check([f"{self.key}/failed"]), False)

    def look(self, stop: StopRequest) -> None:
        """Ends this process, wherever it waits, when another one has failed or is lost. Called by the thread of `stop`."""
        if self.ended:
            return
        if self._failed():
            self.ended = True
            _, code = self._ask(lambda: self.store.get(f"{self.key}/failed").decode(), "? 4").split()
            stop.leave(int(code))
        elif time.monotonic() - self.beat > BEAT:
            self.beat = time.monotonic()
            silent = self._silent()
            if silent:
                self.ended = True
                stop.leave(4, f"error: process {silent[0]} has not been heard of for {SILENT / 60:.0f} minutes (killed, or its machine is out of reach).")

    def _silent(self) -> list[int]:
        """Shows that this process lives; the others that have shown nothing for too long."""
        now = time.monotonic()
        self._ask(lambda: self.store.set(f"{self.key}/alive/{self.rank}", str(now)), None)
        for peer, (last, _) in self.heard.items():
            name = f"{self.key}/alive/{peer}"
            sign = self._ask(lambda: self.store.get(name) if self.store.check([name]) else b"", last)
            if sign != last:
                self.heard[peer] = (sign, now)
        if self.store_gone and not self.needs_store:
            return []
        return [peer for peer, (sign, since) in self.heard.items() if now - since > SILENT and sign != DONE]

    def close(self) -> None:
        """This process is done; the others need not hear of it any more."""
        self.ended = True
        self._ask(lambda: self.store.set(f"{self.key}/alive/{self.rank}", DONE), None)

"""Caches that several processes or ranks fill together, and runs that die while filling."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from data_help import Encoder, build, cached, filled, folder_of, right

from hcpdiff.errors import DataError


@pytest.fixture
def root(tmp_path):
    return folder_of(tmp_path / "imgs", 5)


def _fill_in_process(root, cache, answer):
    class Slow(Encoder):
        def __call__(self, pixels):
            time.sleep(0.02)
            return super().__call__(pixels)

    data, calls = filled(root, cache, encode=Slow())
    answer.put((calls, right(data)))


def test_two_processes_fill_one_cache(tmp_path):
    root = folder_of(tmp_path / "imgs", 10)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    running = [context.Process(target=_fill_in_process, args=(root, tmp_path / "c", answer)) for _ in range(2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked children must not wait for threads that they do not have
    for process in running:
        process.start()
    results = [answer.get(timeout=60) for _ in running]
    for process in running:
        process.join(60)
    torch.set_num_threads(threads)
    assert all(good for _, good in results)
    data, calls = filled(root, tmp_path / "c")
    assert calls == 0 and right(data)


def _fill_and_be_killed(root, cache):
    class Deadly(Encoder):
        def __call__(self, pixels):
            if self.calls == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(pixels)

    filled(root, cache, encode=Deadly())


def test_a_run_killed_while_filling_leaves_a_cache_that_works(root, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_fill_and_be_killed, args=(root, tmp_path / "c"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and list((tmp_path / "c" / "latents-1").glob("*.tmp"))
    data, calls = filled(root, tmp_path / "c")
    assert calls == 5 and right(data)


def test_an_interrupted_fill_keeps_what_it_has(root, tmp_path):
    class Interrupted(Encoder):
        def __call__(self, pixels):
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    with pytest.raises(KeyboardInterrupt):
        filled(root, tmp_path / "c", encode=Interrupted())
    assert filled(root, tmp_path / "c")[1] == 2


class Exchange:
    """all_gather_object between threads."""

    def __init__(self, world):
        self.barrier, self.slots = threading.Barrier(world, timeout=30), [None] * world

    def of(self, rank):
        def exchange(item):
            self.slots[rank] = item
            self.barrier.wait()
            everything = list(self.slots)
            self.barrier.wait()
            return everything
        return exchange


def on_ranks(world, work):
    """work(rank, exchange) on as many threads; results or errors in rank order."""
    exchange, results = Exchange(world), [None] * world

    def one_rank(rank):
        try:
            results[rank] = work(rank, exchange.of(rank))
        except DataError as error:
            results[rank] = error

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("mode", ["memory", "disk"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work_and_have_the_same_latents(root, tmp_path, mode, world):
    ranks = [(build(cached(root, tmp_path / "c", mode=mode)), Encoder()) for _ in range(world)]
    on_ranks(world, lambda rank, exchange: ranks[rank][0].cache_latents(ranks[rank][1], "v", rank, world, exchange))
    assert sorted(encode.calls for _, encode in ranks) == sorted(len(range(rank, 5, world)) for rank in range(world))
    assert all(right(data) for data, _ in ranks)


def test_ranks_without_a_common_file_system_fill_their_own_disk_cache(root, tmp_path):
    ranks = [build(cached(root, tmp_path / f"c{rank}")) for rank in range(2)]
    on_ranks(2, lambda rank, exchange: ranks[rank].cache_latents(Encoder(), "v", rank, 2, exchange))
    assert all(right(data) for data in ranks)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_a_fault_on_one_rank_is_told_by_all_and_none_waits(root, tmp_path, mode):
    ranks = [build(cached(root, tmp_path / "c", mode=mode)) for _ in range(2)]
    (root / "01.png").write_bytes(b"")  # the share of rank 1
    errors = on_ranks(2, lambda rank, exchange: ranks[rank].cache_latents(Encoder(), "v", rank, 2, exchange))
    assert all(isinstance(error, DataError) and "01.png" in str(error) for error in errors)


def test_progress_counts_images_to_the_end(root, tmp_path):
    seen = []
    build(cached(root, tmp_path / "c")).cache_latents(Encoder(), "v", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]

"""Batches: equal for any number of workers, with draws that belong to the sample; errors and ends come through as they are."""

import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from data_help import Encoder, build, dataset, epoch, folder_of, picture, source
from PIL import Image

from hcpdiff.data.loader import _Workers, ahead, step_batches
from hcpdiff.data.plan import Position
from hcpdiff.data.sample import Batch
from hcpdiff.errors import DataError, HCPError

posix = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")


def same(one, two):
    """Whether two batches are equal in every bit."""
    for name in (field.name for field in dataclasses.fields(one)):
        a, b = getattr(one, name), getattr(two, name)
        if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor) or not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return True


def full(root, **extra):
    """Settings that draw everything there is to draw."""
    one = source(root, caption_file=str(root), word_names={"pt1": "trig"}, flip=True, tag_shuffle=True, tag_dropout=0.3, caption_dropout=0.2, repeats=2)
    return dataset(one, bucket={"crop": "random", "crop_variants": 3}, **extra)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("imgs"), 8, captions=True)


def test_batches_do_not_depend_on_the_number_of_workers(root):
    runs = [list(build(full(root), full(root, batch_size=3), micro_per_step=2, workers=workers).batches(count=5)) for workers in (0, 1, 2)]
    for run in runs[1:]:
        assert len(run) == 5
        for (step, after, batches), (reference, reference_after, expected) in zip(run, runs[0]):
            assert step == reference and after == reference_after and len(batches) == len(expected) == 4
            assert all(same(one, two) for one, two in zip(batches, expected))


@posix
def test_a_signal_to_the_whole_job_leaves_the_loader_at_work(root):
    expected = list(build(full(root)).batches(count=3))
    batches = build(full(root), workers=1).batches(count=3)
    got = [next(batches)]
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(worker.pid, number)
    got += batches
    assert [step for step, _, _ in got] == [step for step, _, _ in expected]


def test_ranks_share_a_step_and_see_what_one_process_sees(root):
    whole = epoch(build(full(root), micro_per_step=2))
    ranks = [epoch(build(full(root), micro_per_step=2), rank=rank, world=2) for rank in range(2)]
    for number, (step, _, batches) in enumerate(whole):
        shared = [ranks[0][number][2], ranks[1][number][2]]
        both = [batch for pair in itertools.zip_longest(*shared) for batch in pair if batch is not None]
        assert len(both) == len(batches) and all(same(a, b) for a, b in zip(both, batches))


def test_going_on_from_a_position_gives_the_same_batches(root):
    whole = list(build(full(root)).batches(count=12))
    resumed = list(build(full(root)).batches(whole[4][1], first_index=5, count=7))
    assert [step.index for step, _, _ in resumed] == list(range(5, 12))
    assert all(same(a, b) for (_, _, one), (_, _, two) in zip(resumed, whole[5:]) for a, b in zip(one, two))


def test_every_draw_is_new_for_each_sample_and_each_epoch(root):
    batches = [batch for _, _, part in build(full(root)).batches(count=16) for batch in part]
    for name in ("noise", "vae_noise", "offset_noise", "u"):
        seen = [getattr(batch, name)[row].flatten()[0].item() for batch in batches for row in range(len(batch.ids))]
        assert len(set(seen)) == len(seen) > 16, name
    assert len({batch.module_seed for batch in batches}) == len(batches)


def test_noise_is_normal_and_timestep_draws_are_uniform(root):
    batches = [batch for _, _, part in build(full(root)).batches(count=60) for batch in part]
    noise = torch.cat([batch.noise.flatten() for batch in batches])
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    u = torch.cat([batch.u for batch in batches])
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1 and (u.mean() - 0.5).abs() < 0.1
    correlation = (torch.cat([b.noise.flatten() for b in batches]) * torch.cat([b.vae_noise.flatten() for b in batches])).mean()
    assert correlation.abs() < 0.02


def test_pixels_are_the_resized_image_in_minus_one_to_one(tmp_path):
    picture(64, 64, 3).save(tmp_path / "1.png")
    [(_, _, [batch])] = list(build(dataset(source(tmp_path))).batches(count=1))
    assert batch.pixels.dtype == torch.float32 and batch.pixels.shape == (1, 3, 64, 64) and batch.pixels.is_contiguous()
    back = ((batch.pixels[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    assert (back == np.asarray(picture(64, 64, 3))).all()
    assert batch.mask is None and batch.latent_mean is None and batch.ids == ("d0/s0/1.png",)


def test_sizes_are_height_then_width_and_crops_count_in_resized_pixels(tmp_path):
    picture(200, 100).save(tmp_path / "1.png")
    data = build(dataset(source(tmp_path), bucket={"sizes": [[64, 64]]}))
    [(_, _, [batch])] = list(data.batches(count=1))
    assert batch.original_size.tolist() == [[100, 200]] and batch.target_size.tolist() == [[64, 64]] and batch.crop_top_left.tolist() == [[0, 32]]


def test_flips_and_crops_are_all_drawn_and_pixels_show_them(tmp_path):
    picture(128, 64, 1).save(tmp_path / "1.png")
    data = build(dataset(source(tmp_path, flip=True), bucket={"sizes": [[64, 64]], "crop": "random", "crop_variants": 3}))
    whole = torch.from_numpy(np.array(picture(128, 64, 1))).permute(2, 0, 1) / 127.5 - 1
    expected = {(left, flip): whole[:, :, left:left + 64].flip(2) if flip else whole[:, :, left:left + 64] for left in (0, 32, 64) for flip in (False, True)}
    seen = set()
    for _, _, [batch] in data.batches(count=60):
        [match] = [key for key, pixels in expected.items() if torch.allclose(batch.pixels[0], pixels, atol=0.02)]
        seen.add(match)
        assert batch.crop_top_left.tolist() == [[0, 64 - match[0] if match[1] else match[0]]]
    assert seen == set(expected)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_masks_come_with_their_view_and_others_count_fully(tmp_path, cache):
    folder_of(tmp_path / "a", {"1.png": (64, 64)})
    (tmp_path / "m").mkdir()
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "m" / "1.png")
    folder_of(tmp_path / "b", {"2.png": (64, 64)})
    data = build(dataset(source(tmp_path / "a", att_mask=str(tmp_path / "m"), flip=True), source(tmp_path / "b"), cache_latents=cache))
    data.cache_latents(Encoder(), "v")
    left = torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 8)
    seen = set()
    for _, _, [batch] in data.batches(count=12):
        assert batch.mask.shape == (2, 1, 8, 8) and batch.mask.dtype == torch.float32
        masks = dict(zip(batch.ids, batch.mask[:, 0]))
        assert (masks["d0/s1/2.png"] == 1).all()
        [flipped] = [flip for flip in (False, True) if torch.allclose(masks["d0/s0/1.png"], left.flip(1) if flip else left, atol=0.02)]
        seen.add(flipped)
    assert seen == {False, True}


def test_cached_latents_are_those_of_the_same_pixels(root):
    plain, cached = build(full(root)), build(full(root, cache_latents="memory"))
    encode = Encoder()
    cached.cache_latents(encode, "v")
    for (_, _, one), (_, _, two) in zip(epoch(plain), epoch(cached)):
        for a, b in zip(one, two):
            mean, std = encode(a.pixels)
            assert torch.allclose(b.latent_mean, mean, atol=1e-6) and torch.equal(b.latent_std, std) and b.pixels is None
            assert torch.equal(a.noise, b.noise) and a.prompts == b.prompts and a.ids == b.ids


def test_prompts_of_the_coming_steps_are_exactly_those_of_their_batches(root):
    data = build(full(root), full(root), micro_per_step=3)
    middle = list(data.batches(count=2))[1][1]
    for start in (data.plan.start_of(0), data.plan.start_of(1), middle):
        seen = [prompt for _, _, batches in data.batches(start, count=data.steps_per_epoch) for batch in batches for prompt in batch.prompts]
        assert data.prompts_ahead(start, data.steps_per_epoch, 10**6) == (list(dict.fromkeys(seen)), True)


def test_a_rank_is_told_of_the_prompts_of_its_own_batches_only(root):
    data = build(full(root), full(root), micro_per_step=4)
    for steps in (1, data.steps_per_epoch, 7):
        for rank in range(2):
            seen = [prompt for _, _, batches in data.batches(rank=rank, world=2, count=steps) for batch in batches for prompt in batch.prompts]
            assert data.prompts_ahead(data.plan.start_of(0), steps, 10**6, rank, 2) == (list(dict.fromkeys(seen)), True)


def test_in_a_long_run_every_prompt_comes_to_every_rank(tmp_path):
    folder_of(tmp_path, 9, captions=True)
    data = build(dataset(source(tmp_path, caption_file=str(tmp_path)), batch_size=1), micro_per_step=2)
    start, epoch_steps = data.plan.start_of(0), data.steps_per_epoch

    def asked(rank, steps):
        return {data.maker.prompt(ref) for _, (step, _) in zip(range(steps), data.plan.steps(start)) for micro in step.of_rank(rank, 2) for ref in micro.samples}

    for rank in range(2):
        for steps in (1, epoch_steps, 4 * epoch_steps):
            prompts, whole = data.prompts_ahead(start, steps, 100, rank, 2)
            assert whole and set(prompts) == asked(rank, steps)
        prompts, whole = data.prompts_ahead(start, 10**9, 100, rank, 2)
        assert whole and len(prompts) == 9 and set(prompts) >= asked(rank, 40 * epoch_steps)
        prompts, whole = data.prompts_ahead(start, 10**9, 3, rank, 2)
        assert not whole and set(prompts) == asked(rank, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_damaged_or_gone_after_the_start_is_named_in_the_main_process(tmp_path, workers):
    folder_of(tmp_path, 4)
    data = build(dataset(source(tmp_path)), workers=workers)
    (tmp_path / "01.png").unlink()
    raw = (tmp_path / "02.png").read_bytes()
    (tmp_path / "02.png").write_bytes(raw[:len(raw) // 2])
    with pytest.raises(DataError) as caught:
        list(data.batches(count=data.steps_per_epoch))
    assert "01.png: the file is gone" in str(caught.value) or "02.png: image file is truncated" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()  # though `caught` still holds the error, and with it all that it came through


def test_a_closed_iterator_has_no_processes_left(root):
    batches = build(full(root), workers=2).batches()
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


class Acting:
    """A maker whose micro-batches say what is done: (function, arguments)."""

    def make(self, micro):
        micro[0](*micro[1:])
        return Batch(*[None] * len(dataclasses.fields(Batch)))


class Micros(list):
    """A step of these micro-batches, all of them this rank's."""

    def of_rank(self, rank, world):
        return self


def acting(*micros, workers=2, maker=None):
    return step_batches(iter([(Micros([micro]), []) for micro in micros]), maker or Acting(), lambda batch, micro: batch, 0, 1, workers)


def long_call(path):
    """One call of many minutes, in which Python hears of no signal."""
    path.touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


def once_there(path, act, *args):
    while not path.exists():
        time.sleep(0.01)
    act(*args)


@contextmanager
def limit(seconds=60):
    """TimeoutError for what takes longer; its processes are ended, so that nothing waits for them."""
    def late(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        for child in multiprocessing.active_children():
            child.kill()


@posix
def test_a_killed_worker_is_told_in_its_turn_while_another_one_is_in_a_long_call(tmp_path):
    there = tmp_path / "there"
    with limit():
        batches = acting((time.sleep, 0), (once_there, there, signal.raise_signal, signal.SIGKILL), (long_call, there))
        next(batches)
        with pytest.raises(HCPError, match="was killed .SIGKILL.: was the main memory full"):
            next(batches)
    assert not multiprocessing.active_children()


@posix
def test_closing_waits_for_no_long_call(tmp_path):
    there = tmp_path / "there"
    with limit():
        batches = acting((once_there, there, time.sleep, 0), (long_call, there), (long_call, there), (long_call, there))
        next(batches)
        batches.close()
    assert not multiprocessing.active_children()


@posix
def test_a_signal_to_the_whole_job_leaves_workers_at_work_that_have_only_begun():
    """They import for seconds before they can say what they do with one."""
    def tell():
        told = set()
        while len(told) < 2 and not done.is_set():
            for pid in {child.pid for child in multiprocessing.active_children()} - told - others:
                told.add(pid)
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                    os.kill(pid, number)
            time.sleep(0.005)
        assert len(told) == 2

    others, done = {child.pid for child in multiprocessing.active_children()}, threading.Event()
    with ThreadPoolExecutor(1) as pool:
        telling = pool.submit(tell)
        try:
            assert len(list(acting(*[(time.sleep, 0.1)] * 4))) == 4
        finally:
            done.set()
        telling.result()


class Long(Acting):
    """More than a pipe holds, as every maker of a few hundred images is."""

    def __init__(self):
        self.images = b"x" * 1_000_000


def spawned():
    """Processes that this one has started to make batches, from their first moment: `active_children` knows them when they have been told what to do."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(os.getpid()) and b"spawn_main" in stat.with_name("cmdline").read_bytes():
                found.add(int(stat.parent.name))
    return found


def strike(number, others):
    """Sends a signal to the first new one as soon as it is there."""
    until = time.monotonic() + 30
    while not (new := spawned() - others) and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(new.pop(), number)


has_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")


@has_proc
def test_a_worker_that_is_killed_while_it_starts_is_told():
    """Before it has read what it is to work with."""
    batches = acting((time.sleep, 0), workers=1, maker=Long())
    with ThreadPoolExecutor(1) as pool, limit():
        striking = pool.submit(strike, signal.SIGKILL, spawned())
        with pytest.raises(HCPError, match="was killed .SIGKILL."):
            next(batches)
        striking.result()


@has_proc
def test_a_worker_that_stands_still_while_it_starts_holds_up_neither_the_next_nor_the_end():
    others = spawned()
    with ThreadPoolExecutor(1) as pool, limit():
        striking, workers = pool.submit(strike, signal.SIGSTOP, others), _Workers(2, Long())
        made = [workers.submit((time.sleep, 0)) for _ in range(2)]
        striking.result()
        while not any(future.done() for future in made):
            time.sleep(0.01)
        workers.close()
    assert all(future.done() for future in made) and spawned() <= others


def no_start():
    raise RuntimeError("not in this process")


class Unmade(Acting):
    def __reduce__(self):
        return no_start, ()


def test_a_worker_that_cannot_start_is_not_called_killed(capfd):
    with pytest.raises(HCPError, match="has ended with exit code 1; what it said stands above") as caught:
        list(acting((time.sleep, 0), maker=Unmade()))
    assert "memory" not in str(caught.value) and "not in this process" in capfd.readouterr().err


@posix
def test_a_worker_that_a_signal_ends_is_not_called_killed():
    with pytest.raises(HCPError, match="was ended by SIGUSR1; what it said, if anything, stands above"):
        list(acting((signal.raise_signal, signal.SIGUSR1), workers=1))


class Needy(Exception):
    """Cannot be made again from what it is pickled as."""

    def __init__(self, one, two):
        super().__init__(one)


def fail(kind, *args):
    raise kind(*args)


def test_an_error_of_a_worker_comes_up_with_the_place_it_comes_from():
    with pytest.raises(ZeroDivisionError) as caught:
        list(acting((divmod, 1, 0), workers=1))
    assert "in make" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match="Needy in a loader process") as caught:
        list(acting((fail, Needy, "first", "second"), workers=1))
    assert "Needy: first" in "".join(caught.value.__notes__)


def test_a_want_of_memory_is_told_with_what_needs_less_and_is_no_fault_of_a_file(root, monkeypatch):
    with pytest.raises(DataError, match="no main memory was left to make a batch. A smaller batch_size"):
        list(acting((fail, MemoryError), workers=0))
    with pytest.raises(DataError, match="no main memory was left to make a batch"):
        list(acting((torch.empty, 1 << 50), workers=0))
    with pytest.raises(RuntimeError, match="another fault"):
        list(acting((fail, RuntimeError, "another fault"), workers=0))
    data = build(dataset(source(root)))
    monkeypatch.setattr("hcpdiff.data.image.decode", lambda *args: fail(MemoryError))
    for parent, way in ((None, "make large images smaller.$"), (1, ", or lower train.workers, each of which reads images.$")):
        monkeypatch.setattr("multiprocessing.parent_process", lambda parent=parent: parent)
        with pytest.raises(DataError, match=f"png: no main memory was left to read it.*{way}"):
            list(data.batches(count=1))


def test_a_rank_that_has_nothing_for_long_does_not_look_through_the_whole_plan():
    def steps():
        for number in range(10_000):
            taken.append(number)
            yield Micros(), []

    taken = []
    batches = step_batches(steps(), Acting(), lambda batch, micro: batch, 0, 1, 2)
    next(batches)
    batches.close()
    assert len(taken) < 20


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for a process in /proc")
def test_workers_end_with_a_main_process_that_was_killed(root, tmp_path):
    """They ask for nothing and are told nothing: they look."""
    (tmp_path / "main.py").write_text(
        "import multiprocessing, os, signal, sys; from data_help import build, dataset, source\n"
        "if __name__ == '__main__':\n"
        "    batches = build(dataset(source(sys.argv[1])), workers=1).batches()\n"
        "    next(batches)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n")
    paths = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent)))
    main = subprocess.Popen([sys.executable, tmp_path / "main.py", root], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True)
    pid = int(main.stdout.readline())
    assert main.wait() == -signal.SIGKILL
    ended = select.select([main.stdout], [], [], 60)[0] and not main.stdout.read()  # the worker has it open too
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert ended


def test_a_file_that_changes_its_size_after_the_start_is_named(tmp_path):
    folder_of(tmp_path, 1)
    data = build(dataset(source(tmp_path)))
    picture(33, 44).save(tmp_path / "00.png")
    with pytest.raises(DataError, match="00.png: was changed after the start: 33 x 44 now, 96 x 64 then"):
        list(data.batches(count=1))


def test_cached_data_needs_no_workers(root):
    assert build(full(root, cache_latents="memory"), workers="auto").workers == 0
    assert build(full(root, cache_latents="memory"), full(root), workers=2).workers == 2
    assert 1 <= build(full(root), workers="auto").workers <= 4


def test_a_step_in_which_a_rank_has_nothing_is_still_a_step(tmp_path):
    folder_of(tmp_path, {f"{n}.png": (64, 64) for n in range(5)})
    for rank, workers, expected in ((0, 0, [1, 1, 1, 1]), (1, 0, [1, 0, 1, 0]), (1, 1, [1, 0, 1, 0])):
        part = list(build(dataset(source(tmp_path)), micro_per_step=2, workers=workers).batches(count=4, rank=rank, world=2))
        assert [len(batches) for _, _, batches in part] == expected


def test_a_world_that_does_not_divide_the_step_is_refused(root):
    with pytest.raises(ValueError, match="no multiple"):
        build(full(root), micro_per_step=3).batches(world=2)


def test_batches_before_caching_are_refused(root):
    with pytest.raises(RuntimeError, match="cache_latents"):
        next(build(full(root, cache_latents="memory")).batches())


def test_the_thread_ends_with_the_iterator_and_raises_in_turn():
    def items():
        yield from range(10)
        raise DataError("late")

    before = threading.active_count()
    iterator = ahead(items(), 3)
    assert [next(iterator) for _ in range(10)] == list(range(10))
    with pytest.raises(DataError, match="late"):
        next(iterator)
    endless = ahead(itertools.count(), 3)
    next(endless)
    endless.close()
    assert threading.active_count() == before


def test_start_positions_are_kept_by_dataset(root):
    data = build(full(root), full(root, batch_size=3))
    [(_, after, _)] = list(data.batches([Position(0, 3), Position(4, 1)], count=1))
    assert after == [Position(0, 4), Position(4, 2)]

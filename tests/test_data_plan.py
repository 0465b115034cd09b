"""The plan: a pure function of seed, epoch and data, that gives every image its due whatever the number of processes."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcpdiff.data.plan import DatasetPlan, Plan, Position


def part(name="d", batch=4, weight=1.0, buckets=(7, 5, 1), repeats=1):
    total = sum(buckets)
    bounds = np.cumsum([0, *buckets])
    rows = [((64 * (n + 1), 64), np.arange(a, b)) for n, (a, b) in enumerate(itertools.pairwise(bounds))]
    return DatasetPlan(name, batch, weight, rows, np.broadcast_to(repeats, total))


def epoch_of(plan, start=None):
    return list(plan.epoch_steps(start or plan.start_of(0)))


def samples(steps, dataset=0):
    return [(ref.image, ref.occurrence) for step, _ in steps for micro in step.micro if micro.dataset == dataset for ref in micro.samples]


shapes = st.tuples(st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))


@settings(max_examples=50, deadline=None)
@given(shapes)
def test_every_image_is_seen_repeats_times_in_an_epoch(shape):
    batch, buckets, per_step, repeats, seed = shape
    plan = Plan([part(batch=batch, buckets=buckets, repeats=repeats)], per_step, seed)
    steps = epoch_of(plan)
    assert len(steps) == plan.steps_per_epoch and steps[-1][1] == [Position(1, 0)]
    assert Counter(samples(steps)) == Counter(itertools.product(range(sum(buckets)), range(repeats)))
    assert plan.samples_per_epoch() == sum(buckets) * repeats
    for step, _ in steps:
        for micro in step.micro:
            assert 1 <= len(micro.samples) <= batch
            [members] = [set(images) for size, images in plan.datasets[0].buckets if size == micro.size]
            assert {ref.image for ref in micro.samples} <= members


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0.1, 3), st.floats(0.1, 3))
def test_weights_of_each_dataset_sum_to_its_loss_weight_in_every_step(shape, first, second):
    batch, buckets, per_step, repeats, seed = shape
    plan = Plan([part("a", batch, first, buckets, repeats), part("b", 3, second)], per_step, seed)
    for step, _ in epoch_of(plan):
        for dataset, weight in enumerate((first, second)):
            assert sum(ref.weight for micro in step.micro if micro.dataset == dataset for ref in micro.samples) == pytest.approx(weight)


@pytest.mark.parametrize("world, accumulation", [(1, 4), (2, 2), (4, 1)])
def test_processes_and_accumulation_are_one_quantity(world, accumulation):
    reference = epoch_of(Plan([part(batch=4), part("b", 3)], 4, 1))
    steps = epoch_of(Plan([part(batch=4), part("b", 3)], world * accumulation, 1))
    assert steps == reference
    for step, _ in steps:
        ranks = [step.of_rank(rank, world) for rank in range(world)]
        assert sorted(itertools.chain(*ranks), key=repr) == sorted(step.micro, key=repr)
        assert max(map(len, ranks)) <= 2 * accumulation


def test_order_changes_with_epoch_and_seed_and_with_nothing_else():
    first = Plan([part(repeats=3)], 2, 1)
    orders = [samples(first.epoch_steps([Position(epoch, 0)])) for epoch in (0, 1, 0)] + [samples(Plan([part(repeats=3)], 2, 2).epoch_steps([Position(0, 0)]))]
    assert orders[0] == orders[2] and orders[0] != orders[1] and orders[0] != orders[3]
    assert samples(Plan([part(repeats=3)], 5, 1).epoch_steps([Position(0, 0)])) == orders[0]


def test_batches_mix_buckets_over_the_epoch():
    sizes = [micro.size for step, _ in epoch_of(Plan([part(buckets=(40, 40))], 1, 0)) for micro in step.micro]
    assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 30))
def test_going_on_from_any_position_gives_the_same_steps(shape, stop):
    batch, buckets, per_step, repeats, seed = shape

    def plan():
        return Plan([part("a", batch, 1.0, buckets, repeats), part("b", 2)], per_step, seed)

    whole = list(itertools.islice(plan().steps(), 40))
    resumed = list(itertools.islice(plan().steps(whole[stop][1], stop + 1), 39 - stop))
    assert resumed == whole[stop + 1:]


def test_the_other_datasets_run_on_in_epochs_of_their_own():
    plan = Plan([part("a", 1, buckets=(10,)), part("b", 1, buckets=(4,))], 1, 0)
    steps = epoch_of(plan)
    assert [micro.samples[0].epoch for step, _ in steps for micro in step.micro if micro.dataset == 1] == [0] * 4 + [1] * 4 + [2] * 2
    assert steps[-1][1] == [Position(1, 0), Position(2, 2)] == plan.start_of(1)
    assert Counter(image for image, _ in samples(steps, 1)[:8]) == Counter({image: 2 for image in range(4)})


def test_every_step_but_the_epochs_last_is_full_for_every_dataset():
    plan = Plan([part("a", 2, buckets=(11,)), part("b", 2, buckets=(5,))], 4, 0)  # 6 and 3 chunks
    counts = [[sum(micro.dataset == dataset for micro in step.micro) for dataset in (0, 1)] for step, _ in epoch_of(plan)]
    assert counts == [[4, 4], [2, 4]]


def test_a_position_at_an_epochs_end_is_the_next_ones_beginning():
    plan = Plan([part(buckets=(4,), batch=2)], 1, 0)
    assert plan.step([Position(0, 2)], 0) == plan.step([Position(1, 0)], 0)
    assert len(epoch_of(plan, [Position(0, 2)])) == 2


def test_a_million_images_are_planned_in_seconds_and_a_step_costs_no_more_for_it():
    rows = [((512, 512), np.arange(600_000)), ((512, 768), np.arange(600_000, 1_000_000))]
    plan = Plan([DatasetPlan("d", 4, 1.0, rows, np.ones(1_000_000, np.int64))], 2, 0)
    steps = list(itertools.islice(plan.steps(), 1000))
    assert plan.steps_per_epoch == 125_000 and len(set(samples(steps))) == 8000

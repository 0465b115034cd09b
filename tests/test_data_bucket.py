"""Buckets: sizes follow the images' ratios, within the area, in whole steps; the clustering is the best there is."""

import itertools

import numpy as np
import pytest
from data_help import build, dataset, folder_of, source
from hypothesis import given, settings
from hypothesis import strategies as st

from hcpdiff.data.bucket import cluster, cropped_share, fixed_buckets, ratio_buckets, size_for_ratio, upscaled
from hcpdiff.errors import DataError


def images(*sizes):
    return np.array(sizes, dtype=np.int32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 1000))
def test_clustering_is_as_good_as_trying_every_partition(values, count, seed):
    values = np.array(values)
    weights = np.random.default_rng(seed).integers(1, 9, len(values)).astype(float)

    def cost(centres):
        return (weights * ((values[:, None] - np.asarray(centres)[None]) ** 2).min(axis=1)).sum()

    order = np.argsort(values)
    v, w = values[order], weights[order]
    best = min(cost([np.average(v[a:b], weights=w[a:b]) for a, b in itertools.pairwise((0, *cuts, len(v)))])
               for size in range(min(count, len(v))) for cuts in itertools.combinations(range(1, len(v)), size))
    found = cluster(values, weights, count)
    assert len(found) <= count and (np.diff(found) > 0).all()
    assert cost(found) <= best + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6000), st.integers(1, 6000)), min_size=1, max_size=40), st.integers(1, 8),
       st.sampled_from([(512 * 512, 64), (512 * 768, 64), (1024 * 1024, 64), (4096, 8), (300 * 300, 32), (64 * 64, 64)]), st.booleans())
def test_every_image_has_one_bucket_within_area_in_whole_steps(sizes, count, shape, no_upscale):
    area, step = shape
    result = ratio_buckets(images(*sizes), np.ones(len(sizes)), area, count, step, no_upscale)
    assert len(result.assigned) == len(sizes)
    for width, height in result.sizes:
        assert width % step == 0 and height % step == 0 and step * step <= width * height <= area
    members = [number for _, part in result.members() for number in part]
    assert sorted(members) == list(range(len(sizes))) and len(result.members()) == len(result.sizes)
    if no_upscale:
        targets = np.array(result.sizes)[result.assigned]
        enlarged = set(np.flatnonzero(upscaled(images(*sizes), targets)))
        assert enlarged == set(result.too_small) == {n for n, size in enumerate(sizes) if min(size) < step}
    else:
        assert len(result.sizes) <= count


def test_the_result_does_not_depend_on_the_order_of_the_images():
    rng = np.random.default_rng(0)
    sizes = rng.integers(200, 2000, (300, 2)).astype(np.int32)
    order = rng.permutation(300)
    one, two = (ratio_buckets(part, np.ones(300), 512 * 512, 5, 64) for part in (sizes, sizes[order]))
    assert one.sizes == two.sizes and (one.assigned[order] == two.assigned).all()


@pytest.mark.parametrize("ratio, area, expected", [
    (1, 512 * 512, (512, 512)), (2 / 3, 512 * 768, (512, 768)), (3 / 2, 512 * 768, (768, 512)), (1, 1024 * 1024, (1024, 1024)), (1e6, 512 * 512, (4096, 64)),
])
def test_a_ratio_gets_the_size_one_expects(ratio, area, expected):
    assert size_for_ratio(float(np.log(ratio)), area, 64) == expected


def test_common_ratios_get_buckets_of_their_own():
    result = ratio_buckets(images(*[(1000, 1000)] * 5, *[(800, 1200)] * 5, *[(1200, 800)] * 5), np.ones(15), 512 * 768, 3, 64)
    assert sorted(result.sizes) == [(512, 768), (576, 576), (768, 512)] and not result.notices
    assert cropped_share(images((800, 1200)), np.array([(512, 768)]))[0] == 0


def test_repeats_pull_a_bucket_towards_what_is_seen_often():
    sizes = images((2000, 1000), (1000, 1000))
    heavy, light = (ratio_buckets(sizes, np.array(weights), 512 * 512, 1, 32).sizes[0] for weights in ([99, 1], [1, 99]))
    assert heavy[0] / heavy[1] > 1.7 and light[0] / light[1] < 1.2


@pytest.mark.parametrize("sizes, part", [([(100, 100), (300, 300)], "only 1 distinct aspect ratio"), ([(100, 100), (101, 100), (102, 100)], "round to one size")])
def test_fewer_buckets_than_asked_are_said(sizes, part):
    result = ratio_buckets(images(*sizes), np.ones(len(sizes)), 512 * 512, 3, 64)
    assert len(result.sizes) == 1 and "1 bucket instead of num_bucket = 3" in result.notices[0] and part in result.notices[0]


def test_cropped_share_is_what_covering_cuts_away():
    assert cropped_share(images((200, 100), (100, 100)), np.array([(64, 64), (64, 64)])).tolist() == [0.5, 0.0]


def test_fixed_sizes_take_the_nearest_ratio_then_the_nearest_area():
    result = fixed_buckets(images((1000, 1000), (300, 310), (900, 300)), [(512, 512), (1024, 1024), (768, 384)])
    assert [result.sizes[n] for n in result.assigned] == [(1024, 1024), (512, 512), (768, 384)]
    result = fixed_buckets(images((1000, 1000), (300, 310), (900, 300)), [(512, 512), (1024, 1024), (768, 256)], no_upscale=True)
    assert [result.sizes[n] for n in result.assigned[[0, 2]]] == [(512, 512), (768, 256)] and result.too_small == [1]


def test_no_upscale_gives_small_images_a_size_of_their_own_ratio():
    result = ratio_buckets(images((2000, 2000), (130, 260)), np.ones(2), 512 * 512, 1, 64, no_upscale=True)
    assert [result.sizes[n] for n in result.assigned] == [(512, 512), (128, 256)]


def test_a_hundred_thousand_images_are_bucketed_in_seconds():
    rng = np.random.default_rng(0)
    sizes = rng.integers(200, 4000, (100_000, 2)).astype(np.int32)
    result = ratio_buckets(sizes, np.ones(len(sizes)), 512 * 512, 20, 64)
    assert len(result.sizes) > 10 and sum(len(part) for _, part in result.members()) == 100_000


def test_images_too_small_for_no_upscale_are_named(tmp_path):
    folder_of(tmp_path, {"big.png": (80, 80), "tiny.png": (10, 50)})
    with pytest.raises(DataError, match=r"(?s)no_upscale.*1 images.*s0/tiny.png: 10 x 50"):
        build(dataset(source(tmp_path), bucket={"no_upscale": True}))


@pytest.mark.parametrize("bucket, part", [({"sizes": [[60, 64]]}, "sizes[0] = [60, 64]"), ({"sizes": [[64]]}, "sizes[0] = [64]"), ({"sizes": []}, "sizes is empty"),
                                          ({"sizes": [[72, 64]], "step_size": 16}, "multiples of 16")])
def test_wrong_sizes_are_faults(tmp_path, bucket, part):
    with pytest.raises(DataError) as caught:
        build(dataset(source(folder_of(tmp_path, 1)), step=None, bucket=bucket))
    assert part in str(caught.value)

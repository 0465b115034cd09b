"""Which size an image is trained at: sizes found by clustering aspect ratios, or given ones. numpy only.

Ratios are compared as logarithms, so that 2:1 is as far from 1:1 as 1:2 is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Size = tuple[int, int]
_BINS = 1024  # distinct log ratios kept apart while clustering; more are rounded to this many


@dataclass
class Buckets:
    """`sizes` (W, H) and, per image, the number of its size. `too_small`: images that no_upscale leaves without one. `notices`: for the report."""

    sizes: list[Size]
    assigned: np.ndarray
    notices: list[str] = field(default_factory=list)
    too_small: list[int] = field(default_factory=list)

    def members(self) -> list[tuple[Size, np.ndarray]]:
        """(size, image numbers) of every bucket that has images."""
        order = np.argsort(self.assigned, kind="stable")
        bounds = np.searchsorted(self.assigned[order], np.arange(len(self.sizes) + 1))
        parts = ((size, order[bounds[n]:bounds[n + 1]]) for n, size in enumerate(self.sizes))
        return [(size, images) for size, images in parts if len(images)]


def size_for_ratio(log_ratio: float, area: float, step: int) -> Size:
    """Width and height, multiples of `step` with at most `area` pixels, whose ratio is nearest; pixels given up count half as much as ratio."""
    widest = max(step, int(area / step) // step * step)
    ideal = math.sqrt(area * math.exp(log_ratio))
    low = min(widest, max(step, int(ideal * 0.75) // step * step))
    best = None
    for width in range(low, min(widest, int(ideal * 1.34) + step) + 1, step):
        top = max(step, int(area / width) // step * step)
        for height in range(top, max(0, int(top * 0.7)), -step):
            cost = abs(math.log(width / height) - log_ratio) + 0.5 * math.log(max(1.0, area / (width * height)))
            if best is None or cost < best[0] - 1e-12:
                best = (cost, (width, height))
    return best[1]


def cluster(log_ratios: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Centres (ascending) of the best weighted k-means in one dimension, found exactly by dynamic programming: no starting guess, no chance."""
    values, weights = _distinct(log_ratios, weights)
    count = min(count, len(values))
    total = np.concatenate([[0.0], np.cumsum(weights)])
    first = np.concatenate([[0.0], np.cumsum(weights * values)])
    second = np.concatenate([[0.0], np.cumsum(weights * values**2)])

    ends, begins = np.arange(1, len(values) + 1)[:, None], np.arange(len(values))[None, :]
    mass = np.where(ends > begins, total[ends] - total[begins], 1.0)
    spread = second[ends] - second[begins] - (first[ends] - first[begins]) ** 2 / mass
    cost = np.where(ends > begins, np.maximum(spread, 0.0), np.inf)  # cost[e - 1, b]: values b .. e-1 as one cluster

    best, cuts = cost[:, 0], []
    for _ in range(count - 1):
        through = np.concatenate([[np.inf], best[:-1]])[None, :] + cost
        cuts.append(through.argmin(axis=1))
        best = through[np.arange(len(values)), cuts[-1]]
    edges, end = [len(values)], len(values)
    for cut in reversed(cuts):
        end = int(cut[end - 1])
        edges.append(end)
    edges = [0, *reversed(edges)]
    return np.array([(first[b] - first[a]) / (total[b] - total[a]) for a, b in zip(edges, edges[1:])])


def _distinct(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rounded = np.round(values, 9)
    if len(np.unique(rounded)) > _BINS:
        low, high = rounded.min(), rounded.max()
        rounded = low + np.round((rounded - low) / (high - low) * (_BINS - 1)) * (high - low) / (_BINS - 1)
    found, inverse = np.unique(rounded, return_inverse=True)
    return found, np.bincount(inverse, weights=weights).astype(np.float64)


def ratio_buckets(sizes: np.ndarray, weights: np.ndarray, area: float, count: int, step: int, no_upscale: bool = False) -> Buckets:
    """Buckets by clustering. sizes: (n, 2) of image (W, H); weights: (n,), how often each is seen; area in pixels, at least step**2."""
    logs = np.log(sizes[:, 0] / sizes[:, 1])
    large = sizes.prod(axis=1, dtype=np.int64) >= area
    heard = large if no_upscale and large.any() else np.ones(len(sizes), dtype=bool)  # small images get sizes of their own: they do not pull
    centres = cluster(logs[heard], np.asarray(weights)[heard], count)
    found = list(dict.fromkeys(size_for_ratio(float(centre), area, step) for centre in centres))
    result = Buckets(found, _nearest(logs, found))
    if no_upscale:
        _shrink_small(result, sizes, area, step)
    kept = [n for n in range(len(result.sizes)) if (result.assigned == n).any()]
    renumber = np.full(len(result.sizes), -1)
    renumber[kept] = np.arange(len(kept))
    result.sizes, result.assigned = [result.sizes[n] for n in kept], renumber[result.assigned]
    if len(found) < count:
        ratios = len(np.unique(np.round(logs[heard], 9)))
        why = f"several ratios round to one size at step_size {step}; a smaller step_size tells them apart"
        if len(centres) < count:
            why = f"the images have only {ratios} distinct aspect ratio{'s' * (ratios != 1)}"
        result.notices.append(f"{len(found)} bucket{'s' * (len(found) != 1)} instead of num_bucket = {count}: {why}")
    return result


def fixed_buckets(sizes: np.ndarray, given: Sequence[Sequence[int]], no_upscale: bool = False) -> Buckets:
    """Each image goes to the given size of nearest ratio (of equal ratios: nearest in area); with no_upscale to one not larger than itself."""
    found = list(dict.fromkeys((int(width), int(height)) for width, height in given))
    table = np.array(found, dtype=np.float64)
    far = np.abs(np.log(sizes[:, 0] / sizes[:, 1])[:, None] - np.log(table[:, 0] / table[:, 1])[None, :])
    area = np.abs(np.log(sizes.prod(axis=1, dtype=np.float64))[:, None] - np.log(table.prod(axis=1))[None, :])
    cost = far + 1e-6 * area
    result = Buckets(found, np.zeros(0, np.int64))
    if no_upscale:
        fits = (sizes[:, None, :] >= table[None, :, :]).all(axis=2)
        cost = np.where(fits, cost, np.inf)
        result.too_small = np.flatnonzero(~fits.any(axis=1)).tolist()
    result.assigned = cost.argmin(axis=1)
    return result


def _nearest(logs: np.ndarray, found: Sequence[Size]) -> np.ndarray:
    centres = np.array([math.log(width / height) for width, height in found])
    order = np.argsort(centres, kind="stable")
    middles = (centres[order][1:] + centres[order][:-1]) / 2
    return order[np.searchsorted(middles, logs)]


def _shrink_small(result: Buckets, sizes: np.ndarray, area: float, step: int) -> None:
    """Give every image that its bucket would enlarge a bucket of its own ratio inside its own size."""
    numbers = {size: n for n, size in enumerate(result.sizes)}
    table = np.array(result.sizes)[result.assigned]
    for image in np.flatnonzero((sizes < table).any(axis=1)):
        width, height = (int(side) for side in sizes[image])
        if min(width, height) < step:
            result.too_small.append(int(image))
            continue
        size = _inside(width, height, area, step)
        if size not in numbers:
            numbers[size] = len(result.sizes)
            result.sizes.append(size)
        result.assigned[image] = numbers[size]


def _inside(width: int, height: int, area: float, step: int) -> Size:
    """The size inside width x height, within `area`, that keeps most of the ratio, then most pixels."""
    best = None
    for wide in range(step, width + 1, step):
        for high in range(step, min(height, int(area / wide)) + 1, step):
            cost = abs(math.log(wide / high) - math.log(width / height)) + 0.5 * math.log(min(area, width * height) / (wide * high))
            if best is None or cost < best[0] - 1e-12:
                best = (cost, (wide, high))
    return best[1]


def cropped_share(sizes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Share of each image's area that is cut away when it covers its target. Both (n, 2) as (W, H)."""
    ratio = (sizes[:, 0] / sizes[:, 1]) / (targets[:, 0] / targets[:, 1])
    return 1 - np.minimum(ratio, 1 / ratio)


def upscaled(sizes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Which images are enlarged to cover their target."""
    return (sizes < targets).any(axis=1)

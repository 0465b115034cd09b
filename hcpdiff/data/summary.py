"""What the training data is, in numbers that may go into a published file: counts, sizes and (when asked) tags; never paths or file names."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .sample import TrainDataset
from .source import Source
from .template import trigger_words, without_trigger


def folder_counts(datasets: Sequence[TrainDataset]) -> dict[str, dict[str, int]]:
    """Source -> its images and how often an epoch sees each; the names are the config's, with the repeats before them as kohya's folders have."""
    return {label: {"n_repeats": source.repeats, "img_count": len(source.keys)} for label, source in _labelled(datasets)}


def bucket_counts(datasets: Sequence[TrainDataset]) -> dict[str, Any]:
    """Sizes (width, height) and the samples of an epoch in each; mean distance of the images' aspect ratios from those of their sizes."""
    counts: Counter[tuple[int, int]] = Counter()
    errors, weights = [], []
    for data in datasets:
        repeats = np.repeat([source.repeats for source in data.sources], [len(source.keys) for source in data.sources])
        targets = np.array(data.bucket_sizes)[data.assigned]
        errors.append(np.abs(data.sizes[:, 0] / data.sizes[:, 1] - targets[:, 0] / targets[:, 1]))
        weights.append(repeats)
        for size, count in zip(map(tuple, targets.tolist()), repeats.tolist(), strict=True):
            counts[size] += count
    mean = float(np.average(np.concatenate(errors), weights=np.concatenate(weights)))
    return {"buckets": {str(number): {"resolution": list(size), "count": count} for number, (size, count) in enumerate(sorted(counts.items()))}, "mean_img_ar_error": mean}


def sample_count(datasets: Sequence[TrainDataset]) -> int:
    """Samples of an epoch over each dataset: images times repeats."""
    return sum(source.repeats * len(source.keys) for data in datasets for source in data.sources)


def tag_counts(datasets: Sequence[TrainDataset]) -> dict[str, dict[str, int]]:
    """Source -> tag -> images whose prompt has it, most frequent first. Tags are the caption's parts between commas, in lower case, and the trigger words
    of the template."""
    return {label: dict(sorted(_tags(source).items(), key=lambda item: (-item[1], item[0]))) for label, source in _labelled(datasets)}


def trigger_phrase(datasets: Sequence[TrainDataset]) -> str:
    """The trigger words of all sources, each once."""
    return ", ".join(dict.fromkeys(word for data in datasets for source in data.sources for word in trigger_words(source.prompter)))


def _tags(source: Source) -> Counter[str]:
    counts: Counter[str] = Counter()
    triggers = trigger_words(source.prompter)
    for text in source.captions.texts:
        caption = text or ""
        for trigger in triggers:
            caption, _ = without_trigger(caption, trigger)
        parts = [part.strip().lower() for part in caption.split(",")]
        counts.update(list(dict.fromkeys(part for part in (*triggers, *parts) if part)))
    return counts


def _labelled(datasets: Sequence[TrainDataset]) -> list[tuple[str, Source]]:
    """A label for each source: repeats and name, with the dataset's before it where two sources have one name."""
    names = Counter(source.name for data in datasets for source in data.sources)
    return [(f"{source.repeats}_{f'{data.name}.' if names[source.name] > 1 else ''}{source.name}", source) for data in datasets for source in data.sources]

"""The start report about the data: what was found, what is cropped, what the model will read."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .bucket import cropped_share, upscaled
from .files import shown
from .sample import TrainDataset

if TYPE_CHECKING:
    from .dataset import TrainData

_PROMPTS = 5  # first prompts shown
_NAMES = 5  # names shown of a longer list


def print_report(data: "TrainData", console: Any) -> None:
    """Tables of sources and buckets, the first prompts, prompts that are cut off, notices, and the shape of an epoch."""
    console.print(source_table(data.datasets))
    for dataset in data.datasets:
        console.print(bucket_table(dataset))
    plan = data.plan
    console.print(f"An epoch: {plan.samples_per_epoch()} samples in {data.steps_per_epoch} steps of up to {plan.micro_per_step} x {plan.datasets[0].batch_size}.", highlight=False)
    console.print("First prompts:" if len(data.datasets) == 1 else "First prompts of each dataset:", highlight=False)
    for name, prompt in first_prompts(data):
        console.print(f"  {name}: {prompt!r}", markup=False, highlight=False)
    for line in notices(data):
        console.print(f"Note: {line}", markup=False, highlight=False)


def source_table(datasets: list[TrainDataset]) -> Any:
    """One row per source: images, captions found, resolution, settings that change the number of samples."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Images", title_justify="left")
    for name, justify in [("source", "left"), ("folder", "left"), ("images", "right"), ("captions", "right"), ("from", "left"), ("smallest", "right"), ("largest", "right"), ("repeats", "right")]:
        table.add_column(name, justify=justify)
    for dataset in datasets:
        for source in dataset.sources:
            area = source.sizes.prod(axis=1, dtype=np.int64)
            small, large = source.sizes[area.argmin()], source.sizes[area.argmax()]
            captions = f"{source.captions.found} of {len(source.keys)}" if source.captions.form != "none" else "none"
            table.add_row(Text(f"{dataset.name}.{source.name}"), Text(source.root), str(len(source.keys)), captions, source.captions.form, f"{small[0]} x {small[1]}", f"{large[0]} x {large[1]}",
                          str(source.repeats))
    return table


def bucket_table(data: TrainDataset) -> Any:
    """One row per size: images, share of each image that is cropped away (worst and mean), images that are enlarged."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"Sizes of {data.name}, batches of {data.batch_size}"), title_justify="left")
    for name in ("width x height", "images", "cropped, mean", "worst", "enlarged"):
        table.add_column(name, justify="right")
    for size, count, mean, worst, enlarged in bucket_rows(data):
        table.add_row(f"{size[0]} x {size[1]}", str(count), f"{mean:.1%}", f"{worst:.1%}", str(enlarged))
    return table


def bucket_rows(data: TrainDataset) -> list[tuple[tuple[int, int], int, float, float, int]]:
    """(size, images, mean cropped share, worst cropped share, images enlarged) of each bucket."""
    targets = np.array(data.bucket_sizes)[data.assigned]
    cropped, larger = cropped_share(data.sizes, targets), upscaled(data.sizes, targets)
    parts = [(size, data.assigned == number) for number, size in enumerate(data.bucket_sizes)]
    return [(size, int(part.sum()), float(cropped[part].mean()), float(cropped[part].max()), int(larger[part].sum())) for size, part in parts if part.any()]


def first_prompts(data: "TrainData", count: int = _PROMPTS) -> list[tuple[str, str]]:
    """(image, prompt) of the first samples that the training takes of each dataset, as the model will see them; `count` together, at least one of each."""
    share = max(1, count // len(data.datasets))
    found: dict[int, list] = {number: [] for number in range(len(data.datasets))}
    for step, _ in data.plan.epoch_steps(data.plan.start_of(0)):
        for micro in step.micro:
            for ref in micro.samples:
                found[ref.dataset].append(ref)
        if all(len(refs) >= share for refs in found.values()):
            break
    several = len(data.datasets) > 1
    return [((f"{data.datasets[number].name}/" if several else "") + data.datasets[number].image_id(ref.image), data.maker.prompt(ref))
            for number, refs in found.items() for ref in refs[:share]]


def too_long(data: "TrainData") -> list[tuple[str, int]]:
    """(image, tokens) of every image whose longest prompt has more tokens than the model reads."""
    if data.token_count is None:
        return []
    found = []
    for dataset in data.datasets:
        for source in dataset.sources:
            for key, caption in zip(source.keys, source.captions.texts):
                prompt = source.prompter.longest(caption)
                if len(prompt.encode("utf-8")) > data.token_limit:  # a token is at least one byte, so shorter ones need no counting
                    tokens = data.token_count(prompt)
                    found += [(f"{source.name}/{shown(key)}", tokens)] if tokens > data.token_limit else []
    return found


def notices(data: "TrainData") -> list[str]:
    """What the user should know, though it stops nothing."""
    lines = []
    for dataset in data.datasets:
        for source in dataset.sources:
            where = f"{dataset.name}.{source.name}"
            lines += [f"{where}: {notice}" for notice in source.notices]
            missing = [key for key, text in zip(source.keys, source.captions.texts) if text is None]
            if source.captions.form != "none" and missing:
                lines.append(f"{where}: {len(missing)} images have no caption: {_some(missing)}")
            empty = [key for key, text in zip(source.keys, source.captions.texts) if text == ""]
            if empty:
                lines.append(f"{where}: {len(empty)} captions are empty: {_some(empty)}")
            if source.skipped:
                lines.append(f"{where}: {len(source.skipped)} images cannot be read and are left out: {_some(source.skipped)}")
    long = too_long(data)
    if long:
        repeats = -(-max(tokens for _, tokens in long) // 75)
        lines.append(f"{len(long)} prompts are longer than {data.token_limit} tokens and will be cut off: {_some([f'{name} ({tokens})' for name, tokens in long])}. "
                     f"model.tokenizer_repeats: {repeats} reads them whole.")
    return lines + data.notices


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return shown(", ".join(names[:_NAMES]) + more)

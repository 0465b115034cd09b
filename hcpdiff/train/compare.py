"""A run that is resumed against the run that was saved: what differs, and whether that would make it another run."""

from collections.abc import Mapping
from typing import Any

from ..data.fingerprint import changes as data_changes
from .compare_config import Changes, compare_configs, compare_images_per_step, differing, flat

LEARNT = {"prediction": "what the base model predicts", "schedule": "the noise schedule (digest)"}


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Both are what `describe` gives: config, marks of the base model's parts, what is learnt, data, world, accumulation, alphas, versions, device."""
    found = Changes()
    for part, mark in now["marks"].items():
        if saved["marks"].get(part) != mark:
            found.refused.append(f"the {part.replace('_', ' ')} has other weights")
    found.refused += [f"{title}: {saved['learns'][name]} before, {now['learns'][name]} now" for name, title in LEARNT.items()
                      if "learns" in saved and saved["learns"][name] != now["learns"][name]]
    found.refused += data_changes(saved["data"], now["data"])
    compare_images_per_step(saved, now, found)
    other = [path for path, alpha in now["alphas"].items() if saved["alphas"].get(path, alpha) != alpha]
    if other:
        found.refused.append(f"alpha of {len(other)} LoRA layers, such as {other[0]}: {saved['alphas'][other[0]]:g} before, {now['alphas'][other[0]]:g} now")
    compare_configs(saved["config"], now["config"], found)
    rest = {key: value for key, value in saved.items() if key in ("versions", "device")}, {key: value for key, value in now.items() if key in ("versions", "device")}
    found.notes += [line for _, line in differing(flat(rest[0]), flat(rest[1]))]
    return found

"""A small valid training config for tests, and ways to load it."""

import subprocess
import sys
from pathlib import Path

from hcpdiff.config.load import load
from hcpdiff.errors import ConfigError

CHECKOUT = Path(__file__).parents[1]
SMALL = """
unet_lr: 0.0006
lora_unet:
  - lr: ${unet_lr}
    layers: ['re:.*attn.?$']
train: {train_epochs: 20}
model: {pretrained_model_name_or_path: some/model}
data:
  dataset1:
    source:
      source1: {img_root: pictures}
"""


def write(folder: Path, text: str = SMALL, name: str = "run.yaml") -> str:
    """Writes a config and the image folder that SMALL names; the test's working directory is `folder`."""
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return name


def small(folder: Path, *overrides: str, more: str = "", **options):
    """SMALL, with more YAML after it and overrides, loaded."""
    return load(write(folder, SMALL + more), overrides, **options)


def faults(folder: Path, *overrides: str, text: str = SMALL, more: str = "", **options) -> list[str]:
    """The faults that loading gives; [] when it gives none."""
    try:
        load(write(folder, text + more), overrides, **options)
    except ConfigError as error:
        return error.faults
    return []


def command(*arguments: str, cwd=CHECKOUT, module: str = "hcpdiff.train_ac_single", **env) -> subprocess.CompletedProcess:
    """`python -m hcpdiff.train_ac_single ...`, its output as text."""
    import os

    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), **env}
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120)

"""The house: imports go down only, and a model family's name stays inside families/."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hcpdiff"
# Lower floors first; packages on one floor do not import each other, unless a pair is listed as allowed.
FLOORS = [
    {"errors", "randomness", "quiet", "importing", "assets", "threads", "model_names"},
    {"lora_tensors"},
    {"cli", "config", "adapters", "diffusion", "data", "device", "checkpoint.io", "checkpoint.format", "checkpoint.safetensors_header", "loss", "quantized"},
    {"families", "trainables", "checkpoint", "loggers"},
    {"train", "vis", "lora_tools"},
    {"train_ac", "train_ac_single", "visualizer", "tools"},
]
ALLOWED = {("trainables", "families"), ("tools", "train_ac"), ("train_ac_single", "train_ac"), ("train", "vis"), ("checkpoint", "families")}


def floor_of(name: str) -> int:
    return next(i for i in reversed(range(len(FLOORS))) if name in FLOORS[i])


def unit(module: str) -> str:
    """hcpdiff.checkpoint.io -> checkpoint.io where that has a floor of its own, else checkpoint."""
    parts = module.split(".")[1:]
    whole = ".".join(parts[:2])
    return whole if any(whole in floor for floor in FLOORS) else parts[0] if parts else ""


def imports(path: Path):
    here = ["hcpdiff", *path.relative_to(ROOT).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("hcpdiff"))
        elif isinstance(node, ast.ImportFrom):
            package = here[: len(here) - node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            if module.startswith("hcpdiff"):
                yield module
                if module == "hcpdiff" or (ROOT / Path(*module.split(".")[1:])).is_dir():
                    yield from (f"{module}.{alias.name}" for alias in node.names if (ROOT / Path(*module.split(".")[1:]) / f"{alias.name}.py").exists())


MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = unit("hcpdiff." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        other = unit(module)
        if not other or other == own or other.split(".")[0] == own.split(".")[0]:
            continue
        assert floor_of(other) < floor_of(own) or (own.split(".")[0], other.split(".")[0]) in ALLOWED, f"{own} imports {other}"


def test_the_trainer_knows_no_family():
    for place in ("train", "adapters", "data", "diffusion", "trainables", "loss"):
        for path in (ROOT / place).rglob("*.py"):
            names = re.findall(r"\b(sdxl|flux|StableDiffusion\w*|families\.sd|UNet2DConditionModel|CLIPTextModel)\b", path.read_text(encoding="utf-8"))
            assert not names, f"{path.relative_to(ROOT)} names {set(names)}"
            parts = re.findall(r"""["'.](unet|text_encoder(?:_2)?|tokenizer(?:_2)?|te[12])["'.]""", path.read_text(encoding="utf-8"))
            assert not parts, f"{path.relative_to(ROOT)} names parts of a model: {set(parts)}; ask the family"

"""What the guide to training data prints works as printed, in both languages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from data_help import Encoder, build, cached, folder_of

from hcpdiff.config.load import load
from hcpdiff.data.dataset import build_train_data
from hcpdiff.data.template import load_templates

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / f"docs/{language}/user_guides/data.md" for language in ("en", "zh")]


def blocks(page, kind):
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_both_languages_print_the_same_blocks():
    assert [blocks(PAGES[0], kind) for kind in ("yaml", "text", "shell")] == [blocks(PAGES[1], kind) for kind in ("yaml", "text", "shell")]


@pytest.mark.parametrize("number", range(3))
def test_each_yaml_block_makes_batches(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    block = blocks(PAGES[0], "yaml")[number]
    for folder in re.findall(r"img_root: '(.*?)/'", block):
        folder_of(tmp_path / folder, 6, captions=True)
        folder_of(tmp_path / folder.replace("train_data", "train_masks"), 6)
    (tmp_path / "cats").mkdir(exist_ok=True)
    (tmp_path / "cats" / "captions.json").write_text('{"00": "a cat"}')
    (tmp_path / "run.yaml").write_text(f"_base_:\n  - cfgs/train/examples/lora_conventional.yaml\n{block}", encoding="utf-8")
    config = load("run.yaml").config
    data = build_train_data(config.data, seed=config.seed, micro_per_step=1)
    data.cache_latents(Encoder(), "v")
    [(step, _, batches)] = list(data.batches(count=1))
    assert len(batches) == len(config.data) and all(batch.latent_mean.shape[1] == 4 for batch in batches)
    assert sum(ref.weight for micro in step.micro for ref in micro.samples) == pytest.approx(sum(one.loss_weight for one in config.data.values()))


def test_the_printed_template_parses(tmp_path):
    (tmp_path / "t.txt").write_text(blocks(PAGES[0], "text")[0], encoding="utf-8")
    faults = []
    assert len(load_templates(str(tmp_path / "t.txt"), True, {"pt1": "x"}, "w", faults)) == 2 and not faults


def test_shipped_templates_parse_and_use_only_pt_and_caption():
    for path in sorted((ROOT / "cfgs/prompt_templates").glob("*.txt")):
        faults = []
        assert load_templates(str(path), True, {"pt1": "x", "pt2": "y"}, "w", faults) and not faults


def test_the_printed_cache_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "imgs", 3)
    build(cached(tmp_path / "imgs", ".hcp-cache")).cache_latents(Encoder(), "v")
    [commands] = blocks(PAGES[0], "shell")
    shown = ""
    for command in commands.strip().split("\n"):
        done = subprocess.run([sys.executable, *command.split()[1:]], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
        assert done.returncode == 0, done.stderr
        shown += done.stdout
    assert "3 entries in 1 packs" in shown and "removed 0 files" in shown
    done = subprocess.run([sys.executable, "-m", "hcpdiff.tools.cache", "info", "nowhere"], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 2 and "not a cache" in done.stderr and "Traceback" not in done.stderr

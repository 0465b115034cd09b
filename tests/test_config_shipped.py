"""What is shipped: configs that load, a reference that is current, a wheel that carries them."""

import os
import subprocess
import sys
import zipfile

import pytest
from config_help import CHECKOUT, command, write

from hcpdiff.config import read, shape, tree
from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.tools import config_reference

EXAMPLES = sorted(path.relative_to(CHECKOUT) for path in (CHECKOUT / "cfgs" / "train" / "examples").rglob("*.yaml"))
USER = """
_base_: [{base}]
model: {{pretrained_model_name_or_path: some/model}}
data: {{dataset1: {{source: {{source1: {{img_root: pictures, word_names: {{pt1: pt-cat1}}}}}}}}}}
"""


def with_base(folder, base, *overrides):
    return load(write(folder, USER.format(base=base)), overrides)


def test_generated_files_are_current():
    for name, text in config_reference.files().items():
        assert (CHECKOUT / name).read_text(encoding="utf-8") == text, f"run python -m hcpdiff.tools.config_reference ({name})"


def test_train_base_says_every_key_with_its_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = read.parse((CHECKOUT / "cfgs/train/train_base.yaml").read_text(encoding="utf-8"), tree.Origin())

    def compare(cls, node, path=""):
        for name, field in shape.fields(cls).items():
            if field.shape.record:
                compare(field.shape.record, node[name], f"{path}{name}.")
            elif not field.required:
                assert tree.plain(node[name]) == shape.to_plain(shape.default_of(field)), f"{path}{name}"
            else:
                assert name not in node
        assert set(node) <= set(shape.fields(cls))

    compare(RunConfig, base)
    text = (CHECKOUT / "cfgs/train/train_base.yaml").read_text(encoding="utf-8")
    for cls in (shape.fields(RunConfig)["data"].shape.map_item.record, shape.fields(RunConfig)["lora_unet"].shape.list_item.record):
        for name, field in shape.fields(cls).items():
            assert f"{name}:" in text and field.shape.key.doc in text and field.shape.key.zh in text


def test_train_base_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = "lora_unet: [{lr: 1, layers: [a]}]\ntrain: {train_epochs: 1}\n"
    bare = load(write(tmp_path, USER.format(base="empty.yaml") + own), now="2023-01-01") if write(tmp_path, "", "empty.yaml") else None
    full = load(write(tmp_path, USER.format(base="cfgs/train/train_base.yaml") + own, "full.yaml"), now="2023-01-01")
    assert bare.config == full.config


def test_every_key_has_a_meaning_in_both_languages():
    seen = []

    def visit(cls):
        for name, field in shape.fields(cls).items():
            seen.append(name)
            assert field.shape.key.doc and field.shape.key.zh, f"{cls.__name__}.{name}"
            inner = config_reference._inner(field.shape, name)[0]
            if inner:
                visit(inner)

    for schema in config_reference.PAGES.values():
        visit(schema)
    assert len(seen) > 80


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_every_example_loads_by_its_printed_name_from_any_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    loaded = with_base(tmp_path, path.as_posix())
    assert loaded.config.train.train_epochs == 20 and loaded.config.train.save_step == 100 and loaded.notices == []


def test_the_template_is_what_the_guide_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = with_base(tmp_path, "cfgs/train/examples/lora_conventional.yaml").config
    (group,) = config.lora_unet
    assert (group.lr, group.rank, group.alpha, group.layers) == (0.0006, 4, 2, [r"re:.*\.attn.?$", r"re:.*\.ff$"]) and config.lora_text_encoder is None
    assert config.train.optimizer["_target_"] == "torch.optim.AdamW" and config.train.scheduler.name == "constant_with_warmup"
    assert [spec["_target_"] for spec in config.logger] == [f"hcpdiff.loggers.{name}Logger" for name in ("Console", "File", "TensorBoard")]
    assert config.data["dataset1"].cache_latents == "memory"
    assert with_base(tmp_path, "cfgs/train/examples/lora_conventional.yaml", "unet_lr=0.0002").config.lora_unet[0].lr == 0.0002


def test_the_guides_yaml_blocks_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_data").mkdir()
    more = """
lora_unet:
  -
    lr: ${unet_lr}
    rank: 16 # lora的维度
    alpha: 2 # lora的比例系数
    layers:
      # k,v层和ff层 (使用正则表达式指定层的名称)
      - 're:.*\\.to_k$'
      - 're:.*\\.to_v$'
      - 're:.*\\.ff$'

lora_text_encoder: # 添加lora到text encoder
  - lr: 2e-5
    rank: 2
    dropout: 0.1
    layers:
      - 're:.*self_attn$' # 注意力层
      - 're:.*mlp$' # mlp层
"""
    text = """
_base_:
  - cfgs/train/examples/lora_conventional.yaml
unet_lr: 0.0006
data:
  dataset1:
    batch_size: 4
    source:
      data_source1:
        img_root: 'train_data/'
        caption_file: 'train_data/'
        word_names:
          pt1: pt-cat1
    bucket:
      target_area: ${hcp.eval:"512*768"}
      num_bucket: 5
"""
    config = load(write(tmp_path, text + more, "cfgs/train/lora1.yaml"), ["unet_lr=0.0002", "train.train_epochs=10"]).config
    assert (config.lora_unet[0].lr, config.lora_unet[0].rank, config.lora_text_encoder[0].lr, config.train.train_epochs) == (0.0002, 16, 2e-5, 10)
    assert config.data["dataset1"].bucket.target_area == 512 * 768 and config.data["dataset1"].source["data_source1"].word_names == {"pt1": "pt-cat1"}


def test_templates_are_lines_with_known_placeholders():
    templates = sorted((CHECKOUT / "cfgs" / "prompt_templates").glob("*.txt"))
    assert len(templates) >= 8
    for path in templates:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert line and set(__import__("re").findall(r"{(.*?)}", line)) <= {"pt1", "pt2", "caption"}


def test_the_generator_writes_and_checks(tmp_path):
    done = command("--folder", str(tmp_path), "--check", module="hcpdiff.tools.config_reference")
    assert done.returncode == 2 and "not current: cfgs/train/train_base.yaml" in done.stderr
    assert command("--folder", str(tmp_path), module="hcpdiff.tools.config_reference").returncode == 0
    assert command("--folder", str(tmp_path), "--check", module="hcpdiff.tools.config_reference").returncode == 0
    assert command("--folder", str(tmp_path / "docs/en/user_guides/config.md"), module="hcpdiff.tools.config_reference").returncode == 2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel made from a copy of the tracked files, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "hcpdiff", "cfgs"):
        place = CHECKOUT / name
        copy = __import__("shutil")
        copy.copytree(place, source / name, ignore=copy.ignore_patterns("__pycache__")) if place.is_dir() else (source.mkdir(exist_ok=True), copy.copy(place, source / name))
    for name in ("README.md", "NOTICE"):
        (source / name).write_text("x\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)], cwd=source, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_carries_the_configs_and_nothing_twice(wheel):
    ours = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "cfgs").rglob("*") if path.is_file()}
    carried = {path.relative_to(wheel / "hcpdiff").as_posix() for path in (wheel / "hcpdiff" / "cfgs").rglob("*") if path.is_file()}
    assert carried == ours and (wheel / "hcpdiff/assets/clip_tokenizer/vocab.json").is_file()
    assert not (CHECKOUT / "hcpdiff" / "cfgs").exists()


def test_an_installed_wheel_finds_its_configs_from_an_unrelated_folder(wheel, tmp_path):
    write(tmp_path, USER.format(base="cfgs/train/examples/lora_text_encoder.yaml"))
    code = "import hcpdiff; from hcpdiff.config.load import load; loaded = load('run.yaml'); print(hcpdiff.__file__, [str(f) for f in loaded.files], loaded.config.lora_text_encoder[0].lr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel)}, capture_output=True, text=True)
    assert str(wheel / "hcpdiff" / "cfgs" / "train" / "train_base.yaml") in done.stdout and done.stdout.strip().endswith("2e-05"), done.stdout + done.stderr

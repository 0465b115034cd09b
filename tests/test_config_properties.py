"""Whatever a config or a command line holds, loading it gives a config or a message, never another failure."""

import datetime

import pytest
from config_help import SMALL, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hcpdiff.config.infer_schema import InferConfig
from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.config.shape import fields
from hcpdiff.errors import HCPError

NOW = datetime.datetime(2023, 7, 26)
SETTINGS = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
KEYS = st.sampled_from([*fields(RunConfig), "unet_lr", "lr", "layers", "source", "bucket", "img_root", "_target_", "_base_", "transforms", "text_transforms", "optimizer", "<<", "0", "a.b", "", "é"])
SCALARS = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=6), st.text("${<hcp.eval:time}>'\"\\ 12+*", max_size=16),
                    st.sampled_from(["${seed}", "${data}", "${.lr}", "${..lr}", "${lora_unet.0.lr}", "${hcp.time:%Q%}", "$<hcp.eval:${seed}*2>", "---", "re:(", "run.yaml", "torch.optim.AdamW", "${a.${b}}"]))
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)


def survives(path, overrides=(), schema=RunConfig):
    try:
        loaded = load(path, overrides, schema, now=NOW)
    except HCPError as error:
        assert error.faults and all(isinstance(fault, str) and fault for fault in error.faults)
        return None
    return loaded


@settings(max_examples=120, **SETTINGS)
@given(st.text(alphabet=st.sampled_from("abdtrain:{}[]-#&*!|>'\"%@`,? \n\t<~_0159.$\\"), max_size=40))
def test_random_text_as_a_file(tmp_path, text):
    (tmp_path / "random.yaml").write_text(text, encoding="utf-8")
    survives("random.yaml")


@settings(max_examples=120, **SETTINGS)
@given(st.dictionaries(KEYS, TREES, max_size=5), st.sampled_from([RunConfig, InferConfig]))
def test_random_trees_as_a_file(tmp_path, tree, schema):
    import yaml

    (tmp_path / "random.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    survives("random.yaml", (), schema)
    (tmp_path / "over.yaml").write_text(SMALL + "_base_: random.yaml\n", encoding="utf-8")
    survives("over.yaml", (), RunConfig)


PATHS = st.lists(st.sampled_from(["lora_unet", "0", "1", "lr", "data", "dataset1", "source", "source1", "train", "optimizer", "preview", "prompts", "seed", "word_names", "pt1", "_target_", "x", "neg_prompt"]), min_size=1, max_size=5)


@settings(max_examples=200, **SETTINGS)
@given(st.lists(st.tuples(PATHS, st.one_of(SCALARS.map(str), st.text(max_size=12), st.sampled_from(["[1", "{a: ", "---", "[1, {a: b}]", "{_target_: os.system}"]))), max_size=4))
def test_random_overrides(tmp_path, pairs):
    loaded = survives("run.yaml", [f"{'.'.join(path)}={value}" for path, value in pairs])
    if loaded:
        write(tmp_path, loaded.yaml, "again.yaml")
        again = load("again.yaml", now=NOW + datetime.timedelta(days=1))
        assert again.plain == loaded.plain and again.yaml == loaded.yaml


@settings(max_examples=150, **SETTINGS)
@given(st.text(max_size=30))
def test_any_text_reaches_a_text_key_or_is_an_expression(tmp_path, text):
    loaded = survives("run.yaml", [f"preview.neg_prompt={text}"])
    if loaded and "${" not in text and "$<" not in text and text != "---":
        assert loaded.config.preview.neg_prompt == text


@settings(max_examples=60, **SETTINGS)
@given(st.lists(st.text(max_size=10), max_size=3))
def test_random_arguments(tmp_path, arguments):
    survives("run.yaml", arguments)

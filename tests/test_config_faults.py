"""What is wrong with a config is told at once, all of it, with the nearest key that is right."""

import re
from pathlib import Path

import pytest
from config_help import SMALL, faults, small, write

from hcpdiff.config.load import load
from hcpdiff.config.places import OTHER_NAMES, elsewhere
from hcpdiff.config.schema import RunConfig
from hcpdiff.errors import ConfigError


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_all_faults_come_in_one_message(tmp_path):
    text = SMALL.replace("train_epochs", "train_epoch").replace("pictures}", "nowhere, repeats: 0, caption_fle: x}")
    found = faults(tmp_path, "seed=abc", "lora_unet.5.rank=1", "train.noise_offset=${nothing}", "model.vae=./gone", "foo=1", text=text)
    wanted = ("lora_unet has 1 element", "noise_offset = '${nothing}' (command line): names no key", "train.train_epoch (run.yaml:6) is not a known key. Nearest: train_epochs",
              "seed = 'abc' (command line) is not allowed; a whole number is expected", "img_root = 'nowhere' (run.yaml:11) does not exist", "repeats = 0 (run.yaml:11) must be at least 1",
              "caption_fle (run.yaml:11) is not a known key. Nearest: caption_file", "model.vae = './gone'", "foo (command line)")
    for part in wanted:
        assert sum(part in fault for fault in found) == 1, (part, found)
    assert len(found) == len(wanted)


@pytest.mark.parametrize("override, says", [
    ("train.save_step=2.5", "a whole number or null is expected"), ("train.save_step='5'", "is text, being in quotes"), ("train.save_step=", "a whole number"),
    ("mixed_precision=fp61", "Nearest: fp16"), ("lora_unet=5", "a list or null is expected"), ("preview.prompts=a cat", "a list is expected"), ("preview.prompts=null", "a list is expected ([] is an empty one)"),
    ("model=x", "a map is expected"), ("train.max_grad_norm=0", "must be above 0"), ("train.max_grad_norm=.nan", "a number"), ("lora_unet.0.dropout=1", "must be below 1"),
    ("lora_unet.0.rank=4.5", "must be a whole number, or a share below 1"), ("lora_unet.0.layers=['re:(']", "no regular expression"), ("lora_unet.0.layers=[]", "name at least one"),
    ("lora_unet=null", "nothing to train"), ("data=---", "data is missing"), ("train.train_epochs=null", "how long to train"), ("train.max_timestep=1", ""),
    ("data.dataset1.bucket.sizes=[[512, 512], [64]]", "sizes[1] = [64]"), ("data.dataset1.source.source1.bg_color=[0, 0, 300]", "from 0 to 255"),
    ("train.optimizer={weight_decay: 1}", ""), ("model.noise_scheduler={beta_start: 1}", "needs a _target_"), ("data.dataset1.cache_latents=maybe", "one of memory, disk, none"),
    ("unet_lr=fast", "lora_unet[0].lr = 'fast'"), ("_base_=x.yaml", "cannot be set on the command line"), ("lora_unet.a=1", "is a list"), ("seed.x=1", "is a map; a whole number"), ("unet_lr.x=1", "not a map or list"),
    ("lora_text_encoder.0.lr=1", "has no elements"), ("+seed=1", "no + ~ or -"), ("se ed=1", "is no key"), ("preview.prompts=[a", "is no YAML"), ("train_steps=5", "It is at: train.train_steps"),
    ("train.optimzer={}", "Nearest: optimizer"), ("model.enable_xformers=true", "was removed; use model.attention: xformers"), ("interface=[]", "was removed; use preview"),
    ("seed=99999999999999999999999", "a whole number"), ("seed=-1", "at least 0"), ("exp_dir=", "is empty: name a path"), ("model.vae=", "is empty: name one or write null"),
    ("preview.width=100", "preview.width = 100 (command line) must be a multiple of 8: 96 or 104"), ("preview.height=4", "must be at least 8"), ("preview.width=96", ""),
    ("model.quantize=int4", "one of int8, nf4 or null is expected. Nearest: nf4"), ("model.quantize=INT8", "Nearest: int8"), ("model.quantize=8bit", "Nearest: int8"),
    ("model.quantize=true", "'true' (command line) is not allowed; one of int8, nf4 or null is expected. Nearest: int8"), ("mixed_precision=float16", "Nearest: fp16"),
    ("train.batch_size=2", "is not a known key. It is at: data.<name>.batch_size"), ("train.mixed_precision=fp16", "It is at: mixed_precision"), ("batch_size=2", "It is at: data.<name>.batch_size"),
    ("network_dim=8", "It is at: lora_unet[0].rank"), ("train.network_alpha=8", "It is at: lora_unet[0].alpha"), ("train.learning_rate=1e-4", "It is at: lora_unet[0].lr"),
    ("train.max_train_steps=8", "It is at: train.train_steps"), ("data.dataset1.resolution=512", "It is at: data.<name>.bucket.target_area"), ("lr=1", "It is at: lora_unet[0].lr, lora_text_encoder[0].lr"),
    ("data.dataset1.source.source1.repeats=2", ""),
])
def test_each_kind_of_fault_says_what_is_expected(tmp_path, override, says):
    found = faults(tmp_path, override)
    assert (says in " ".join(found) and len(found) == 1) if says else found == []


def test_other_trainers_names_lead_to_keys_that_are_there():
    """Each place of the table is one of the schema; none of the names is a key itself, which would be told of first."""
    for name, place in OTHER_NAMES.items():
        leaf = re.split(r"[ :]", place)[0].removesuffix("._target_")
        assert elsewhere(RunConfig, leaf.rsplit(".", 1)[-1]).count(leaf) == 1, (name, place)
        assert elsewhere(RunConfig, name) == f". It is at: {place}"


@pytest.mark.parametrize("text, says", [
    ("seed: 1\nseed: 2\n", "run.yaml:2: the key 'seed' stands here a second time (first in line 1)"), ("train:\n\tx: 1\n", "line 2, column 1. Indent with spaces"),
    ("a: [1\n", "run.yaml:2 is no YAML"), ('a: "C:\\Users"\n', "use single quotes, or / in paths"), ("a: b: c\n", "quotes"), ("a: !!python/object:os.system {}\n", "the tag !!python/object:os.system"),
    ("- 1\n", "a config file is a mapping"), ("a: &a [*a]\n", "contains itself"), ("_base_: 5.5.yaml\n", "is not there"), ("_base_: [{}]\n", "takes the path"),
    ("a: 1\n---\nb: 2\n", "another document"), ("a: {{b}: 1}\n", "cannot be a key"), ("\x01", "is no YAML"), ("a: " + "[" * 60 + "]" * 60, "nested more than"),
])
def test_yaml_faults_name_line_and_column(tmp_path, text, says):
    assert says in faults(tmp_path, text=text)[0]


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "run.yaml").write_bytes("seed: 1 # é".encode("latin-1"))
    with pytest.raises(Exception, match="is not UTF-8"):
        load("run.yaml")


def test_a_tab_in_a_path_is_told_from_a_missing_folder(tmp_path):
    found = faults(tmp_path, text=SMALL.replace("pictures", '"C:\\train"'))
    assert len(found) == 1 and "control character '\\t'" in found[0] and "single quotes" in found[0]


def test_single_quotes_of_cmd_exe_are_recognised(tmp_path):
    assert "cmd.exe" in faults(tmp_path, "exp_dir='exps/mine'")[0]
    assert "cmd.exe" in faults(tmp_path, "model.pretrained_model_name_or_path='some/model'")[0]
    assert "Quotes belong around the whole argument, once: \"key=some words\"" in faults(tmp_path, "exp_dir='a b'")[0]


@pytest.mark.parametrize("key", ["model.pretrained_model_name_or_path", "model.vae"])
def test_a_name_below_a_folder_that_is_here_is_no_hub_id(tmp_path, key):
    (tmp_path / "demo" / "model").mkdir(parents=True)
    says = f"{key} = 'demo/modle' (command line) is no folder or file here, and not looked for on the hub, since there is a folder demo/ here. Nearest: demo/model"
    assert faults(tmp_path, f"{key}=demo/modle") == [says]
    assert faults(tmp_path, f"{key}=demos/modle") == []


@pytest.mark.parametrize("key", ["data.dataset1.source.source1.word_names.pt1", "train.export.metadata.ss_x"])
def test_a_word_that_is_null_is_a_fault_not_the_text_null(tmp_path, key):
    says = f"{key} = null (command line) is no text: write a word, or leave the entry out"
    assert [says in fault for fault in faults(tmp_path, f"{key}=null")] == [True]
    for words in ("{pt1: null}", "{pt1: ~}", "{pt1: }"):
        text = SMALL.replace("pictures}", f"pictures, word_names: {words}}}")
        assert ["word_names.pt1 = " in fault and "(run.yaml:" in fault and "is no text: write a word" in fault for fault in faults(tmp_path, text=text)] == [True], words
    assert not faults(tmp_path, f"{key}=nullify", text=SMALL.replace("pictures}", "pictures, word_names: {pt1: 'null'}}"))


@pytest.mark.parametrize("name, ok", [("some/model", True), ("./model", False), ("/gone/model", False), ("models/sd/v15", False), ("model", False), ("a\\b", False), ("pictures", True), ("models/", False)])
def test_model_names_that_can_only_be_folders_must_exist(tmp_path, name, ok):
    assert (faults(tmp_path, f"model.pretrained_model_name_or_path={name}") == []) is ok


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for folder in ("model", "vae", "images", "masks"):
        (tmp_path / "home" / folder).mkdir(parents=True)
    for file in ("lora.safetensors", "words.txt", "captions.json"):
        (tmp_path / "home" / file).write_text("{caption}", encoding="utf-8")
    source = "data.dataset1.source.source1"
    given = {"model.pretrained_model_name_or_path": "model", "model.vae": "vae", "model.config": "model", "model.init_lora": "lora.safetensors", f"{source}.img_root": "images",
             f"{source}.att_mask": "masks", f"{source}.caption_file": "captions.json", f"{source}.prompt_template": "words.txt", "data.dataset1.cache_dir": "cache", "exp_dir": "runs/one"}
    loaded = small(tmp_path, *(f"{key}=~/{name}" for key, name in given.items()), f"{source}.word_names.pt1=~/model")
    assert loaded.config.data["dataset1"].source["source1"].word_names["pt1"] == "~/model", "a word is no path"
    for key, name in given.items():
        value = loaded.plain
        for part in key.split("."):
            value = value[part]
        assert Path(value) == tmp_path / "home" / name, key
    assert load(write(tmp_path, loaded.yaml, "again.yaml")).plain == loaded.plain
    assert faults(tmp_path, "model.pretrained_model_name_or_path=~/modle")[0].endswith(f"Nearest: {tmp_path / 'home' / 'model'}")
    assert len(faults(tmp_path, "model.pretrained_model_name_or_path=~nobody-of-this-name/model")) == 1


def test_the_cfg_yaml_of_a_run_in_the_home_folder_starts_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "runs" / "one").mkdir(parents=True)
    path = write(tmp_path / "runs" / "one", small(tmp_path, "exp_dir=~/runs/one").yaml, "cfg.yaml")
    assert load(f"runs/one/{path}").config.exp_dir.startswith("exps/")


def test_captions_templates_and_weights_must_be_there(tmp_path):
    source = "data.dataset1.source.source1"
    for key, name in (("caption_file", "pictures/captions.json"), ("prompt_template", "tmpl.txt"), ("att_mask", "masks")):
        found = faults(tmp_path, f"{source}.{key}={name}")
        assert len(found) == 1 and name in found[0]
    assert "lora.safetensors" in faults(tmp_path, "model.init_lora=lora.safetensors")[0]
    assert faults(tmp_path, f"{source}.prompt_template=cfgs/prompt_templates/object.txt", f"{source}.caption_file=pictures") == []
    assert small(tmp_path, f"{source}.prompt_template=prompt_tuning_template/object.txt").config.data["dataset1"].source["source1"].prompt_template.endswith("cfgs/prompt_templates/object.txt")


@pytest.mark.parametrize("value, says", [
    ("${hcp.eval:\"__import__('os').system('x')\"}", "arithmetic only"), ("${hcp.eval:9**9**9}", "too large"), ("${hcp.eval:1/0}", "division by zero"), ("${hcp.eval:(1}", "cannot read"),
    ("${oc.env:HOME}", "is not available"), ("${hcp.tmie:}", ""), ("${hcp.eval:\"${unet_lr", ""), ("${hcp.eval:round(5, -99999999)}", "round takes"),
])
def test_expressions_that_fail_are_named(tmp_path, value, says):
    found = faults(tmp_path, f"exp_dir={value}")
    assert says in found[0] if says else found == [], "text that names no resolver is literal on the command line"
    in_file = faults(tmp_path, more=f"exp_dir: '{value}'\n".replace("'os'", '"os"').replace("'x'", '"x"'))
    assert len(in_file) == 1 and "exp_dir" in in_file[0]


def test_circles_of_interpolations_are_told_once(tmp_path):
    found = faults(tmp_path, more="a: ${b}\nb: ${a}\nseed: ${a}\n")
    assert len(found) == 1 and "circle" in found[0]
    assert "circle" in faults(tmp_path, more="seed: ${seed}\n")[0]
    assert "circle" in faults(tmp_path, more="preview: {every: '${preview}'}\n")[0]


def test_growth_by_interpolation_is_bounded(tmp_path):
    more = "a0: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    for level in range(8):
        more += f"a{level + 1}: [{', '.join([f'${{a{level}}}'] * 10)}]\n".replace("${", "'${").replace("}", "}'")
    more += "preview: {prompts: '${a8}'}\n"
    assert "grows beyond" in " ".join(faults(tmp_path, more=more))


@pytest.mark.parametrize("target, says", [("os.system", "--allow-target os"), ("builtins.eval", "not among those allowed"), ("AdamW", "package.module.Class"), ("torch..x", "package.module.Class"), ("torchx.A", "not among")])
def test_targets_of_foreign_packages_are_refused_without_importing_them(tmp_path, target, says):
    assert says in faults(tmp_path, f"train.optimizer._target_={target}")[0]


def test_allow_target_adds_a_package_and_nested_targets_are_looked_at(tmp_path):
    assert small(tmp_path, "train.optimizer._target_=mine.Adam", allow=["mine"]).config.train.optimizer["_target_"] == "mine.Adam"
    found = faults(tmp_path, "train.optimizer.a={b: [{_target_: os.system}], trust_remote_code: true}")
    assert len(found) == 2 and "train.optimizer.a.b[0]._target_ = 'os.system'" in found[0] and "trust_remote_code is refused" in found[1]


OLD = """
train: {optimizer: {_target_: torch.optim.AdamW, _partial_: true}}
logger:
  - {_target_: hcpdiff.loggers.CLILogger, _partial_: True, out_path: train.log, log_step: 20}
  - {_target_: hcpdiff.loggers.TBLogger, _partial_: True, out_path: tblog/, log_step: 10}
data:
  dataset1:
    _target_: hcpdiff.data.TextImagePairDataset
    _partial_: true
    source:
      source1:
        _target_: hcpdiff.data.source.Text2ImageAttMapSource
        repeat: 3
        image_transforms: {_target_: torchvision.transforms.Compose, transforms: [{_target_: torchvision.transforms.ToTensor}, {_target_: torchvision.transforms.Normalize, mean: [0.5], std: [0.5]}]}
        text_transforms:
          _target_: torchvision.transforms.Compose
          transforms:
            - {_target_: hcpdiff.utils.caption_tools.TagShuffle}
            - {_target_: hcpdiff.utils.caption_tools.TagDropout, p: 0.2}
            - {_target_: hcpdiff.utils.caption_tools.TemplateFill, word_names: {pt1: cat1, class: cat}}
    bucket: {_target_: hcpdiff.data.bucket.RatioBucket.from_files, num_bucket: 5}
"""


def test_configs_of_the_ancestor_mean_what_they_meant(tmp_path):
    write(tmp_path, OLD, "old.yaml")
    loaded = small(tmp_path, more="_base_: old.yaml\n")
    source = loaded.config.data["dataset1"].source["source1"]
    assert (source.repeats, source.tag_shuffle, source.tag_dropout, source.word_names) == (3, True, 0.2, {"pt1": "cat1", "class": "cat"})
    assert loaded.config.data["dataset1"].bucket.num_bucket == 5 and loaded.config.train.optimizer == {"_target_": "torch.optim.AdamW"}
    assert [spec["_target_"].rsplit(".")[-1] for spec in loaded.config.logger] == ["ConsoleLogger", "FileLogger", "TensorBoardLogger"]
    assert sum("is called" in notice for notice in loaded.notices) == 2


def test_unknown_transforms_and_targets_of_the_ancestor_are_faults(tmp_path):
    found = faults(tmp_path, "data.dataset1._target_=hcpdiff.data.Other", "data.dataset1.source.source1.text_transforms={_target_: a.b.Strange}")
    assert len(found) == 2 and "leave it out" in found[0] and "was removed; use tag_shuffle" in found[1]


def test_a_bad_value_behind_an_expression_names_where_it_was_written(tmp_path):
    (fault,) = faults(tmp_path, "unet_lr=abc")
    assert "lora_unet[0].lr = 'abc' (run.yaml:4, through ${unet_lr} of command line)" in fault
    (fault,) = faults(tmp_path, text=SMALL.replace("0.0006", "0,0006"))
    assert "(run.yaml:4, through ${unet_lr} of run.yaml:2)" in fault


def test_a_config_of_the_other_command_is_one_fault(tmp_path, monkeypatch):
    from hcpdiff.config.infer_schema import InferConfig

    monkeypatch.chdir(tmp_path)
    for text, schema, command in (("prompt: a\nlora_path: x\nbs: 2\n", None, "hcpdiff.visualizer"), (SMALL, InferConfig, "hcpdiff.train_ac_single")):
        write(tmp_path, text)
        with pytest.raises(ConfigError, match=command) as caught:
            load("run.yaml", ["sed=1"], schema)
        assert len(caught.value.faults) == 1


@pytest.mark.parametrize("base, near", [("cfgs/train/exmples/lora_conventional.yaml", "cfgs/train/examples/lora_conventional.yaml"), ("lora_conventional.yaml", "cfgs/train/examples/lora_conventional.yaml"),
                                        ("my_bsae.yaml", "my_base.yaml"), ("my_base", "my_base.yaml"), ("cfgs/train/train_base.yml", "cfgs/train/train_base.yaml")])
def test_the_nearest_base_is_named_as_it_would_be_found(tmp_path, monkeypatch, base, near):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_base.yaml").touch()
    assert f"Nearest: {near}" in faults(tmp_path, more=f"_base_: [{base}]\n")[0]


def test_faults_of_data_and_model_come_with_those_of_the_config(tmp_path, monkeypatch):
    from hcpdiff.train_ac import quick_checks

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model").mkdir()
    (tmp_path / "captions.json").write_text("{", encoding="utf-8")
    more = "sed: 1\n"
    found = faults(tmp_path, "train.train_epoch=1", "model.pretrained_model_name_or_path=model", "data.dataset1.source.source1.caption_file=captions.json", more=more, also=quick_checks)
    assert [word for word in ("train_epoch ", "sed", "captions.json", "model_index.json") if not any(word in fault for fault in found)] == [] and len(found) == 4
    found = faults(tmp_path, "data.dataset1.batch_size=x", "data.dataset1.source.source1.caption_file=captions.json", more=more, also=quick_checks)
    assert len(found) == 3 and "HF_HUB_OFFLINE" in found[-1]  # a data set with a fault of its own is not looked into


def test_keys_of_a_base_that_nothing_reads_are_not_in_cfg_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "my_word: 5\n", "base.yaml")
    loaded = load(write(tmp_path, SMALL + "_base_: [base.yaml]\n"))
    assert "my_word" in loaded.notices[0] and "my_word" not in loaded.yaml
    assert load(write(tmp_path, loaded.yaml, "again.yaml")).plain == loaded.plain

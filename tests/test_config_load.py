"""What a config file and the command line come to."""

import datetime
from pathlib import Path

import pytest
from config_help import SMALL, faults, small, write

from hcpdiff.config import tree
from hcpdiff.config.infer_schema import InferConfig
from hcpdiff.config.load import load
from hcpdiff.errors import ConfigError

NOW = datetime.datetime(2023, 7, 26, 1, 5, 35)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_override_of_a_read_key_reaches_its_reader(tmp_path):
    assert small(tmp_path).config.lora_unet[0].lr == 0.0006
    assert small(tmp_path, "unet_lr=2e-4").config.lora_unet[0].lr == 2e-4


@pytest.mark.parametrize("argument", ["lora_unet.0.rank=8", "lora_unet[0].rank=8"])
def test_list_elements_take_overrides(tmp_path, argument):
    group = small(tmp_path, argument).config.lora_unet[0]
    assert group.rank == 8 and group.layers == ["re:.*attn.?$"]


def test_element_overrides_come_after_the_list_itself(tmp_path):
    loaded = small(tmp_path, "lora_unet.1.rank=8", "lora_unet=[{lr: 1, layers: [a]}, {lr: 2, layers: [b]}]")
    assert [(group.lr, group.rank) for group in loaded.config.lora_unet] == [(1, 4), (2, 8)]


@pytest.mark.parametrize("text", ["{cat:1.2}, dog", "a: b", "a #b", "${5}", "no", "12:30", "[x]]", "'quoted'", "-x", "${unknown}", "${foo:bar}", "$<5 toys", "a\\b", "7", "true", "{", ""])
def test_text_keys_take_the_command_line_literally(tmp_path, text):
    assert small(tmp_path, f"preview.neg_prompt={text}").config.preview.neg_prompt == text
    again = load(write(tmp_path, small(tmp_path, f"preview.neg_prompt={text}").yaml, "again.yaml"))
    assert again.config.preview.neg_prompt == text


@pytest.mark.parametrize("text, value", [("${unet_lr}", "0.0006"), ("\\${unet_lr}", "${unet_lr}"), ("x$<hcp.eval:1+1>", "x2"), ("${seed}", "42"), ("${lora_unet.0.lr}", "0.0006"), ("${lora_unet[0].lr}", "0.0006"), ("${exp_dir.x}", "${exp_dir.x}"), ("${logger.0._target_}", "hcpdiff.loggers.ConsoleLogger"), ("${hcp.time:%Y}", "2023")])
def test_text_keys_take_expressions_that_name_something(tmp_path, text, value):
    assert small(tmp_path, f"preview.neg_prompt={text}", now=NOW).config.preview.neg_prompt == value


def test_null_is_null_only_where_it_is_allowed(tmp_path):
    loaded = small(tmp_path, "model.revision=null", "preview.neg_prompt=null")
    assert loaded.config.model.revision is None and loaded.config.preview.neg_prompt == "null"


def test_words_stay_words_and_numbers_numbers(tmp_path):
    more = "preview: {prompts: [no, on, 12:30, 007, 1e3, true], neg_prompt: off}\n"
    preview = small(tmp_path, more=more).config.preview
    assert preview.prompts == ["no", "on", "12:30", "007", "1e3", "true"] and preview.neg_prompt == "off"
    loaded = small(tmp_path, "unet_lr=2e-5", "train.optimizer.eps=1e-7", "train.optimizer.note=no", "train.optimizer.betas=[0.9, 0.99]")
    optimizer = {"_target_": "torch.optim.AdamW", "weight_decay": 0.01, "eps": 1e-7, "note": "no", "betas": [0.9, 0.99]}
    assert loaded.config.lora_unet[0].lr == 2e-5
    assert loaded.config.train.optimizer == optimizer


def test_keys_of_several_kinds_take_each(tmp_path):
    config = small(tmp_path, "data.dataset1.cache_latents=true", "train.workers=2", "train.cpu_threads=auto").config
    assert (config.data["dataset1"].cache_latents, config.train.workers, config.train.cpu_threads) == (True, 2, "auto")
    assert small(tmp_path, "data.dataset1.cache_latents=none").config.data["dataset1"].cache_latents == "none"


@pytest.mark.parametrize("word", ["no", "on", "yes", "1", "'true'"])
def test_only_true_and_false_are_booleans(tmp_path, word):
    assert "true or false" in faults(tmp_path, f"train.scale_lr={word}")[0]


def test_bases_merge_left_to_right_then_the_file_then_the_command_line(tmp_path):
    write(tmp_path, "seed: 1\nallow_tf32: false\npreview: {every: 1, seed: 1}\n", "a.yaml")
    write(tmp_path, "seed: 2\npreview: {seed: 2, width: 64}\n", "sub/b.yaml")
    loaded = small(tmp_path, "preview.width=128", more="_base_: [a.yaml, sub/b.yaml]\npreview: {every: 3}\n")
    preview = loaded.config.preview
    assert (loaded.config.seed, loaded.config.allow_tf32, preview.every, preview.seed, preview.width) == (2, False, 3, 2, 128)
    assert loaded.files == [Path("a.yaml"), Path("sub/b.yaml"), Path("run.yaml")]


def test_base_is_one_string_or_a_list_and_is_found_in_three_places(tmp_path):
    write(tmp_path, "seed: 5\n_base_: beside.yaml\n", "sub/a.yaml")
    write(tmp_path, "seed: 6\nallow_tf32: false\n", "sub/beside.yaml")
    loaded = small(tmp_path, more="_base_: sub/a.yaml\n")
    assert loaded.config.seed == 5 and not loaded.config.allow_tf32 and loaded.files[0] == Path("sub/beside.yaml")
    carried = small(tmp_path, more="_base_: cfgs/train/examples/lora_conventional.yaml\n")
    assert carried.config.lora_unet[0].layers == ["re:.*attn.?$"] and carried.files[0].name == "train_base.yaml"


def test_the_working_directory_comes_before_the_files_own(tmp_path):
    write(tmp_path, "_base_: b.yaml\n", "sub/a.yaml")
    write(tmp_path, "seed: 1\n", "b.yaml")
    write(tmp_path, "seed: 2\n", "sub/b.yaml")
    assert small(tmp_path, more="_base_: sub/a.yaml\n").config.seed == 1


def test_circles_and_missing_bases_are_named(tmp_path):
    write(tmp_path, "_base_: [b.yaml, gone.yaml]\n", "a.yaml")
    write(tmp_path, "_base_: a.yaml\n", "b.yaml")
    first, second = faults(tmp_path, text="_base_: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in first and "'gone.yaml' (a.yaml:1) is not there" in second


def test_a_base_that_two_files_share_is_no_circle(tmp_path):
    write(tmp_path, "seed: 1\n", "top.yaml")
    write(tmp_path, "_base_: top.yaml\n", "a.yaml")
    write(tmp_path, "_base_: top.yaml\n", "b.yaml")
    assert small(tmp_path, more="_base_: [a.yaml, b.yaml]\n").config.seed == 1


def test_lists_are_replaced_whole_and_dashes_delete(tmp_path):
    write(tmp_path, "seed: 7\nlogger: [{_target_: hcpdiff.loggers.FileLogger}, {_target_: hcpdiff.loggers.ConsoleLogger}]\npreview: {seed: 9}\n", "a.yaml")
    loaded = small(tmp_path, "train.optimizer.weight_decay=---", more="_base_: a.yaml\nlogger: []\nseed: '---'\npreview: '---'\n")
    assert loaded.config.train.optimizer == {"_target_": "torch.optim.AdamW"}
    assert loaded.config.logger == [] and loaded.config.seed == 42 and loaded.config.preview.seed == 42


def test_deleting_what_is_not_there_is_a_fault_unless_the_schema_knows_it(tmp_path):
    assert "no such key to delete" in faults(tmp_path, more="sed: '---'\n")[0]
    assert "no data.dataset to delete. Nearest: dataset1" in faults(tmp_path, "data.dataset=---")[0]
    assert faults(tmp_path, "seed=---") == []


def test_later_of_epochs_and_steps_wins(tmp_path):
    loaded = small(tmp_path, "train.train_steps=50")
    assert (loaded.config.train.train_epochs, loaded.config.train.train_steps) == (None, 50)
    assert any("train_steps (command line) replaces train.train_epochs" in notice for notice in loaded.notices)
    write(tmp_path, "train: {train_steps: 9}\n", "a.yaml")
    assert small(tmp_path, more="_base_: a.yaml\n").config.train.train_epochs == 20
    assert load(write(tmp_path, loaded.yaml, "again.yaml")).config.train.train_steps == 50


def test_epochs_and_steps_in_one_layer_are_a_fault(tmp_path):
    assert "two ways" in faults(tmp_path, "train.train_steps=5", "train.train_epochs=3")[0]
    assert "two ways" in faults(tmp_path, text=SMALL.replace("{train_epochs: 20}", "{train_epochs: 20, train_steps: 3}"))[0]
    assert small(tmp_path, "train.train_steps=5", "train.train_epochs=null").config.train.train_steps == 5


def test_set_by_counts_layers(tmp_path):
    write(tmp_path, "seed: 1\n", "a.yaml")
    set_by = small(tmp_path, "allow_tf32=false", more="_base_: a.yaml\n").set_by
    assert [set_by(key) for key in ("exp_dir", "seed", "train.train_epochs", "allow_tf32", "lora_unet[0].lr")] == [-1, 0, 1, 2, 1]


def test_cfg_yaml_gives_the_same_config_again(tmp_path):
    write(tmp_path, "{pt1}, {caption}\n", "sub/template.txt")
    write(tmp_path, "data: {dataset1: {source: {source1: {prompt_template: template.txt, word_names: {pt1: 007, b: '5', c: null x}}}}}\n", "sub/a.yaml")
    loaded = small(tmp_path, "preview.neg_prompt=a: ${5} \\${x}", "preview.prompts=['${unet_lr}', 12:30]", "data.dataset1.bucket.target_area=$<hcp.eval:512*768>",
                   more="_base_: sub/a.yaml\nmine: ${hcp.time:%Y}\nexp_dir: out/${mine}-$<hcp.time:%m>\n", now=NOW)
    assert loaded.config.exp_dir == "out/2023-07" and "hcp.time" not in loaded.yaml and "${unet_lr}" in loaded.yaml and "hcp.eval" in loaded.yaml
    assert {"exp_dir", "mine"} <= loaded.timed
    again = load(write(tmp_path, loaded.yaml, "elsewhere/cfg.yaml"), now="2030-01-01T00:00:00")
    assert again.plain == loaded.plain and again.config == loaded.config and again.yaml == loaded.yaml
    assert again.config.data["dataset1"].source["source1"].prompt_template == "sub/template.txt"
    assert again.config.data["dataset1"].source["source1"].word_names == {"pt1": "007", "b": "5", "c": "null x"}


def test_the_cfg_of_a_run_starts_a_new_folder_unless_it_is_resumed(tmp_path):
    run = write(tmp_path, small(tmp_path, "exp_dir=exps/mine").yaml, "exps/mine/cfg.yaml")
    assert load(run, now=NOW).config.exp_dir == "exps/2023-07-26-01-05-35"
    assert load(run, ["exp_dir=exps/mine"], now=NOW).config.exp_dir == "exps/mine"
    assert load(run, ["train.resume=exps/mine"], now=NOW).config.exp_dir == "exps/mine"


def test_bom_and_chinese_are_read(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + (SMALL + "preview: {neg_prompt: 低质量} # 注释\n").encode())
    (tmp_path / "pictures").mkdir()
    loaded = load("run.yaml")
    assert loaded.config.preview.neg_prompt == "低质量" and "低质量" in loaded.yaml


def test_anchors_and_merge_keys_work(tmp_path):
    more = "x: &x {rank: 8, lr: 1}\nlora_text_encoder: [{<<: *x, layers: [a], lr: 2}]\ny: ${x}\nexp_dir: e${y.rank}\n"
    loaded = small(tmp_path, more=more)
    assert (loaded.config.lora_text_encoder[0].rank, loaded.config.lora_text_encoder[0].lr, loaded.config.exp_dir) == (8, 2, "e8")


def test_free_keys_are_fine_when_something_reads_them(tmp_path):
    assert faults(tmp_path, more="a: {b: [1, 2]}\nseed: ${a.b[1]}\n") == []
    assert "other (run.yaml" in faults(tmp_path, more="other: 1\n")[0] and "nothing reads it" in faults(tmp_path, more="other: 1\n")[0]
    assert "nothing reads it" in faults(tmp_path, "other=1")[0]
    write(tmp_path, "other: 1\n", "a.yaml")
    assert any("other" in notice for notice in small(tmp_path, more="_base_: a.yaml\n").notices)
    assert len(faults(tmp_path, more="a: ${a}\nb: ${a}\n")) == 1, "a key that only an unread key reads is unread"
    assert faults(tmp_path, "lora_unet.0.lr=1") == [], "the reader of unet_lr was replaced"


def test_a_free_key_may_have_the_name_that_another_program_gives_to_one_of_ours(tmp_path):
    (tmp_path / "draw.yaml").write_text("pretrained_model: some/model\nprompt: a cat\nsteps: 30\nW: 640\ninfer_args: {num_inference_steps: '${steps}', width: '${W}'}\n", "utf-8")
    assert load(tmp_path / "draw.yaml", [], InferConfig).config.infer_args == {"num_inference_steps": 30, "width": 640}


def test_interpolated_numbers_of_an_evaluation_keep_their_sign(tmp_path):
    assert small(tmp_path, more="a: -2\nseed: $<hcp.eval:${a}**2>\n").config.seed == 4
    assert "needs numbers" in faults(tmp_path, more="a: cat\nseed: ${hcp.eval:'${a}*2'}\n")[0]


def test_relative_and_indirect_interpolations(tmp_path):
    more = "name: width\nlora_text_encoder: [{lr: 1, rank: 8, alpha: '${.rank}', layers: [a]}]\npreview: {width: 64, height: '${preview.${name}}', every: '${..seed}'}\n"
    config = small(tmp_path, more=more).config
    assert config.lora_text_encoder[0].alpha == 8 and config.preview.height == 64 and config.preview.every == 42


def test_copied_maps_are_checked_where_they_land(tmp_path):
    more = "shape: {target_area: 65536, num_buckt: 3}\n"
    found = faults(tmp_path, "data.dataset1.bucket=${shape}", more=more)
    assert found == ["data.dataset1.bucket.num_buckt (run.yaml:12) is not a known key. Nearest: num_bucket"]


def test_dump_and_parse_agree_on_any_text(tmp_path):
    from hcpdiff.config.read import parse

    node = tree.Map(a=tree.Text("1"), b=tree.Word("1"), c=tree.Text("no"), d=tree.Text("---"), e=tree.Word("null"), f=tree.Text(" x\n#y: "), g=tree.Seq(), h=tree.Map())
    again = parse(tree.dump(node), tree.Origin())
    assert tree.plain(again) == tree.plain(node) and tree.dump(again) == tree.dump(node)


def test_loading_is_the_same_for_a_moment_and_its_text(tmp_path):
    assert small(tmp_path, now=NOW).config.exp_dir == small(tmp_path, now=NOW.isoformat()).config.exp_dir == "exps/2023-07-26-01-05-35"


def test_a_missing_config_file_is_named_with_its_neighbours(tmp_path):
    write(tmp_path)
    with pytest.raises(ConfigError, match="'runn.yaml' is not there.*Nearest: run.yaml"):
        load("runn.yaml")


def test_another_optimizer_takes_nothing_from_the_default(tmp_path):
    own = small(tmp_path, "train.optimizer._target_=torch.optim.SGD", "train.optimizer.momentum=0.9").config.train.optimizer
    assert own == {"_target_": "torch.optim.SGD", "momentum": 0.9}
    whole = small(tmp_path, "train.optimizer={_target_: torch.optim.SGD}").config.train.optimizer
    assert whole == {"_target_": "torch.optim.SGD"}

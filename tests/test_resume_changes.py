"""A run that is resumed under other circumstances: what is refused, what is noted, what resume_force does."""

import copy
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from run_help import Stoppable, images, run
from tiny import make_tiny_sd

from hcpdiff.checkpoint import sums
from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.data.caption import Captions
from hcpdiff.data.fingerprint import changes, fingerprint
from hcpdiff.data.source import Source
from hcpdiff.data.template import Prompter
from hcpdiff.errors import CheckpointError, ConfigError, HCPError
from hcpdiff.train import resume_early
from hcpdiff.train.compare import compare
from hcpdiff.train.compare_config import flat, ranks, refusals
from hcpdiff.train.report import versions
from hcpdiff.train.resumed import Resumed
from hcpdiff.train_ac import quick_checks

CONFIG = """
train: {{train_steps: 3, cpu_threads: 1, log_step: 1, save_step: 1, optimizer: {{_target_: torch.optim.SGD}}}}
model: {{pretrained_model_name_or_path: '{model}'}}
lora_unet:
  - {{lr: 1.0, rank: 2, layers: ['re:.*attn2\\.to_k$']}}
data:
  one:
    batch_size: 2
    source: {{a: {{img_root: images, caption_file: images, word_names: {{pt1: thing}}}}}}
    bucket: {{sizes: [[64, 64]]}}
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_sd1):
    """A folder with images, a config and a run of three steps."""
    place = tmp_path_factory.mktemp("changes")
    images(place / "images", 4)
    (place / "cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run("cfg.yaml", "exp_dir=run")
    return place


@pytest.fixture
def place(first, tmp_path, monkeypatch):
    """A copy of it to spoil."""
    shutil.copytree(first, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def resume(*overrides: str, steps: int = 4) -> str:
    """What the log says from the resume on."""
    before = len(open("run/train.log", encoding="utf-8").read())
    return run("cfg.yaml", "train.resume=run", f"train.train_steps={steps}", *overrides)[1][before:]


def refusal(*overrides: str) -> str:
    before = {path: path.read_bytes() for path in __import__("pathlib").Path("run").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        resume(*overrides)
    assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in __import__("pathlib").Path("run").rglob("*") if path.is_file()} == before  # nothing was touched
    return str(caught.value)


def test_images_and_captions_that_changed_are_named_and_refused_in_one_message_with_the_rest(place, tmp_path):
    Image.new("RGB", (64, 64)).save("images/new.png")
    (place / "images" / "0.png").unlink()
    with open("images/1.png", "ab") as file:  # other bytes, the same picture: nobody can tell without decoding
        file.write(b"x")
    (place / "images" / "2.txt").write_text("another caption", encoding="utf-8")
    other = make_tiny_sd(tmp_path / "other", seed=1)
    message = refusal(f"model.pretrained_model_name_or_path={other}", "seed=7", "data.one.batch_size=1", "train.gradient_accumulation_steps=2", "lora_unet.0.alpha=1", "model.clip_skip=1")
    for line in ("data.one.source.a: 1 images are new: new.png", "data.one.source.a: 1 images are gone: 0.png", "data.one.source.a: 1 images have other content: 1.png",
                 "data.one.source.a: 1 images have another caption: 2.png", "the unet has other weights", "the text encoder has other weights",
                 "the vae has other weights", "seed: 42 before, 7 now", "data.one.batch_size: 2 before, 1 now", "alpha of 16 LoRA layers", "2 before, 1 now", "model.clip_skip: 0 before, 1 now",
                 "processes x accumulation: 1 x 1 before, 1 x 2 now; train.gradient_accumulation_steps=1 keeps the images per step", "train.resume_force=true", "model.init_lora=run/ckpts"):
        assert line in message, line
    log = resume(f"model.pretrained_model_name_or_path={other}", "seed=7", "data.one.batch_size=1", "lora_unet.0.alpha=1", "train.resume_force=true")
    assert log.count("warning: train.resume_force: this is another run than the one that was saved:") == 10 and "step 4/4" in log


def test_a_wrong_config_is_told_before_a_length_that_is_done(place):
    with pytest.raises(CheckpointError, match="seed: 42 before, 7 now"):
        resume("seed=7", steps=2)
    with pytest.raises(ConfigError, match="has done 3 of 2 steps"):
        resume(steps=2)


def test_layers_ranks_and_optimizers_of_others_cannot_be_forced(place):
    message = refusal("train.resume_force=true", "lora_unet.0.rank=4", "train.optimizer._target_=torch.optim.AdamW", "lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*self_attn$']}]")
    for line in ("not even with train.resume_force", "16 LoRA layers have another rank in lora_unet", "12 LoRA layers are new in lora_text_encoder", "train.optimizer._target_: 'torch.optim.SGD' before"):
        assert line in message, line


def test_another_schedule_or_prediction_of_the_same_weights_is_another_run(place, tmp_path, tiny_sd1):
    other = shutil.copytree(tiny_sd1, tmp_path / "other")
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"epsilon"', '"v_prediction"').replace("0.012", "0.02"), encoding="utf-8")
    message = refusal(f"model.pretrained_model_name_or_path={other}")
    assert "what the base model predicts: epsilon before, v_prediction now" in message and "the noise schedule (digest): " in message and "weights\n" not in message


def test_what_makes_no_other_run_is_noted(place):
    shutil.move("images", "moved")
    log = resume("data.one.source.a.img_root=moved", "data.one.source.a.caption_file=moved", "lora_unet.0.lr=0.5", "train.workers=0", "data.one.cache_latents=disk")
    notes = [line.split("note: ")[1] for line in log.splitlines() if "changed since the state was saved" in line]
    keys = {line.split(": ")[1] for line in notes}
    assert keys == {"data.one.source.a.img_root", "data.one.source.a.caption_file", "lora_unet.0.lr", "train.train_steps", "train.workers", "data.one.cache_latents"}
    assert "changed since the state was saved: lora_unet.0.lr: 1.0 before, 0.5 now" in notes and "warning" not in log


def test_an_older_state_is_gone_on_from_and_what_is_newer_is_set_aside(place):
    newer = (place / "run" / "ckpts" / "unet-3.safetensors").read_bytes()
    log = run("cfg.yaml", "train.resume=run/states/2", "lora_unet.0.lr=0.5")[1]
    assert "note: 2 files and states of later steps than 2 were moved to run/newer-than-2, such as states/3" in log and "run resumed after step 2" in log
    assert (place / "run" / "newer-than-2" / "ckpts" / "unet-3.safetensors").read_bytes() == newer != (place / "run" / "ckpts" / "unet-3.safetensors").read_bytes()


def test_a_damaged_state_and_a_changed_weight_file_are_told(place):
    path = place / "run" / "states" / "3" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (place / "run" / "ckpts" / "unet-2.safetensors").write_bytes(b"other")
    (place / "run" / "ckpts" / ".unet-4.safetensors.77.0123abcd.tmp").write_bytes(b"half")
    log = resume()
    assert "warning: run/states/3/state.safetensors is damaged: its checksum is not the one in SHA256SUMS. The run goes on from the state before: run/states/2" in log
    assert "warning: run/states/2/../../ckpts/unet-2.safetensors is not" not in log and "warning: run/ckpts/unet-2.safetensors is not what was saved with run/states/2" in log
    assert "note: 1 unfinished files of a save that was cut off were removed" in log and "run/newer-than-2" in log


def test_a_forced_run_finds_a_place_in_data_sets_that_came(place):
    more = "data.two={batch_size: 1, source: {b: {img_root: images}}, bucket: {sizes: [[64, 64]]}}"
    assert "data.two is new" in refusal(more)
    assert "data.two is new" in resume(more, "train.resume_force=true")
    assert "data.two is gone" in refusal("train.train_steps=5")


def described(config: dict, **extra) -> dict:
    return {"marks": {"unet": "a"}, "data": {}, "world": 2, "accumulation": 3, "alphas": {}, "versions": {"torch": "2.13", "numpy": "2"}, "device": "cpu", "config": config, **extra}


def test_a_folder_that_is_no_run_is_told_so_and_left_as_it_is(place):
    (place / "images" / "states" / "3").mkdir(parents=True)
    before = sorted(place.rglob("*"))
    for name in ("images", "images/states/3"):
        with pytest.raises(ConfigError, match="train.resume = 'images' holds no training state"):
            run("cfg.yaml", f"train.resume={name}")
    assert sorted(place.rglob("*")) == before


def test_versions_are_those_of_all_that_draws_decodes_and_learns():
    assert {"hcpdiff", "python", "torch", "diffusers", "transformers", "safetensors", "numpy", "pillow"} <= versions("torch.optim.AdamW").keys()
    assert versions("schedulefree.AdamWScheduleFree")["schedulefree"] and "torch.optim" not in versions("torch.optim.AdamW") and versions("no_such_package.X").keys() == versions().keys()


def test_processes_and_accumulation_count_by_their_product():
    before = described({})
    assert compare(before, described({}, world=3, accumulation=2)).notes == ["processes x accumulation: 2 x 3 before, 3 x 2 now; the images per step are the same"]
    assert compare(before, described({}, world=1)).refused == ["processes x accumulation: 2 x 3 before, 1 x 3 now; train.gradient_accumulation_steps=6 keeps the images per step"]
    assert compare(before, described({}, world=4)).refused == ["processes x accumulation: 2 x 3 before, 4 x 3 now"]


def test_versions_and_device_are_noted():
    found = compare(described({}), described({}, versions={"torch": "2.14", "numpy": "2"}, device="cuda"))
    assert found.notes == ["versions.torch: '2.13' before, '2.14' now", "device: 'cpu' before, 'cuda' now"] and not found.refused


def test_every_key_of_the_config_is_noted_refused_or_of_no_matter(place):
    """Each leaf of a real config is changed alone: exactly one line comes, of the kind that the documentation's table says."""
    config = load("cfg.yaml", [], RunConfig).plain
    kinds = {}
    for key in flat(config):
        changed = copy.deepcopy(config)
        *parents, last = key.split(".")
        node = changed
        for name in parents:
            node = node[int(name)] if isinstance(node, list) else node[name]
        node[last] = ["changed"]
        found = compare(described(config), described(changed))
        lines = {"impossible": found.impossible, "refused": found.refused, "noted": found.notes}
        said = {kind: part for kind, part in lines.items() if part}
        assert sum(map(len, said.values())) <= 1, key
        kinds.setdefault(next(iter(said), "silent"), set()).add(key)
    assert kinds["silent"] == {"exp_dir", "train.resume", "train.resume_force", "train.gradient_accumulation_steps"} and kinds["impossible"] == {"train.optimizer._target_"}
    source = "data.one.source.a."
    bucket = "data.one.bucket."
    assert kinds["refused"] == {
        "seed", "model.tokenizer_repeats", "model.clip_skip", "model.prediction_type", "model.noise_scheduler", "model.quantize", "data.one.batch_size",
        *(bucket + key for key in ("target_area", "num_bucket", "step_size", "sizes", "no_upscale", "crop", "crop_variants")),
        *(source + key for key in ("word_names.pt1", "repeats", "tag_shuffle", "keep_tokens", "tag_dropout", "caption_dropout", "prompt_dropout", "flip", "bg_color"))}


def test_images_that_are_edited_in_the_middle_of_large_files_are_seen(tmp_path):
    from data_help import build, dataset, folder_of, source

    root = folder_of(tmp_path / "images", {"a.png": (64, 64), "b/猫.png": (64, 64)})
    before = fingerprint(build(dataset(source(root))).datasets)
    noise = Image.effect_noise((400, 400), 90)
    noise.save(root / "a.png", compress_level=0)
    first = fingerprint(build(dataset(source(root))).datasets)
    assert changes(before, first) == ["data.d0.source.s0: 1 images have other content: a.png"]
    noise.putpixel((200, 200), 255 - noise.getpixel((200, 200)))
    size = (root / "a.png").stat().st_size
    noise.save(root / "a.png", compress_level=0)
    assert (root / "a.png").stat().st_size == size  # uncompressed: only the checksum at the end of the stream tells
    assert changes(first, fingerprint(build(dataset(source(root))).datasets)) == ["data.d0.source.s0: 1 images have other content: a.png"]
    assert changes(first, first) == [] and all(tensor.dtype == torch.uint8 for tensor in (first["d0"]["s0"]["names"], first["d0"]["s0"]["images"]))


def source_of(root, names: list[str], captions: list[str | None]):
    """An image folder, as the index has it; the files are no images, and are not looked into for that."""
    return Source("s", str(root), names, np.zeros((len(names), 2), np.int32), Captions(captions, "text"), Prompter(("a {caption}",), {}, False, 0, 0.0, 0.0, 0.0), None, 1, False, (0, 0, 0))


def marks_of(source) -> dict:
    return fingerprint([SimpleNamespace(name="d", sources=[source])])["d"]["s"]


def test_marks_of_images_are_those_that_older_states_hold(tmp_path):
    """Of each part its length in 8 bytes and itself; of a file longer than 16 KiB its length and 4 samples."""
    draws, sizes = random.Random(3), [0, 1, 4096, 16384, 16385, 20001, 300_007]
    names = [f"{size}.png" for size in sizes] + ["gone.png"]
    contents = [draws.randbytes(size) for size in sizes] + [b""]
    for name, content in zip(names[:-1], contents):
        (tmp_path / name).write_bytes(content)

    def mark(part: bytes) -> bytes:
        return hashlib.blake2b(len(part).to_bytes(8, "little") + part, digest_size=8).digest()

    def sampled(content: bytes) -> bytes:
        last = len(content) - 4096
        return content if len(content) <= 16384 else len(content).to_bytes(8, "little") + b"".join(content[last * n // 3:][:4096] for n in range(4))

    captions = [None, "", *"abcdef"]
    found = marks_of(source_of(tmp_path, names * 30, captions * 30))  # more than a thread is given at a time
    assert found["images"].numpy().tobytes() == b"".join(mark(sampled(content)) for content in contents) * 30
    assert found["captions"].numpy().tobytes() == b"".join(mark(b"none" if text is None else b"text" + text.encode()) for text in captions) * 30


def test_marks_need_few_bytes_of_memory_an_image(tmp_path):
    """Not what waits for a thread, of all images at once."""
    count = 1500
    (tmp_path / "a.png").write_bytes(bytes(20_000))
    source = source_of(tmp_path, ["a.png"] * count, ["a caption"] * count)
    tracemalloc.start()
    try:
        marks_of(source)
        assert tracemalloc.get_traced_memory()[1] / count < 400
    finally:
        tracemalloc.stop()


# ---- told before torch is read ------------------------------------------------------------------------------------------------------------------------


def early(*overrides: str) -> tuple[str, str]:
    """(what the command says, 'exit code, whether torch was read')."""
    code = ("import sys\nfrom hcpdiff import cli, train_ac_single as command\n"
            "try:\n    cli.run(command.main, command.parser, sys.argv[1:])\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, "--cfg", "cfg.yaml", "train.resume=run", *overrides], capture_output=True, text=True, encoding="utf-8", timeout=300)
    return done.stderr, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("overrides, told", [
    (["train.train_steps=4", "model.quantize=int8", "data.one.batch_size=1"], ["model.quantize: null before, 'int8' now", "data.one.batch_size: 2 before, 1 now", "Base model and data have not been compared yet.", "train.resume_force=true"]),
    (["train.train_steps=4", "lora_unet.0.rank=3", "data.one.bucket.num_bucket=1"], ["lora_unet.0.rank: 2 before, 3 now", "data.one.bucket.num_bucket: 4 before, 1 now", "Set it back."]),
    (["train.train_steps=4", "train.gradient_accumulation_steps=3", "train.train_steps=2"], ["processes x accumulation: 1 x 1 before, 1 x 3 now"]),
    (["train.train_steps=4", "train.optimizer._target_=torch.optim.AdamW", "train.resume_force=true"], ["not even with train.resume_force", "'torch.optim.SGD' before"]),
    ([], ["train.resume: run has done 3 of 3 steps. Raise train.train_epochs or train.train_steps to go on."]),
    (["train.resume=run/states/2", "train.train_steps=1"], ["run has done 2 of 1 steps"])])
def test_another_config_and_a_length_that_is_done_are_told_before_torch_is_read(place, overrides, told):
    message, end = early(*overrides)
    assert end == "2 False" and message.count("error:") == 1 and "train.resume" in message, message
    assert all(line in message for line in told), message


@pytest.mark.parametrize("layers, told", [("['re:.*attn1\\.to_q$']", 0), (None, 1)])
def test_a_rank_is_judged_by_the_configs_alone_where_its_layers_are_as_they_were(layers, told):
    saved = {"lora_unet": [{"lr": 1, "rank": 2, "layers": ["re:.*attn2\\.to_k$"]}]}
    now = {"lora_unet": [{"lr": 1, "rank": 4, "layers": ["re:.*attn1\\.to_q$"] if layers else saved["lora_unet"][0]["layers"]}]}
    assert len(ranks(saved, now)) == told and ranks(saved, saved) == [] and ranks({"lora_unet": None}, now) == []


def test_no_way_is_named_that_leads_nowhere_and_latest_says_which_run_it_is(tmp_path):
    """A LoRA of one rank cannot start a run of another."""
    [rank] = refusals("latest", tmp_path / "a", ["lora_unet.0.rank: 2 before, 3 now"], [])
    [other] = refusals("run", tmp_path / "a", [], ["seed: 1 before, 2 now"])
    assert "init_lora" not in rank and f"(the newest run, {tmp_path / 'a'})" in rank
    assert f"model.init_lora={tmp_path / 'a'}/ckpts/..." in other and "newest" not in other


def test_a_run_that_has_done_its_epochs_is_told_so_before_torch_is_read(first, tmp_path, monkeypatch):
    (tmp_path / "cfg.yaml").write_text((first / "cfg.yaml").read_text(encoding="utf-8").replace("train_steps: 3", "train_epochs: 2"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(first / "images", "images")
    run("cfg.yaml", "exp_dir=run")
    message, end = early()
    assert end == "2 False" and "run has done 4 of 4 steps" in message, message
    with pytest.raises(ConfigError, match="has done 4 of 4 steps"):  # as it is told without that
        run("cfg.yaml", "train.resume=run")


@pytest.mark.parametrize("overrides, words", [
    (["sed=1"], ["sed (command line)"]), (["sed=1", "seed=7"], ["sed (command line)", "seed: 42 before, 7 now"]),
    (["seed=x", "model.clip_skip=1", "data.one.source.a.flip=true"], ["seed = 'x'", "model.clip_skip: 0 before, 1 now\n  data.one.source.a.flip: false before, true now\n"]),
    (["data.one.batch_sizes=1", "data.one.bucket.crop=random"], ["data.one.batch_sizes", "data.one.bucket.crop: 'center' before, 'random' now\n"]),
    (["sed=1", "train.train_steps=3"], ["sed (command line)", "has done 3 of 3 steps"]),
    (["lora_unet.0.rank=0", "train.gradient_accumulation_steps=2"], ["lora_unet[0].rank", "1 x 1 before, 1 x 2 now"]),
    (["train.trian_steps=5", "train.resume=images"], ["train.trian_steps", "holds no training state"])])
def test_a_configs_own_faults_come_with_those_of_its_resume(place, overrides, words):
    with pytest.raises(ConfigError) as caught:
        load("cfg.yaml", ["train.resume=run", "train.train_steps=4", *overrides], RunConfig, also=quick_checks)
    assert len(caught.value.faults) == len(words) and all(word in fault for word, fault in zip(words, caught.value.faults)), caught.value.faults


def test_a_damaged_newest_state_keeps_no_run_from_going_on(place):
    path = place / "run" / "states" / "3" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    loaded = load("cfg.yaml", ["train.resume=run"], RunConfig)
    resume_early.check(loaded.config.train, loaded.plain, place / "run", None, 1)
    (place / "run" / "states" / "3" / "state.json").write_text("{", encoding="utf-8")
    resume_early.check(loaded.config.train, loaded.plain, place / "run", None, 1)
    with pytest.raises(CheckpointError, match="has done 2 of 2 steps"):
        resume_early.check(replace(loaded.config.train, train_steps=2), loaded.plain, place / "run", 2, 1)


def spoil(place, step: int, change) -> None:
    """As another program may have written it: the checksums hold."""
    folder = place / "run" / "states" / str(step)
    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    change(record)
    (folder / "state.json").write_text(json.dumps(record), encoding="utf-8")
    sums.write_sums(folder, {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("state.json", "state.safetensors")})


@pytest.mark.parametrize("override", ["train.train_steps=3", "seed=7"])
def test_a_state_of_another_format_is_told_to_be_one_whatever_else_it_says(place, override):
    spoil(place, 3, lambda record: record.update(format=1))
    loaded = load("cfg.yaml", ["train.resume=run", override], RunConfig)
    resume_early.check(loaded.config.train, loaded.plain, place / "run", None, 1)
    with pytest.raises(ConfigError, match="states.3 has format 1, this version reads 2: resume with the version that wrote it"):
        run("cfg.yaml", "train.resume=run", override)


@pytest.mark.parametrize("change", [
    ("step", 3.5), ("step", 2), ("positions", {"one": 3}), ("positions", []), ("positions", [[1, "2"]]), ("positions", [[1, 0], [1, 0]]), ("positions", ...), ("run", []),
    ("run.world", "1"), ("run.accumulation", None), ("run.marks", ["a"]), ("run.data.one", 3), ("weights", ...), ("optimizer.param_groups", [{}])])
def test_a_state_of_another_form_is_refused_with_its_file_and_what_is_odd(place, change):
    spoil(place, 3, lambda record: put(record, ("tree", *change[0].split(".")), change[1]))
    loaded = load("cfg.yaml", ["train.resume=run", "train.train_steps=4"], RunConfig)
    resume_early.check(loaded.config.train, loaded.plain, place / "run", None, 1)
    with pytest.raises(HCPError, match=f"run/states/3/state.json is no .*state of.* {change[0]}"):
        run("cfg.yaml", "train.resume=run", "train.train_steps=4")


def put(record, path: tuple, value) -> None:
    """`value` in this place; the ellipsis: nothing."""
    for key in path[:-1]:
        record = record[key]
    if value is ...:
        del record[path[-1]]
    else:
        record[path[-1]] = value


def places_in(value, path: tuple = ()) -> list[tuple]:
    """Paths of all that is in a value; of many alike, of two."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    items = items[:2] if isinstance(value, list) or path[-1:] == ("alphas",) or path[-2:-1] == ("adapters",) else items
    return [place for key, item in items for place in ((*path, key), *places_in(item, (*path, key)))]


def test_whatever_a_state_holds_there_is_no_traceback(place):
    """Each place of a state with a value of another kind, a sample of all: it is a user's fault, or the run goes on."""
    run("cfg.yaml", "exp_dir=adam", "train.optimizer._target_=torch.optim.AdamW")
    shutil.rmtree("run"), shutil.move("adam", "run")
    one = Stoppable("cfg.yaml", ["train.resume=run", "train.train_steps=4", "train.optimizer._target_=torch.optim.AdamW"], None, False)
    for prepare in (one._set_up_machine, one._read_inputs, one._load_model, one._attach_adapters):
        prepare()
    trainer = one._build_trainer()
    file = place / "run" / "states" / "3" / "state.json"
    good, told = file.read_text(encoding="utf-8"), Counter()
    values = [None, [], {}, "x", -1, 1.5, [[1]], True, float("nan"), 10**400, ..., {"__tensor__": "state.run.data.one.a.names"}, {"__tensor__": "none"}, {"__tensor__": []},
              {"__tensor__": "state.optimizer.state.0.step"}, {"__pairs__": 3}, {"__pairs__": [[[1], 2]]}, {"__tuple__": None}]
    cases = [(path, value) for path in places_in(json.loads(good)) for value in values if path[:3] != ("tree", "run", "config") or len(path) < 5]
    for path, value in random.Random(0).sample(cases, 160):
        file.write_text(good, encoding="utf-8")
        spoil(place, 3, lambda record: put(record, path, value))
        one.cfg.train.resume_force = not one.cfg.train.resume_force
        try:
            resume_early.check(one.cfg.train, one.loaded.plain, place / "run", 3, 1)
            one.place.resumed = Resumed("run", place / "run", 3)
            one._compare(), one._go_on(trainer), trainer.optimizer.step()
            told["nothing"] += 1
        except HCPError as error:
            told[str(place / "run") in str(error) or "train.resume" in str(error)] += 1
    one.place.release()
    assert told[True] > 80 and told["nothing"] > 8 and not told[False], told


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"{", b"[" * 10**5, b'{"format": 2}', b'{"format": 2, "tree": []}', b'{"format": 2, "tree": %s}' % (b'{"a":' * 450 + b"1" + b"}" * 450)])
def test_a_state_that_is_something_else_is_refused_with_its_file(place, content):
    folder = place / "run" / "states" / "3"
    (folder / "state.json").write_bytes(content)
    sums.write_sums(folder, {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("state.json", "state.safetensors")})
    loaded = load("cfg.yaml", ["train.resume=run", "train.train_steps=4"], RunConfig)
    resume_early.check(loaded.config.train, loaded.plain, place / "run", None, 1)
    with pytest.raises(CheckpointError, match="run/states/3/state.json is no training state of step 3"):
        Resumed("run", place / "run", None)

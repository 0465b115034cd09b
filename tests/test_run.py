"""Config keys of a training run and what they do, in one process on a tiny model."""

import errno
import math
import multiprocessing
import os
import re
import signal
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hcpdiff import device as machine
from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.errors import ConfigError, FeedError, HCPError, NonFiniteError
from hcpdiff.train.memory import less_memory
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.run import Run
from hcpdiff.train.trainer import Hook, Trainer

CONFIG = """
train: {{train_steps: 2, cpu_threads: 1, log_step: 1, optimizer: {{_target_: torch.optim.SGD}}}}
model: {{pretrained_model_name_or_path: '{model}'}}
lora_unet:
  - {{lr: 1.0, rank: 2, layers: ['re:.*attn2\\.to_k$']}}
data:
  one:
    batch_size: 2
    source: {{a: {{img_root: images, word_names: {{pt1: thing}}}}}}
    bucket: {{target_area: 4096, num_bucket: 1}}
"""


@pytest.fixture
def train(tmp_path, monkeypatch, tiny_sd1):
    """train('key=value', ...) -> (the finished Run, its log, its losses)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.effect_noise((64, 64), 20 * i + 20).save(tmp_path / "images" / f"{i}.png")
    numbers = iter(range(99))

    def go(*overrides: str, model=tiny_sd1):
        (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=model), encoding="utf-8")
        run = Run(load("cfg.yaml", [f"exp_dir=run{next(numbers)}", *overrides], RunConfig), Parallel())
        assert run.train() == 0
        log = (run.folder / "train.log").read_text(encoding="utf-8")
        return run, log, [float(value) for value in re.findall(r"loss (\d+\.\d+)", log)]

    return go


def files(run, stem="unet"):
    return {path.name: load_file(path) for path in (run.folder / "ckpts").glob(f"{stem}-*.safetensors")}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_fp32_adapters_to_nearly_the_same_loss(train, precision):
    run, log, losses = train(f"mixed_precision={precision}")
    assert next(run.models.unet.conv_in.parameters()).dtype == machine.DTYPES[precision] and precision in log
    assert all(lora.down.dtype == torch.float32 for lora in run.trainables[0].adapters.values())
    assert losses == pytest.approx(train()[2], rel=0.02)


def test_gradient_checkpointing_reaches_the_unet_also_for_the_text_encoder_alone(train):
    words = ["lora_unet=null", "lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*self_attn$']}]"]
    run, _, losses = train(*words, "model.gradient_checkpointing=true")
    assert run.models.unet.is_gradient_checkpointing and run.models.text_encoder.is_gradient_checkpointing
    other, _, expected = train(*words)
    assert losses == expected and not other.models.unet.is_gradient_checkpointing
    for name, tensors in files(run, "text_encoder").items():
        assert all(torch.allclose(tensors[key], files(other, "text_encoder")[name][key], atol=1e-6) for key in tensors)


def test_previews_are_drawn_and_change_nothing(train):
    run, log, losses = train("preview.prompts=['a {cat:1.2}', dog]", "preview.every=1", "preview.num_inference_steps=2")
    assert re.findall(r"(previews of step \d: 2 pictures) in \d+\.\d s", log) == ["previews of step 1: 2 pictures", "previews of step 2: 2 pictures"]
    assert sorted(path.name for path in (run.folder / "previews").iterdir()) == ["1-0.png", "1-1.png", "2-0.png", "2-1.png"]
    assert losses == train()[2]


def test_faults_that_need_the_model_come_together(train):
    with pytest.raises(ConfigError) as caught:
        train("preview.prompts=['a {cat']", "model.clip_skip=50", "train.max_timestep=5000", "lora_unet.0.layers=['re:nothing']")
    text = str(caught.value)
    assert all(part in text for part in ("preview.prompts[0]", "clip_skip = 50", "max_timestep", "re:nothing"))


def test_the_log_says_how_many_latents_were_encoded_and_how_many_were_found(train):
    def said(*words):
        [line] = re.findall(r"latents: .*", train("train.train_steps=1", *words)[1])
        return re.sub(r"\d+\.\d s", "0.3 s", line)

    disk = ("data.one.cache_latents=disk", "data.one.cache_dir=kept")
    assert said() == "latents: 3 images, 3 encoded and kept in memory, 0.3 s"
    assert said(*disk) == "latents: 3 images, 3 encoded, 0.3 s"
    Image.effect_noise((64, 64), 99).save("images/1.png")
    assert said(*disk) == "latents: 3 images, 2 from kept, 1 encoded, 0.3 s" and said(*disk) == "latents: 3 images, 3 from kept, 0.3 s"


def test_the_start_says_what_memory_and_time_beside_the_steps_go_into(train):
    log = train("train.train_steps=1", "model.gradient_checkpointing=true", "train.save_step=50", "preview={prompts: [cat, dog], every: 20, num_inference_steps: 1}")[1]
    assert re.search(r"memory +│ gradient checkpointing on; latents in memory ", log), log
    assert re.search(r"beside the steps +│ saved every 50 steps and at the end; 2 previews every 20 steps and at the end ", log)
    log = train("train.train_steps=1", "train.save_step=null", "train.workers=1", "data.one.cache_latents=none")[1]
    assert re.search(r"memory +│ gradient checkpointing off; latents of one not kept: images are decoded and encoded in each step, by 1 loader", log), log
    assert re.search(r"beside the steps +│ saved at the end; no previews ", log)


def test_a_preview_that_fails_does_not_end_the_run(train, monkeypatch):
    def fail(*args, **keys):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("hcpdiff.vis.preview.draw_previews", fail)
    log = train("preview.prompts=[cat, dog]", "preview.bs=2")[1]
    assert "could not be drawn" in log and "Lower preview.bs = 2, preview.width = 64" in log
    _, log, _ = train("preview.prompts=[cat]")
    (line,) = [line for line in log.splitlines() if "could not be drawn" in line]
    assert "warning: the preview of step 2 could not be drawn: out of memory (no memory)" in line
    assert "Lower preview.width = 64 or preview.height = 64." in line  # nothing is said of a batch that cannot be smaller


def test_a_first_pass_that_does_not_fit_leaves_no_run_folder(train, monkeypatch, tmp_path):
    """On a GPU the largest batch is tried before the first step, compiling included; the corrected command may name the folder again."""
    def fail(*args):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched, pytest.raises(HCPError, match="out of memory"):
        patched.setattr(Run, "_first_pass", fail)
        train("exp_dir=again")
    assert not (tmp_path / "again").exists()
    assert train("exp_dir=again")[0].folder.name == "again"


@pytest.mark.parametrize("where,what,lower", [("posterior", "while encoding latents", {"bucket"}),
                                              ("denoise", "in a training step of 1 image of 64x64", {"bucket", "checkpointing", "batch_size", "quantize"})])
def test_out_of_memory_says_in_which_phase_and_what_to_change(train, monkeypatch, where, what, lower):
    def fail(*args):
        raise torch.OutOfMemoryError("no memory")

    ways = {"bucket": "data.one.bucket.target_area 16384 -> 4096 (64x64)", "checkpointing": "model.gradient_checkpointing: true", "quantize": "model.quantize null -> int8",
            "batch_size": "data.one.batch_size 2 -> 1 with train.gradient_accumulation_steps 3 -> 6"}
    monkeypatch.setattr(f"hcpdiff.families.sd.StableDiffusion.{where}", fail)
    with pytest.raises(HCPError, match=f"out of memory {what}") as caught:
        train("train.gradient_accumulation_steps=3", "data.one.bucket.target_area=16384", "data.one.bucket.sizes=[[64, 64]]")
    assert "data.one.bucket.sizes: smaller ones" in str(caught.value)
    with pytest.raises(HCPError, match=f"out of memory {what.split(' of ')[0]}") as caught:
        train("train.gradient_accumulation_steps=3", "data.one.bucket.target_area=16384")
    assert {name for name, way in ways.items() if way in str(caught.value)} == lower


def test_out_of_memory_names_no_key_that_is_set_already():
    """The order is that of the guide; images of a step are kept where batch sizes have a common factor."""
    def told(*changes):
        return less_memory(load("cfgs/train/examples/lora_conventional.yaml", ["data={one: {source: {a: {img_root: cfgs}}}}", *changes], RunConfig).config)

    size = "data.one.batch_size"
    assert told(f"{size}=1", "model.quantize=nf4").endswith("To try, in this order: data.one.bucket.target_area 262144 -> 147456 (384x384).")
    assert "gradient_checkpointing" not in told() and "int8 -> nf4" in told("model.quantize=int8") and "train.resume_force" not in told()
    assert f"{size} 9 -> 3 with train.gradient_accumulation_steps 1 -> 3" in told(f"{size}=9")
    assert "No key is left" in told(f"{size}=1", "model.quantize=nf4", "data.one.bucket.target_area=4096")
    both = told("data.one.cache_latents=none", "mixed_precision=fp32")
    assert both.index("data.one.cache_latents none -> memory") < both.index("mixed_precision fp32 -> auto") < both.index("model.quantize null -> int8")


@pytest.mark.parametrize("key", ["train.noise_offset=0.5", "train.loss.min_snr_gamma=0.5", "train.loss.type=l1", "model.prediction_type=v_prediction", "model.clip_skip=1",
                                 "model.tokenizer_repeats=2", "train.min_timestep=900", "train.max_timestep=10", "train.noise_offset=0.1", "seed=7",
                                 "model.noise_scheduler={_target_: diffusers.DDPMScheduler, prediction_type: sample}"])
def test_keys_of_the_objective_reach_the_loss(train, key):
    def learnt(run):
        return torch.cat([tensor.flatten() for _, tensor in sorted(files(run)["unet-2.safetensors"].items())])

    assert not torch.equal(learnt(train(key)[0]), learnt(train()[0]))  # the log's losses are rounded


def test_the_noise_scheduler_is_reported_and_checked(train):
    assert "predicts v_prediction" in train("model.noise_scheduler={_target_: diffusers.DDPMScheduler, prediction_type: v_prediction}")[1]
    with pytest.raises(ConfigError, match="another kind of model"):
        train("model.noise_scheduler={_target_: diffusers.FlowMatchEulerDiscreteScheduler}")


def test_a_file_system_without_locks_is_told_of(train, monkeypatch):
    def no_locks(handle):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("hcpdiff.train.lock._take", no_locks)
    run, log, _ = train()
    assert f"note: the file system of {run.folder} has no locks (No locks available): nothing keeps a second run out of the folder." in log


def test_a_loader_process_that_is_killed_is_named_and_no_bug_of_ours(train, monkeypatch):
    """As the system does it when the main memory is full."""
    class Killer(Hook):
        def on_step_end(self, trainer):
            if trainer.state.step == 1:
                os.kill(next(child.pid for child in multiprocessing.active_children() if child.pid not in others), signal.SIGKILL)

    hooks, others = Run._hooks, {child.pid for child in multiprocessing.active_children()}
    monkeypatch.setattr(Run, "_hooks", lambda self: [*hooks(self), Killer()])
    with pytest.raises(HCPError, match="a process that loads images was killed .*train.workers.* Saved up to step [0-9]+; to go on: mend it and start the same command") as caught:
        train("train.train_steps=500", "train.workers=2", "data.one.cache_latents=none")
    assert caught.value.exit_code == 2


def test_an_image_that_vanishes_costs_no_step_and_the_run_goes_on_once_it_is_back(train, monkeypatch):
    class Thief(Hook):
        def on_step_end(self, trainer):
            done.append(trainer.state.step)
            if trainer.state.step == 3:
                os.rename("images/1.png", "1.png")

    hooks, done, words = Run._hooks, [], ("train.train_steps=12", "train.save_step=100", "train.workers=0", "data.one.cache_latents=none")
    _, _, whole = train(*words)
    monkeypatch.setattr(Run, "_hooks", lambda self: [*hooks(self), Thief()])
    with pytest.raises(FeedError, match="images/1.png: the file is gone. Saved up to step ") as caught:
        train(*words)
    monkeypatch.setattr(Run, "_hooks", hooks)
    (last,) = os.listdir("run1/states")
    assert done[-1] == int(last) < 12 and f"Saved up to step {last}; to go on: mend it and start the same command with train.resume=run1" in str(caught.value)
    assert caught.value.exit_code == 2 and os.path.exists(f"run1/ckpts/unet-{last}.safetensors")
    os.rename("1.png", "images/1.png")
    _, log, losses = train(*words, "train.resume=run1")
    assert "resumed after step" in log and losses == whole


def test_a_signal_is_answered_in_the_log(train, monkeypatch):
    class Signal(Hook):
        def __init__(self, stop):
            self.stop = stop

        def on_step_end(self, trainer):
            if trainer.state.step == 1:
                self.stop.told(2)

    hooks = Run._hooks
    monkeypatch.setattr(Run, "_hooks", lambda self: [*hooks(self), Signal(self.stop)])
    assert "Ctrl+C (SIGINT): step 2 or 3 will be finished and saved; once more (3 s later or more) stops at once." in train("train.train_steps=3")[1]
    assert "Ctrl+C (SIGINT): step 2 will be finished and saved; once more (3 s later or more) stops at once." in train()[1]


def test_attention_kernels_agree(train):
    assert train("model.attention=eager")[2] == pytest.approx(train()[2], rel=1e-4)


def test_save_dtype_keep_states_and_scale_lr(train):
    run, log, _ = train("train.save_dtype=fp16", "train.save_step=1", "train.keep_states=1", "train.scale_lr=true")
    assert {tensor.dtype for name in files(run) for key, tensor in files(run)[name].items() if "lora" in key} == {torch.float16}
    assert [path.name for path in (run.folder / "states").iterdir()] == ["2"] and len(files(run)) == 2 and "lr unet 2.00e+00" in log


def test_sd2_trains_v_prediction(train, tiny_sd2):
    run, log, losses = train(model=tiny_sd2)
    assert "sd_v2_v, predicts v_prediction" in log and len(losses) == 2


def test_a_run_starts_from_a_webui_file_with_both_parts(train):
    words = ["lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*self_attn$']}]"]
    first, _, _ = train(*words)
    from hcpdiff.checkpoint.convert import to_webui
    from hcpdiff.families.webui import BY_NAME

    layers = {trainable.component.name: trainable.export() for trainable in first.trainables}
    webui = to_webui(layers, next(family for name, family in BY_NAME.items() if name in ("sd1", "sd_v1")))
    save_file({key: tensor.contiguous() for key, tensor in webui.tensors.items()}, "both.safetensors")
    again, log, _ = train(*words, "model.init_lora=both.safetensors", "train.optimizer={_target_: torch.optim.SGD}", "lora_unet.0.lr=0", "lora_text_encoder.0.lr=0")
    for stem in ("unet", "text_encoder"):
        old, new = files(first, stem)[f"{stem}-2.safetensors"], files(again, stem)[f"{stem}-2.safetensors"]
        assert old.keys() == new.keys() and all(torch.allclose(old[key], new[key]) for key in old)
    assert "layers of the text_encoder are not used" in train("model.init_lora=both.safetensors")[1]
    with pytest.raises(ConfigError, match="nothing would be done"):
        train("model.init_lora_TE=both.safetensors")


def test_a_run_starts_from_the_newest_step_of_a_run_folder(train):
    words = ["lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*self_attn$']}]"]
    first, _, _ = train(*words)
    again, log, _ = train(*words, f"model.init_lora={first.folder}", "train.optimizer={_target_: torch.optim.SGD}", "lora_unet.0.lr=0", "lora_text_encoder.0.lr=0")
    for stem in ("unet", "text_encoder"):
        old, new = files(first, stem)[f"{stem}-2.safetensors"], files(again, stem)[f"{stem}-2.safetensors"]
        assert old.keys() == new.keys() and all(torch.allclose(old[key], new[key]) for key in old)
    assert f"{first.folder}/ckpts/unet-2.safetensors: " in log and f"{first.folder}/ckpts/text_encoder-2.safetensors: " in log


def test_cfg_yaml_names_the_folder_that_was_made(train, tmp_path):
    (tmp_path / "exps" / "now").mkdir(parents=True)
    run, _, _ = train("exp_dir=exps/${hcp.time:now}")
    assert run.folder.name == "now-2" and 'exp_dir: "exps/now-2"' in (run.folder / "cfg.yaml").read_text(encoding="utf-8")
    assert load(str(run.folder / "cfg.yaml"), [], RunConfig).timed == {"exp_dir"}


def test_a_run_can_be_resumed_under_another_precision(train):
    run, _, _ = train("mixed_precision=bf16")
    _, log, _ = train(f"train.resume={run.folder}", "mixed_precision=fp32", "train.train_steps=3", f"exp_dir={run.folder}")
    assert "changed since the state was saved: mixed_precision: 'bf16' before, 'fp32' now" in log


@pytest.mark.parametrize("learns,times", [([], 1), (["lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*self_attn$']}]"], 2)])
def test_preview_prompts_are_encoded_once_unless_the_encoder_learns(train, monkeypatch, learns, times):
    from hcpdiff.vis import preview

    encode, calls = preview.encode_preview_prompts, []
    monkeypatch.setattr(preview, "encode_preview_prompts", lambda *args, **keys: calls.append(1) or encode(*args, **keys))
    train("preview.prompts=[cat]", "preview.every=1", "preview.num_inference_steps=2", *learns)
    assert len(calls) == times


def test_a_run_that_learns_its_numbers_late_ends_in_the_same_bits(train, monkeypatch):
    """As beside a GPU: saves, previews and the log look ahead."""
    words = ["train.train_steps=4", "train.save_step=3", "preview.prompts=['a cat']", "preview.every=2", "preview.num_inference_steps=1", "train.optimizer={_target_: torch.optim.AdamW}"]
    at_once, _, losses = train(*words)
    monkeypatch.setattr("hcpdiff.train.run.Trainer", partial(Trainer, lag=True))
    late, _, late_losses = train(*words)
    assert losses == late_losses and len(losses) == 4
    for folder in ("ckpts", "states/3", "states/4"):
        names = sorted(path.name for path in (at_once.folder / folder).glob("*.safetensors"))
        for name in names:
            a, b = (load_file(run.folder / folder / name) for run in (at_once, late))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        assert names
    assert sorted(path.name for path in (at_once.folder / "previews").iterdir()) == sorted(path.name for path in (late.folder / "previews").iterdir())


@pytest.mark.parametrize("lag", [False, True])
def test_a_run_that_diverges_ends_with_code_3_and_keeps_what_was_good(train, monkeypatch, tmp_path, lag, capsys):
    monkeypatch.setattr("hcpdiff.train.run.Trainer", partial(Trainer, lag=lag))
    with pytest.raises(NonFiniteError, match="2 steps in a row") as caught:
        train("train.train_steps=9", "train.save_step=1", "train.max_nonfinite=2", "lora_unet.0.lr=1e34", "train.max_grad_norm=null")
    assert caught.value.exit_code == 3
    run = tmp_path / "run0"
    saved = list((run / "ckpts").iterdir())
    assert saved and all(value.isfinite().all() for path in saved for value in load_file(path).values())
    assert any((run / "states").iterdir())
    log = (run / "train.log").read_text(encoding="utf-8")
    assert re.search(r"warning: step \d changed nothing: the .* not finite.*one/a/\d.png", log) and "NaN or Inf found" not in capsys.readouterr().err
    events = EventAccumulator(str(run / "tblog"))
    events.Reload()
    found = [(event.step, math.isfinite(event.value)) for event in events.Scalars("grad_norm")]
    assert [step for step, _ in found] == list(range(1, len(found) + 1)) and [good for _, good in found[-2:]] == [False, False] and found[0][1]

"""A VAE whose digest is remembered beside the latents stays unread, unless something needs it; and a changed one is never taken for the one before."""

import json
import os
import re
import shutil
import time

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from single_models import make_parts, save_single
from test_memory import sharded
from test_run import train  # noqa: F401 - the fixture

from hcpdiff.config.schema import ModelConfig
from hcpdiff.data import hashes
from hcpdiff.errors import CheckpointError
from hcpdiff.families.base import fingerprint
from hcpdiff.families.read_parts import CPU, Reader
from hcpdiff.train.base import BaseModel

DISK = "data.one.cache_latents=disk", "data.one.cache_dir=cache"
PREVIEWS = "preview.prompts=[cat]", "preview.num_inference_steps=1"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def reads(monkeypatch):
    """The classes whose weights were read, as they come. Files that were written just now are remembered too."""
    classes, real = [], Reader.__call__
    monkeypatch.setattr(Reader, "__call__", lambda self, module, *more: classes.append(type(module).__name__) or real(self, module, *more))
    monkeypatch.setattr(hashes, "_RACY_NS", 0)
    return classes


@pytest.fixture
def model(tiny_sd1, tmp_path):
    """A model of the test's own."""
    shutil.copytree(tiny_sd1, tmp_path / "model")
    return tmp_path / "model"


def weights(run) -> dict:
    return load_file(run.folder / "ckpts" / "unet-2.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_start_reads_no_vae_and_trains_the_same(train, reads, model):  # noqa: F811
    first, _, _ = train(*DISK, model=model)
    assert reads.count("AutoencoderKL") == 1
    reads.clear()
    second, log, _ = train(*DISK, model=model)
    assert "AutoencoderKL" not in reads and "UNet2DConditionModel" in reads and "3 from cache" in log
    assert first.base.marks == second.base.marks and same(weights(first), weights(second))


@pytest.mark.parametrize("overrides", [PREVIEWS, ("data.two={batch_size: 1, cache_latents: none, source: {a: {img_root: images, word_names: {pt1: thing}}}, bucket: {target_area: 4096, num_bucket: 1}}",
                                                  "train.workers=0")])
def test_what_needs_the_vae_after_caching_gets_it(train, reads, model, overrides):  # noqa: F811
    train(*DISK, model=model)
    reads.clear()
    run, _, _ = train(*DISK, *overrides, model=model)
    assert reads.count("AutoencoderKL") == 1 and not any(p.is_meta for p in run.models.vae.parameters())
    fresh, _, _ = train(DISK[0], "data.one.cache_dir=other", *overrides, model=model)
    assert same(weights(run), weights(fresh)) and fingerprint(run.models.vae) == run.base.marks["vae"]


def test_what_the_cache_lost_is_encoded_by_the_vae_that_was_left_unread(train, reads, model, tmp_path):  # noqa: F811
    first, _, _ = train(*DISK, model=model)
    for pack in (tmp_path / "cache").glob("latents-*/*"):
        pack.unlink()
    reads.clear()
    run, log, _ = train(*DISK, model=model)
    assert reads.count("AutoencoderKL") == 1 and "3 encoded" in log and same(weights(first), weights(run))


@pytest.mark.skipif(os.name != "posix", reason="elsewhere no file has a time that cannot be set back: every VAE is read")
@pytest.mark.parametrize("change", ["weight", "config", "replaced"])
def test_another_vae_in_the_same_place_is_seen(train, reads, model, change):  # noqa: F811
    first, _, _ = train(*DISK, model=model)
    file, before = model / FILE, os.stat(model / FILE)
    tensors = load_file(file)
    if change == "config":
        config = json.loads((model / "vae" / "config.json").read_text("utf-8"))
        (model / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}), "utf-8")
    else:
        tensors["encoder.conv_in.weight"].view(-1)[0] += 0.25
        save_file(tensors, model / "new", {"format": "pt"})
        if change == "weight":
            file.write_bytes((model / "new").read_bytes())
        else:
            os.replace(model / "new", file)
        assert os.stat(file).st_size == before.st_size
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p leaves it
    reads.clear()
    run, log, _ = train(*DISK, model=model)
    assert reads.count("AutoencoderKL") == 1 and "3 encoded" in log and run.base.marks["vae"] != first.base.marks["vae"]
    assert run.base.marks["vae"] == fingerprint(AutoencoderKL.from_pretrained(model / "vae"))


@pytest.mark.parametrize("form,remembered", [("folder", True), ("single file", True), ("pickle", True), ("its own file", True), ("its own folder", True), ("a hub id", True), ("old names", True), ("shards", False), ("unsafe weights", False)])
def test_the_digest_is_that_of_the_values_in_every_form(tiny_sd1, tmp_path, reads, monkeypatch, form, remembered):
    options = {}
    path = tmp_path / "model"
    if form in ("single file", "pickle"):
        parts = make_parts("sd1")
        path = save_single(tmp_path / "m.safetensors", "sd1", parts)
        if form == "pickle":
            torch.save({"state_dict": load_file(path)}, tmp_path / "m.ckpt")
            path = tmp_path / "m.ckpt"
    else:
        shutil.copytree(tiny_sd1, path)
    if form == "its own file":
        options["vae"] = str(shutil.copy(path / FILE, tmp_path / "vae.safetensors"))
    elif form == "its own folder":
        options["vae"] = str(shutil.copytree(path / "vae", tmp_path / "vae"))
    elif form == "a hub id":
        repository = tmp_path / "hub" / "models--some--vae"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(path / "vae", repository / "snapshots" / ("0" * 40))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        options["vae"] = "some/vae"
    elif form == "old names":  # of before 2023, as most published VAEs have them
        tensors = load_file(path / FILE)
        renamed = {re.sub(r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)", lambda m: m[1] + OLD[m[2]], name): tensor for name, tensor in tensors.items()}
        assert len(renamed.keys() - tensors.keys()) == 16
        wanted = AutoencoderKL.from_pretrained(path / "vae")
        save_file(renamed, path / FILE, {"format": "pt"})
        assert fingerprint(AutoencoderKL.from_pretrained(path / "vae")) == fingerprint(wanted)
    elif form == "shards":
        sharded(path, part="vae")
    elif form == "unsafe weights":
        torch.save(load_file(path / FILE), path / "vae" / "diffusion_pytorch_model.bin")
        (path / FILE).unlink()

    def mark() -> str:
        base = BaseModel(ModelConfig(pretrained_model_name_or_path=str(path), **options))
        models = base.load(torch.float32, (), tmp_path)
        base.remember_marks()
        found = base.marks["vae"]
        models.read("vae", CPU)
        assert found == fingerprint(models.vae)
        return found

    assert mark() == mark()
    assert reads.count("AutoencoderKL") == 2
    base = BaseModel(ModelConfig(pretrained_model_name_or_path=str(path), **options))
    assert any(p.is_meta for p in base.load(torch.float32, (), tmp_path).vae.parameters()) == remembered


def test_a_file_that_was_written_just_now_is_not_remembered(tiny_sd1, tmp_path, monkeypatch):
    """A second change could fall into the same tick of the clock."""
    monkeypatch.setattr(hashes, "_RACY_NS", 10**18)
    for _ in range(2):
        base = BaseModel(ModelConfig(pretrained_model_name_or_path=str(tiny_sd1)))
        assert not any(p.is_meta for p in base.load(torch.float32, (), tmp_path).vae.parameters())
        base.remember_marks()


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_a_file_that_was_replaced_since_it_was_looked_at_is_never_remembered(tmp_path, monkeypatch, reads, form):
    """What was looked at, or mapped, is the old file; what the file system says is of the new one."""
    path = save_single(tmp_path / "m.safetensors", "sd1", make_parts("sd1"))
    tensors = load_file(path)
    if form == "ckpt":
        path = tmp_path / "m.ckpt"
        torch.save({"state_dict": tensors}, path)
    base = BaseModel(ModelConfig(pretrained_model_name_or_path=str(path)))
    for name in tensors:
        if name.startswith("first_stage_model."):
            tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "new") if form == "safetensors" else torch.save({"state_dict": tensors}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(CheckpointError, match="replaced or changed"):
        base.load(torch.float32, (), tmp_path)
    assert not (tmp_path / "vaes-1.bin").exists()


def test_a_file_that_was_changed_just_before_it_was_read_for_long_is_not_remembered(tmp_path):
    """Reading takes seconds, in which a change could fall into the same tick of the clock as the one before."""
    (tmp_path / "x").write_bytes(b"x")
    look = hashes.Look(tmp_path / "x")
    time.sleep(hashes._RACY_NS / 1e9 + 0.1)
    assert look.settled() is None and hashes.Look(tmp_path / "x").settled() == look.state

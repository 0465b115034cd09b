"""What a run holds of its base model, and when: one part after the other, nothing twice, and what is not needed any more not at all."""

import gc
import json
import os
import shutil
import weakref
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from single_models import ldm_state, make_parts, save_single
from test_run import CONFIG, train  # noqa: F401 - the fixture
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel

from hcpdiff.adapters.base import adapted_layers
from hcpdiff.config.load import load
from hcpdiff.config.schema import LoraGroup, ModelConfig, RunConfig
from hcpdiff.errors import CheckpointError, ConfigError
from hcpdiff.families import detect
from hcpdiff.families.base import Models, fingerprint
from hcpdiff.families.read_parts import set_weight
from hcpdiff.families.weight_file import WeightFile
from hcpdiff.quantized import Plan
from hcpdiff.train.base import BaseModel
from hcpdiff.train.conditioning import FrozenText
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.run import Run
from hcpdiff.train.trainer import Hook
from hcpdiff.trainables.lora import lay_groups

CPU, FILE = torch.device("cpu"), "unet/diffusion_pytorch_model.safetensors"
CAPTIONED = "data.one.source.a.caption_file=images"
SHUFFLED = "data.one.source.a.tag_shuffle=true"


def outline_of(model, dtype=torch.float32, **more) -> Models:
    return detect(model).load(model, "m", ["unet"], dtype, outlines=["unet"], **more)


def whole_of(model, dtype=torch.float32, **more) -> dict:
    return detect(model).load(model, "m", ["unet"], dtype, **more).unet.state_dict()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def sharded(folder, parts: int = 3, variant: str = "", part: str = "unet") -> None:
    """A folder's UNet (or VAE) in several files, as the hub has large ones."""
    file = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = {name: f"diffusion_pytorch_model-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == file}, folder / part / file)
    (folder / part / f"diffusion_pytorch_model.safetensors.index{variant}.json").write_text(json.dumps({"metadata": {}, "weight_map": names}), "utf-8")


# ---- outlines ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form,dtype", [("folder", torch.float32), ("half", torch.float32), ("shards", torch.float16), ("variant", torch.bfloat16),
                                        ("variant in shards", torch.float32), ("single file", torch.bfloat16), ("pickle", torch.float32)])
def test_an_outline_that_was_read_later_is_the_model_that_is_loaded_at_once(tiny_sd1, tmp_path, form, dtype):
    model, more = tmp_path / "model", {}
    shutil.copytree(tiny_sd1, model)
    if form == "half":
        save_file({name: tensor.half() for name, tensor in load_file(model / FILE).items()}, model / FILE)
    elif form == "shards":
        sharded(model)
    elif form == "variant":
        (model / FILE).rename(model / "unet" / "diffusion_pytorch_model.fp16.safetensors")
        more = {"variant": "fp16"}
    elif form == "variant in shards":
        sharded(model, variant=".fp16")
        more = {"variant": "fp16"}
    elif form == "pickle":
        pickled(model)
    elif form == "single file":
        model = save_single(tmp_path / "one.safetensors", "sd1", make_parts("sd1"))
    models = outline_of(model, dtype, **more)
    assert all(p.is_meta and p.dtype == dtype for p in models.unet.parameters()) == (form != "pickle")
    models.read("unet", CPU)
    assert not models.unread and equal(models.unet.state_dict(), whole_of(model, dtype, **more))
    assert not any(module.training for module in models.unet.modules()) and not any(p.requires_grad for p in models.unet.parameters())
    assert all(p.data_ptr() % 64 == 0 for p in models.unet.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_written_once(tiny_sd1, dtype):
    """Each is copied once, cast on the way."""
    class Counted(TorchDispatchMode):
        copied = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.copied += func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.clone)
            return func(*args, **(kwargs or {}))

    models = outline_of(tiny_sd1, dtype)
    with Counted() as mode:
        models.read("unet", CPU)
    assert mode.copied == len(list(models.unet.parameters()))


def pickled(folder) -> None:
    """A folder's UNet as older ones have it, which the library reads whole."""
    torch.save(load_file(folder / FILE), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / FILE).unlink()


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_adapters_are_laid_on_an_outline_and_stay(tiny_sd1, tmp_path, form):
    """The same objects: an optimizer and what copies of weights are made of hold them already."""
    model = tmp_path / "model"
    shutil.copytree(tiny_sd1, model)
    if form == "pickle":
        pickled(model)
    models = outline_of(model)
    (trainable,) = lay_groups(models, "lora_unet", [LoraGroup(lr=1e-3, layers=["re:.*attn2\\.to_k$"], rank=2)], 1)
    before = {path: (lora, lora.down, lora.up, lora.down.clone()) for path, lora in trainable.adapters.items()}
    models.read("unet", CPU)
    layers = adapted_layers(models.unet)
    assert layers.keys() == before.keys() and all(parameter is old for path, layer in layers.items() for parameter, old in zip(
        (layer.adapter, layer.adapter.down, layer.adapter.up), before[path]))
    assert all(torch.equal(layer.adapter.down, before[path][3]) and layer.adapter.down.requires_grad for path, layer in layers.items())
    own = {name: tensor for name, tensor in models.unet.state_dict().items() if ".adapter." not in name}
    assert equal(own, whole_of(tiny_sd1))


def test_a_weight_that_is_being_trained_is_not_replaced():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weight"):
        set_weight(layer, "weight", torch.zeros(2, 2))
    layer.requires_grad_(False)
    set_weight(layer, "weight", torch.zeros(2, 2))
    assert not layer.weight.any() and not layer.weight.requires_grad


def test_a_model_that_was_read_whole_lets_each_dense_weight_go_in_its_turn(tiny_sd1, tmp_path):
    model, dense = tmp_path / "model", []
    shutil.copytree(tiny_sd1, model)
    pickled(model)
    models = outline_of(model)
    keep = Plan("int8").keeper(models.unet)

    def watched(name: str, weight: torch.Tensor) -> torch.Tensor:
        assert not [old for old, reference in dense if reference() is not None], name
        kept = keep(name, weight)
        dense.extend([(name, weakref.ref(models.unet.get_parameter(name)))] if kept is not weight else [])
        return kept

    models.read("unet", CPU, watched)
    assert len(dense) == len(Plan("int8").codes(models.unet)) > 100


@pytest.mark.parametrize("fault", ["missing", "shape", "cut short"])
def test_faults_of_the_weights_are_found_with_the_outline(tiny_sd1, tmp_path, fault):
    model = tmp_path / "model"
    shutil.copytree(tiny_sd1, model)
    tensors = load_file(model / FILE)
    if fault == "missing":
        del tensors["conv_in.bias"]
    elif fault == "shape":
        tensors["conv_in.bias"] = torch.zeros(3)
    save_file(tensors, model / FILE)
    if fault == "cut short":
        (model / FILE).write_bytes((model / FILE).read_bytes()[:-100])
    messages = []
    for read in (outline_of, whole_of):
        with pytest.raises(ConfigError) as caught:
            read(model)
        messages.append(caught.value.faults)
    assert messages[0] == messages[1]


def test_of_a_file_one_tensor_at_a_time_is_held_beside_the_model(tiny_sd1, monkeypatch):
    real, held, most = WeightFile.tensor, [], [0]

    def tensor(file, name, scratch=None):
        most[0] = max(most[0], len({storage.data_ptr() for ref in held if (storage := ref()) is not None}))
        made = real(file, name, scratch)
        held.append(weakref.ref(made.untyped_storage()))
        return made

    models = outline_of(tiny_sd1, torch.bfloat16)
    monkeypatch.setattr(WeightFile, "tensor", tensor)
    models.read("unet", CPU)
    assert len(held) > 600 and most[0] <= 1
    file = WeightFile(tiny_sd1 / FILE)
    kept = [file.tensor(name) for name in list(file.shapes)[:3]]
    assert most[0] == 2 and len(kept) == 3, "tensors that are kept are counted"


@pytest.mark.parametrize("form", ["flat", "text_model", "variant", "shards", "file and shards"])
def test_a_folders_text_encoder_is_read_as_the_library_reads_it(tiny_sd1, tmp_path, monkeypatch, form):
    """Without it: under the names of transformers 5 and of those before, whose files hold a buffer too."""
    folder = shutil.copytree(tiny_sd1, tmp_path / "model") / "text_encoder"
    tensors, file, more = load_file(folder / "model.safetensors"), folder / "model.safetensors", {}
    if form == "text_model":
        tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()} | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        save_file(tensors, file, {"format": "pt"})
    elif form == "variant":
        more = {"variant": "fp16"}
        file = file.rename(folder / "model.fp16.safetensors")
    elif form.endswith("shards"):
        names = sorted(tensors)
        tensors = {name: tensor + (form == "file and shards") for name, tensor in tensors.items()}  # the file is what counts there
        for number, some in enumerate((names[::2], names[1::2]), 1):
            save_file({name: tensors[name] for name in some}, folder / f"model-0000{number}-of-00002.safetensors", {"format": "pt"})
        places = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        if form == "shards":
            file.unlink()
    wanted = CLIPTextModel.from_pretrained(folder, dtype=torch.bfloat16, **more).eval()
    monkeypatch.setattr("hcpdiff.families.place.load_whole", lambda *args: pytest.fail("the library reads it"))
    found = detect(folder.parent).load(folder.parent, "m", ["text_encoder"], torch.bfloat16, **more).text_encoder
    ids = torch.randint(0, 99, (2, 77))
    assert equal(found.state_dict(), wanted.state_dict()) and torch.equal(found(ids).last_hidden_state, wanted(ids).last_hidden_state)
    assert (found.dtype, found.config.dtype, found.config._attn_implementation) == (wanted.dtype, wanted.config.dtype, wanted.config._attn_implementation)
    assert not found.training and all(p.data_ptr() % 64 == 0 for p in found.parameters())


@pytest.mark.parametrize("form", ["two spellings", "a config of other kinds", "another file by config"])
def test_what_is_odd_about_a_text_encoder_is_left_to_the_library(tiny_sd1, tmp_path, form):
    folder = shutil.copytree(tiny_sd1, tmp_path / "model") / "text_encoder"
    config, tensors = json.loads((folder / "config.json").read_text("utf-8")), load_file(folder / "model.safetensors")
    if form == "two spellings":
        name = next(name for name in tensors if name.endswith("final_layer_norm.weight")).removeprefix("text_model.")
        tensors |= {f"text_model.{name}": tensors.get(f"text_model.{name}", tensors.get(name)) + 1, name: tensors.get(name, tensors.get(f"text_model.{name}")) + 2}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif form == "a config of other kinds":
        config |= {"block_out_channels": None}
    else:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "other.safetensors", {"format": "pt"})
        config |= {"transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    wanted = CLIPTextModel.from_pretrained(folder)
    assert equal(detect(folder.parent).load(folder.parent, "m", ["text_encoder"]).text_encoder.state_dict(), wanted.state_dict())


def test_the_mark_of_a_vae_is_that_of_what_was_read_whatever_becomes_of_it(tiny_sd1):
    """A thread makes it while other parts are read; what is done to the module meanwhile does not count."""
    base = BaseModel(ModelConfig(pretrained_model_name_or_path=str(tiny_sd1)))
    models = base.load(torch.float32, ())
    models.vae.to(torch.bfloat16)
    models.drop("vae")
    read = detect(tiny_sd1).load(tiny_sd1, "m", ["vae"]).vae
    assert base.marks["vae"] == fingerprint(read) == fingerprint(AutoencoderKL.from_pretrained(tiny_sd1 / "vae"))
    next(read.parameters()).data.view(-1)[0] += 1
    assert base.marks["vae"] != fingerprint(read)


@pytest.mark.parametrize("form,replaced", [("folder", True), ("shards", False), ("single file", False), ("pickle", True)])
def test_weights_of_a_file_that_is_not_the_one_that_was_looked_at_are_refused(tiny_sd1, tmp_path, form, replaced):
    model = file = tmp_path / "model"
    if form == "pickle":
        model = file = tmp_path / "m.ckpt"
        torch.save({"state_dict": ldm_state("sd1", make_parts("sd1"))}, file)
    elif form == "single file":
        model = file = save_single(tmp_path / "one.safetensors", "sd1", make_parts("sd1"))
    else:
        shutil.copytree(tiny_sd1, model)
        file = model / FILE
    if form == "shards":
        sharded(model)
        file = sorted((model / "unet").glob("*.safetensors"))[-1]
    base = BaseModel(ModelConfig(pretrained_model_name_or_path=str(model)))
    base.load(torch.float32, ())
    changed, before = bytearray(file.read_bytes()), os.stat(file)
    changed[-1000] ^= 1
    if replaced:  # by one of the same size
        (tmp_path / "other").write_bytes(changed)
        os.replace(tmp_path / "other", file)
    else:
        file.write_bytes(changed)
    if os.name == "posix":  # as cp -p and rsync -t leave it; elsewhere no file has a time that cannot be set back
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="replaced or changed while this was starting") as caught:
        base.read("unet", CPU)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_a_ckpt_are_held_only_while_parts_are_read(tmp_path, monkeypatch, zipped):
    parts, held, real = make_parts("sd1"), [], torch.load
    torch.save({"state_dict": ldm_state("sd1", parts)}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)

    def noted(*args, **keys):
        state = real(*args, **keys)
        held.append([weakref.ref(tensor) for tensor in state["state_dict"].values()])
        return state

    def alive() -> int:
        gc.collect()
        return sum(ref() is not None for tensors in held for ref in tensors)

    monkeypatch.setattr(torch, "load", noted)
    base = BaseModel(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "m.ckpt")))
    assert len(held) == 1 and alive() == len(base.place.shapes)
    base.load(torch.float32, ())
    assert len(held) == 1 and alive() == 0 and len(base.place.shapes) == len(held[0])
    base.read("unet", CPU)
    assert len(held) == 2 and alive() == 0 and equal(base.models.unet.state_dict(), parts["unet"].state_dict())


# ---- a run ------------------------------------------------------------------------------------------------------------------------------------------


class Watched(Run):
    """Notes which parts there are when the denoiser's weights are read, and after the first step."""

    def _place_models(self):
        self.held = {name: weakref.ref(module) for name, module in self.models.modules.items()}
        self.parts = {name: any(p.is_meta for p in module.parameters()) for name, module in self.models.modules.items()}
        super()._place_models()

    def _load_model(self):
        super()._load_model()
        self.all = {name: weakref.ref(module) for name, module in self.models.modules.items()}

    def _hooks(self):
        note = Hook()
        note.on_step_end = self._note
        return [*super()._hooks(), note]

    def _note(self, trainer):
        gc.collect()
        self.alive = {name for name, module in self.all.items() if module() is not None}


@pytest.fixture
def watched(train, tmp_path, tiny_sd1):  # noqa: F811
    """watched('key=value', ..., model=folder) -> a finished run."""
    numbers = iter(range(9))

    def go(*overrides, model=tiny_sd1):
        (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=model), encoding="utf-8")
        for i in range(3):
            (tmp_path / "images" / f"{i}.txt").write_text(f"caption {i}, red, blue, green", "utf-8")
        run = Watched(load("cfg.yaml", [f"exp_dir=watched{next(numbers)}", *overrides], RunConfig), Parallel())
        assert run.train() == 0
        return run

    return go


PREVIEWS = "preview.prompts=[cat]", "preview.num_inference_steps=1"
WORDS = "lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*self_attn$']}]"


@pytest.mark.parametrize("overrides,left", [
    ((), {"unet"}), (PREVIEWS, {"unet", "vae"}), ((WORDS,), {"unet", "text_encoder"}), (("data.one.cache_latents=none", "train.workers=0"), {"unet", "vae"})])
def test_what_encodes_is_gone_before_the_denoiser_is_read(watched, overrides, left):
    run = watched(*overrides)
    assert run.parts == {name: name == "unet" for name in left}
    assert run.alive == left, "what is let go has no other owner"


def test_a_base_that_is_read_whole_trains_what_the_same_weights_train(watched, tiny_sd1, tmp_path):
    shutil.copytree(tiny_sd1, tmp_path / "model")
    pickled(tmp_path / "model")
    saved = [load_file(watched(model=model).folder / "ckpts" / "unet-2.safetensors") for model in (tiny_sd1, tmp_path / "model")]
    assert equal(*saved) and all(tensor.any() for name, tensor in saved[0].items() if "lora_up" in name) and any("lora_up" in name for name in saved[0])


@pytest.mark.parametrize("overrides,times", [((), 1), (PREVIEWS, 2)])
def test_the_text_encoder_goes_to_the_device_only_to_encode(watched, monkeypatch, overrides, times):
    went, real = [], FrozenText.working
    monkeypatch.setattr(FrozenText, "working", lambda *args: went.append(1) or real(*args))
    watched(*overrides)
    assert len(went) == times


def test_prompts_that_cannot_all_be_held_are_encoded_for_some_steps_at_a_time(watched, monkeypatch):
    calls, real = [], CLIPTextModel.forward
    monkeypatch.setattr(CLIPTextModel, "forward", lambda *args, **keys: calls.append(1) or real(*args, **keys))
    long = CAPTIONED, SHUFFLED, "train.train_steps=4"
    whole = watched(*long)
    at_once, bytes_each = len(calls), next(iter(whole.text.cache.items.values())).nbytes
    calls.clear()
    monkeypatch.setattr("hcpdiff.train.parts.FrozenText", partial(FrozenText, held=3 * bytes_each))
    parts = watched(*long)
    assert whole.alive == {"unet"} and parts.alive == {"unet", "text_encoder"}
    assert at_once == len(whole.text.cache) > 4 and len(parts.text.cache) <= 4 and at_once <= len(calls) <= at_once + 2
    saved = [load_file(run.folder / "ckpts" / "unet-4.safetensors") for run in (whole, parts)]
    assert equal(*saved)


def test_prompts_ahead_are_those_of_the_steps(watched):
    run = watched(CAPTIONED, SHUFFLED, "data.one.source.a.prompt_dropout=0.2")
    data, start = run.data, run.data.plan.start_of(1)

    def asked(steps):
        return {prompt for _, (step, _) in zip(range(steps), data.plan.steps(start)) for micro in step.micro for prompt in map(data.maker.prompt, micro.samples)}

    for steps in (1, 2, 7):
        prompts, whole = data.prompts_ahead(start, steps, 1000)
        assert whole and set(prompts) == asked(steps) and len(prompts) == len(asked(steps))
    prompts, whole = data.prompts_ahead(start, 50, 5)
    assert not whole and any(set(prompts) == asked(steps) for steps in range(1, 9)) and 5 <= len(prompts) <= 6


def test_where_an_image_has_one_prompt_a_long_run_is_not_looked_through(watched):
    run = watched(CAPTIONED)
    looked, real = [], run.data.maker.prompt
    run.data.maker.prompt = lambda ref: looked.append(1) or real(ref)
    prompts, whole = run.data.prompts_ahead(run.data.plan.start_of(0), 10**9, 1000)
    assert whole and len(prompts) == 3 and len(looked) == 6

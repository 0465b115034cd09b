"""Pictures: against diffusers with weights merged by hand, and what must not change them."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hcpdiff.adapters.attach import attach_lora
from hcpdiff.adapters.base import adapted_layers
from hcpdiff.checkpoint.convert import find_family, to_webui
from hcpdiff.checkpoint.format import save_lora
from hcpdiff.config.infer_schema import InferConfig, MergeItem, VaeOptimize
from hcpdiff.config.schema import PreviewConfig
from hcpdiff.errors import CheckpointError, ConfigError, LayerMatchError
from hcpdiff.families import detect
from hcpdiff.lora_tensors import LoraTensors
from hcpdiff.vis import attach, components, pipeline, preview, request, run
from hcpdiff.vis.lora_files import LoraSource

STEPS = {"num_inference_steps": 3, "guidance_scale": 5.0}



def random_lora(module, seed, rank=4, alpha=2.0, size=1.0, where=lambda path: True, prefix=""):
    """A strong LoRA on the Linear and Conv2d layers of a module."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for path, layer in module.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and where(path):
            out, *shape = layer.weight.shape
            down, up = torch.randn(rank, *shape, generator=g), torch.randn(out, rank, *(1,) * (len(shape) - 1), generator=g)
            norm = layer.weight.detach().norm() / (up.flatten(1) @ down.flatten(1)).norm()
            layers[prefix + path] = LoraTensors(down, up * float(norm) * size, alpha)
    return layers


def attention(path):
    return ".attn" in path or "self_attn" in path


@pytest.fixture(scope="module")
def base(tiny_sd1):
    """diffusers' pipeline of the tiny model."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    """Files unet-5 and text_encoder-5 with a strong random LoRA, and their tensors."""
    folder = tmp_path_factory.mktemp("ckpts")
    layers = random_lora(base.unet, 1, where=attention), random_lora(base.text_encoder, 2, where=attention, prefix="text_model.")
    save_lora(folder / "unet-5.safetensors", layers[0], {"component": "unet"})
    save_lora(folder / "text_encoder-5.safetensors", layers[1], {"component": "text_encoder"})
    return folder / "unet-5.safetensors", *layers


def merged(module, layers, strength):
    """A copy of the module with the LoRA in its weights, in fp64."""
    module = copy.deepcopy(module)
    for path, tensors in layers.items():
        layer = module.get_submodule(path.removeprefix("text_model."))
        layer.weight.data = (layer.weight.double() + strength * tensors.delta(torch.float64).reshape(layer.weight.shape)).float()
    return module


def theirs(pipe, prompt, negative, seed, **parts):
    """A picture by diffusers alone, (H,W,3)."""
    from diffusers import StableDiffusionPipeline

    other = StableDiffusionPipeline(**{**pipe.components, **parts}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return np.asarray(other(prompt, negative_prompt=negative, generator=[torch.Generator().manual_seed(seed)], **STEPS).images[0]).astype(int)


@pytest.fixture(scope="module")
def plain_picture(base):
    """What diffusers alone draws with the base model."""
    return theirs(base, "a cat", "bad", 3)


@pytest.fixture
def ours(tiny_sd1, tmp_path):
    """Draws by the visualizer; pictures (H,W,3) in order."""
    def draw(**keys):
        said = []
        cfg = InferConfig(**{"pretrained_model": str(tiny_sd1), "prompt": "a cat", "neg_prompt": "bad", "seed": 3, "infer_args": STEPS, "cpu_threads": 1,
                             "out_dir": str(tmp_path / "out"), **keys})
        paths = run.run(request.read(cfg), say=said.append)
        draw.said = "\n".join(said)
        return [np.asarray(Image.open(path)).astype(int) for path in paths]
    return draw


def test_the_start_says_which_prompts_are_drawn(ours):
    ours(prompt=["a cat\non a \x1b[31mmat", "a dog"], infer_args=STEPS | {"num_inference_steps": 1})
    assert "\n  prompt     a cat on a \\x1b[31mmat  and 1 more\n  negative   bad\n" in ours.said
    ours(neg_prompt="", prompt="a " * 99, infer_args=STEPS | {"num_inference_steps": 1})
    assert "negative" not in ours.said and f"\n  prompt     {'a ' * 59}a…\n" in ours.said


def test_several_prompts_are_named_beside_their_pictures_and_repeated_pictures_before_them(ours):
    quick = {"infer_args": STEPS | {"num_inference_steps": 1}}
    shared = "masterpiece, best quality, very detailed, "
    ours(prompt=[f"{shared}a cat\non a mat", f"{shared}a car {'very ' * 30}fast", f"{shared}a cat\non a mat"], seed=[3, 5], **quick)
    lines = ours.said.splitlines()
    told = [line.split("  ") for line in lines if ".png" in line]
    assert [place[-len("00000-3.png"):] for place, _ in told] == [f"{n:05d}-{3 + 2 * (n % 2)}.png" for n in range(6)]  # the path comes first, as ever
    assert [label for _, label in told] == [label for label in ("prompt 1: … cat on a mat", f"prompt 2: … car {'very ' * 11}…", "prompt 3: … cat on a mat") for _ in (0, 1)]
    [note] = [line for line in lines if "same prompt" in line]
    assert note == "note: 2 of 6 pictures have the same prompt, negative prompt and seed as an earlier one, and will be the same: picture 5 as 1, 6 as 2."
    assert lines.index(note) < lines.index(next(line for line in lines if ".png" in line))
    ours(prompt=["a cat", "a cat"], neg_prompt=["bad", "worse"], **quick)
    assert "same prompt" not in ours.said and ours.said.count(".png  prompt 2: a cat\n") == 1
    ours(seed=[7, 7, 7, 7, 7], **quick)
    assert "note: 4 of 5 pictures have" in ours.said and "the same: picture 2 as 1, 3 as 1, 4 as 1, …." in ours.said
    assert all(line.endswith("-7.png") for line in ours.said.splitlines() if ".png" in line), "of one prompt nothing is to be told apart"


def test_picture_without_lora_is_diffusers_own(ours, plain_picture):
    assert np.abs(ours()[0] - plain_picture).max() <= 1


def test_out_of_memory_names_what_is_not_set_yet_in_the_order_to_try(ours, monkeypatch):
    def fail(*args, **keys):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(pipeline, "sample", fail)
    with pytest.raises(ConfigError, match="out of memory.*CUDA out of memory. Tried to allocate 2 GiB.*offload=true.*tiling=true.*offload=sequential.*width") as caught:
        ours()
    assert "bs=1" not in str(caught.value) and "dtype" not in str(caught.value)
    told = run.less_memory(InferConfig(pretrained_model="a", bs=2, dtype="fp32", offload="sequential", vae_optimize=VaeOptimize(tiling=True)))
    assert told.endswith("order: bs=1; dtype=auto; vae_optimize.slicing=true; smaller infer_args.width and infer_args.height.")


def test_v_prediction_model_is_drawn_as_diffusers_does(ours, tiny_sd2):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd2, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    assert np.abs(ours(pretrained_model=str(tiny_sd2))[0] - theirs(pipe, "a cat", "bad", 3)).max() <= 1
    assert "sd_v2_v" in ours.said


def test_picture_with_lora_equals_that_of_merged_weights(ours, base, plain_picture, lora):
    path, unet, text = lora
    got = ours(lora_path=str(path), lora_alpha=0.8, lora_alpha_TE=0.5)[0]
    want = theirs(base, "a cat", "bad", 3, unet=merged(base.unet, unet, 0.8), text_encoder=merged(base.text_encoder, text, 0.5))
    assert np.abs(got - want).max() <= 1
    assert np.abs(got - plain_picture).max() > 10  # the LoRA is seen
    assert f"unet-5: unet, {len(unet)} layers, rank 4, strength 0.8" in ours.said and f"text_encoder-5: text_encoder, {len(text)} layers, rank 4, strength 0.5" in ours.said


def test_picture_with_lora_equals_diffusers_with_the_converted_file(ours, base, lora, tmp_path):
    path, unet, text = lora
    layers = {"unet": unet, "text_encoder": text}
    save_file({key: value.contiguous() for key, value in to_webui(layers, find_family(layers, {}).family).tensors.items()}, tmp_path / "webui.safetensors")
    other = copy.deepcopy(base)
    other.load_lora_weights(tmp_path / "webui.safetensors")
    want = theirs(other, "a cat", "bad", 3)
    assert np.abs(ours(lora_path=str(path))[0] - want).max() <= 1
    assert np.abs(ours(lora_path=str(tmp_path / "webui.safetensors"))[0] - want).max() <= 1  # one file for both


def test_strength_zero_is_the_base_model_bit_for_bit(ours, lora):
    for dtype in ("fp32", "bf16"):
        assert np.array_equal(ours(lora_path=str(lora[0]), lora_alpha=0, dtype=dtype)[0], ours(dtype=dtype)[0])


def test_picture_does_not_depend_on_its_batch(ours):
    """An ancestral sampler draws noise at every step: that too is each picture's own."""
    euler = {"scheduler": {"_target_": "diffusers.EulerAncestralDiscreteScheduler"}}
    keys = dict(seed=[4, 0, 9], prompt=["a cat", "a {dog:1.3}"], new_components=euler)
    alone, together = ours(bs=1, **keys), ours(bs=4, **keys)
    assert len(alone) == len(together) == 6
    assert max(np.abs(a - b).max() for a, b in zip(alone, together)) <= 1
    assert np.abs(alone[0] - alone[1]).max() > 20
    assert np.abs(ours(seed=0, new_components=euler)[0] - alone[1]).max() <= 1


def test_several_loras_add_up(base, lora):
    _, unet, _ = lora
    second = random_lora(base.unet, 7, rank=2, alpha=1.0)
    both = copy.deepcopy(base.unet)
    sources = [LoraSource("one", None, None, True, 0.5, 1), LoraSource("two", None, None, True, -0.7, 1)]
    models = detect_models(base, both)
    attach.attach_all(models, [attach.Loaded(sources[0], {"unet": unet}), attach.Loaded(sources[1], {"unet": second})])
    want = merged(merged(base.unet, unet, 0.5), second, -0.7)
    x, text = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(both(x, 5, text).sample, want(x, 5, text).sample, rtol=1e-4, atol=1e-5)


def detect_models(base, unet):
    from hcpdiff.families.base import Models

    return Models(None, None, "tiny", {"unet": unet, "text_encoder": copy.deepcopy(base.text_encoder)}, {}, {})


def test_layers_choose_a_part_of_a_lora(lora):
    path, unet, _ = lora
    source = LoraSource("merge[0]", path, None, False, 1, 1, ("re:.*to_k$", "mid_block.attentions.0"))
    got = attach.read(source).layers["unet"]
    assert set(got) == {p for p in unet if p.endswith("to_k") or p.startswith("mid_block.attentions.0.")}
    with pytest.raises(LayerMatchError, match=r"layers\[0\] = 're:.\*to_kk\$' matches none"):
        attach.read(LoraSource("merge[0]", path, None, False, 1, 1, ("re:.*to_kk$",)))


def test_lora_of_another_architecture_names_its_file(ours, tmp_path):
    from tiny import make_unet

    save_lora(tmp_path / "unet-8.safetensors", random_lora(make_unet(cross_dim=48), 1, where=attention), {"component": "unet"})
    with pytest.raises(LayerMatchError) as error:
        ours(lora_path=str(tmp_path / "unet-8.safetensors"), lora_alpha=0)
    assert "unet-8.safetensors" in str(error.value) and "another architecture" in str(error.value)


def test_merge_in_a_config_draws_as_lora_path_does(ours, lora):
    one = ours(lora_path=str(lora[0]), lora_alpha=0.6)[0]
    assert np.array_equal(ours(merge=[MergeItem(path=str(lora[0]), alpha=0.6)])[0], one)
    groups = {"group1": {"type": "unet", "lora": [{"path": str(lora[0]), "alpha": 0.6}]},
              "group2": {"type": "TE", "lora": [{"path": str(lora[0]).replace("unet-", "text_encoder-"), "alpha": 0.6}]}}
    assert np.array_equal(ours(merge=groups)[0], one)


GUIDE_SCHEDULER = {"_target_": "diffusers.DPMSolverMultistepScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                   "algorithm_type": "dpmsolver++", "use_karras_sigmas": True}


def test_scheduler_block_inherits_what_it_leaves_out(tiny_sd2):
    own = components.base_scheduler({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "steps_offset": 1, "beta_start": 0.5, "timestep_spacing": "trailing"})
    made = components.build_scheduler(GUIDE_SCHEDULER, own, ())
    assert (made.config.prediction_type, made.config.steps_offset, made.config.timestep_spacing) == ("v_prediction", 1, "trailing")
    assert (made.config.beta_start, made.config.use_karras_sigmas) == (0.00085, True)


def test_guides_scheduler_and_vae_draw_as_diffusers_with_them(ours, base, tiny_sd1, tmp_path):
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
    from tiny import make_vae

    torch.manual_seed(5)
    make_vae().save_pretrained(tmp_path / "vae")
    got = ours(new_components={"scheduler": GUIDE_SCHEDULER, "vae": {"_target_": "diffusers.AutoencoderKL.from_pretrained", "pretrained_model_name_or_path": str(tmp_path / "vae")}})[0]
    options = {key: value for key, value in GUIDE_SCHEDULER.items() if key != "_target_"}
    want = theirs(base, "a cat", "bad", 3, scheduler=DPMSolverMultistepScheduler.from_config(base.scheduler.config, **options), vae=AutoencoderKL.from_pretrained(tmp_path / "vae"))
    assert np.abs(got - want).max() <= 1


def test_model_folder_of_another_kind_of_vae_is_refused(ours, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4).save_pretrained(tmp_path / "vae")
    block = {"_target_": "diffusers.AutoencoderKL.from_pretrained", "pretrained_model_name_or_path": str(tmp_path / "vae")}
    with pytest.raises(ConfigError, match="3 latent channels"):
        ours(new_components={"vae": block})
    with pytest.raises(ConfigError, match="new_components.vae: any3.0/vae cannot be loaded"):
        ours(new_components={"vae": {**block, "pretrained_model_name_or_path": "any3.0/vae"}})


@pytest.mark.parametrize("value", [None, 3, ["a", "b"], True, {}, ""])
def test_a_place_of_a_part_that_is_no_text_is_named(value):
    specs = {name: {"_target_": f"{kind}.from_pretrained", "pretrained_model_name_or_path": value}
             for name, kind in (("vae", "diffusers.AutoencoderKL"), ("tokenizer", "transformers.CLIPTokenizer"), ("scheduler", "diffusers.DDIMScheduler"))}
    faults = components.check(specs, list(specs), ())
    assert [fault.split(" is ")[0] for fault in faults] == [f"new_components.{name}.pretrained_model_name_or_path = {value!r}" for name in specs]
    assert all("a folder" in fault and "hub id" in fault for fault in faults)


def test_black_or_broken_vae_result_is_decoded_again_in_fp32(base):
    pipe = copy.deepcopy(base)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(3e4)  # overflows fp16; the group norm after it undoes the factor
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    good = pipeline.decode(pipe, latents)
    pipeline.cast(pipe.vae, torch.float16)
    assert not pipeline.vae_decode(pipe.vae, latents).isfinite().all()
    again = pipeline.decode(pipe, latents)
    assert (good.redecoded, again.redecoded) == (False, True) and pipe.vae.dtype == torch.float16
    for a, b in zip(good.images, again.images):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 3  # weights went through fp16


def test_denoiser_that_is_not_finite_is_said_and_nothing_is_drawn(base):
    pipe = copy.deepcopy(base)
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    cond = pipeline.Conditioning(torch.zeros(1, 77, 32))
    with pytest.raises(ConfigError, match="not finite .seed 5.*dtype=fp32"):
        pipeline.sample(pipe, cond, cond, [5], 64, 64, {"num_inference_steps": 1})


def test_offload_of_whole_parts_draws_the_same_picture(base, lora):
    """accelerate's hooks over adapted layers; on a CPU both sides of the move are main memory."""
    from hcpdiff.families.base import Models

    unet, vae = copy.deepcopy(base.unet).eval(), copy.deepcopy(base.vae)
    attach_lora(unet, {path: [(tensors, 1.0)] for path, tensors in lora[1].items()}, "unet")
    pipe = pipeline.assemble(Models(detect_family(), None, "tiny", {"unet": unet, "vae": vae}, {}, {}), base.scheduler)
    pipe.set_progress_bar_config(disable=True)
    cond = pipeline.Conditioning(torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0)))
    want = pipeline.decode(pipe, pipeline.sample(pipe, cond, cond, [1], 64, 64, STEPS)).images[0]
    run.offload(pipe, "model", torch.device("cpu"))
    got = pipeline.decode(pipe, pipeline.sample(pipe, cond, cond, [1], 64, 64, STEPS)).images[0]
    assert np.array_equal(np.asarray(got), np.asarray(want))


def detect_family():
    from hcpdiff.families.sd import StableDiffusion

    return StableDiffusion()


def test_vae_options_and_offload_work_on_a_cpu(ours, plain_picture):
    got = ours(vae_optimize=VaeOptimize(tiling=True, slicing=True), offload=True, dtype="fp32")[0]
    assert np.abs(got - plain_picture).max() <= 1 and "no effect on a CPU" in ours.said


def test_size_is_the_models_own_unless_given(ours, plain_picture):
    assert plain_picture.shape == (64, 64, 3)  # as ours, see above
    assert ours(infer_args={**STEPS, "width": 96, "height": 32})[0].shape == (32, 96, 3)
    with pytest.raises(ConfigError, match="infer_args.width = 70; it must be a multiple of 8: 64 or 72"):
        ours(infer_args={"width": 70})


def test_faults_of_the_second_stage_come_together(ours, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"xx")
    with pytest.raises(ConfigError) as error:
        ours(infer_args={"guidance_scal": 3}, new_components={"sampler": {"_target_": "diffusers.DDIMScheduler"}}, lora_path=str(tmp_path / "bad.safetensors"))
    for part in ("infer_args.guidance_scal", "Did you mean guidance_scale?", "new_components.sampler", "bad.safetensors"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="PNDMScheduler cannot be run with"):
        ours(infer_args={"timesteps": [3, 2, 1]})
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler is for another kind"):
        ours(new_components={"scheduler": {"_target_": "diffusers.FlowMatchEulerDiscreteScheduler"}})
    with pytest.raises(ConfigError, match="trained on 1000 steps"):
        ours(infer_args={"num_inference_steps": 1001})
    with pytest.raises(ConfigError, match="attention = 'xformers': xformers is not installed"):
        ours(attention="xformers")
    with pytest.raises(ConfigError, match="clip_skip = 3; of this text encoder at most 2 layers can be skipped"):
        ours(clip_skip=3)
    with pytest.raises((ConfigError, CheckpointError), match="pretrained_model = "):
        ours(pretrained_model=str(tmp_path / "nothing"))


def test_long_prompt_is_cut_only_when_asked_and_said(ours):
    long = " ".join(["cat"] * 75 + ["red", "dog"])
    whole = ours(prompt=long)[0]
    assert "warning" not in ours.said
    assert np.abs(ours(prompt=long, N_repeats=1)[0] - whole).max() > 1
    assert "2 tokens" in ours.said and "'red dog'" in ours.said


def test_preview_is_the_visualizers_picture_and_leaves_no_trace(tiny_sd1, ours, lora):
    models = detect(tiny_sd1).load(tiny_sd1, "tiny")
    attach_lora(models.unet, {path: [(tensors, 1.0)] for path, tensors in lora[1].items()}, "unet")
    attach_lora(models.text_encoder, {path: [(tensors, 1.0)] for path, tensors in lora[2].items()}, "text_encoder")
    models.unet.train()
    models.unet.down_blocks[0].eval()
    for layer in adapted_layers(models.unet).values():
        layer.adapter.dropout = 0.5
        layer.adapter.requires_grad_(True)
    modes = [m.training for m in models.unet.modules()]
    state, pointers = torch.get_rng_state(), [p.data_ptr() for p in models.unet.parameters()]
    cfg = PreviewConfig(prompts=["a cat", "a {dog:1.3}"], neg_prompt="bad", num_inference_steps=3, guidance_scale=5.0, seed=3, bs=2)
    images = preview.draw_previews(models, models.family, cfg)
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in models.unet.modules()] == modes
    assert [p.data_ptr() for p in models.unet.parameters()] == pointers and all(p.grad is None for p in models.unet.parameters())
    want = ours(prompt="a cat", lora_path=str(lora[0]))[0], ours(prompt="a {dog:1.3}", seed=4, lora_path=str(lora[0]))[0]
    for image, picture in zip(images, want):
        assert np.abs(np.asarray(image).astype(int) - picture).max() <= 1
    cond = preview.encode_preview_prompts(models, cfg)
    models.drop("text_encoder")  # a frozen encoder may be let go before the first preview
    later = preview.draw_previews(models, models.family, cfg, prompts=cond, width=64, height=64)
    assert all(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1 for a, b in zip(images, later))


def test_a_vae_that_does_not_fit_on_the_device_goes_home_whole():
    class Full(torch.nn.Linear):
        moves = 0

        def _apply(self, *args, **keys):
            self.moves += 1
            if self.moves == 1:
                raise torch.OutOfMemoryError("no memory")
            return super()._apply(*args, **keys)

    module = torch.nn.Sequential(torch.nn.Linear(1, 1), Full(1, 1))
    with pytest.raises(torch.OutOfMemoryError), preview.visiting(module, torch.device("cpu")):
        pytest.fail("nothing is drawn")
    assert module[1].moves == 2, "once there and once back"

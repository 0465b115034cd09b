"""Conversion against peft's merged weights and diffusers' loader, exact round trips, and one test for each trap of other people's formats."""

import copy
import json

import pytest
import torch
from lora_help import SD1, SD2, SDXL, random_lora
from real_configs import CLIP_G, CLIP_H, CLIP_L, SD15_UNET, SD21_UNET, SDXL_UNET, kohya_targets, meta_clip, meta_unet
from tiny import make_text_encoder, make_unet

from hcpdiff.checkpoint.convert import cast, distance, faults_of, find_family, join, same_delta, to_webui
from hcpdiff.checkpoint.export import payload_hash, replaceable, write_diffusers, write_ours, write_webui
from hcpdiff.checkpoint.format import load_lora, save_lora
from hcpdiff.checkpoint.io import read_tensors, save_tensors
from hcpdiff.checkpoint.metadata import carried
from hcpdiff.checkpoint.spellings import read_key
from hcpdiff.errors import CheckpointError
from hcpdiff.families.unet_names import text_path
from hcpdiff.lora_tensors import LoraTensors


def lora_for(model, paths, text=False, **options):
    modules = dict(model.named_modules())
    return {text_path(path) if text else path: random_lora(tuple(modules[path].weight.shape), number, **options) for number, path in enumerate(paths)}


def text_targets(model):
    return [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers." in path]


def webui_file(path, layers, family=SD1, version="sd_v1", **options):
    write_webui(path, layers, family, version, name=path.stem, kept={}, **options)
    return read_tensors(path)


# --- against peft ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft_case(tmp_path_factory):
    """A tiny SD1 UNet with peft's LoRA of mixed ranks and alphas on Linear, 1x1 and 3x3 convolutions; peft's file; the deltas of its merged weights."""
    import peft

    base = make_unet("sd1").double()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut", "conv"],
                             rank_pattern={"to_q": 3, "conv1": 5}, alpha_pattern={"proj_in": 7, "conv_shortcut": 1}, init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config)
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    deltas = {name.removesuffix(".weight"): merged[name] - before[name] for name in before if name.endswith(".weight") and not torch.equal(merged[name], before[name])}
    return folder / "adapter_model.safetensors", deltas


def test_deltas_equal_those_of_pefts_merged_weights_before_and_after_conversion(peft_case, tmp_path):
    file, deltas = peft_case
    read = load_lora(file)
    kinds = {len(t.down.shape) + 10 * t.down.shape[-1] for t in read.layers["unet"].values() if t.down.dim() == 4}
    assert kinds == {14, 34} and len({(t.rank, t.alpha) for t in read.layers["unet"].values()}) >= 4  # 1x1 and 3x3, mixed ranks and alphas
    webui_file(tmp_path / "w.safetensors", read.layers)
    for layers in (read.layers, load_lora(tmp_path / "w.safetensors").layers):
        assert set(layers["unet"]) == set(deltas)
        for path, delta in deltas.items():
            assert torch.allclose(layers["unet"][path].delta(torch.float64), delta, atol=1e-9), path


def test_webui_alpha_over_rank_is_the_effective_scale_whatever_the_source_said(peft_case, tmp_path):
    tensors, _ = webui_file(tmp_path / "w.safetensors", load_lora(peft_case[0]).layers)
    for key, alpha in tensors.items():
        if key.endswith(".alpha"):  # the loaders of webui and ComfyUI: alpha / lora_down.shape[0]
            down = tensors[key.replace(".alpha", ".lora_down.weight")]
            expected = {"to_q": 2 / 3, "proj_in": 7 / 4, "conv1": 2 / 5, "conv_shortcut": 1 / 4}
            name = next((name for name in expected if key.removesuffix(".alpha").endswith(name)), None)
            assert float(alpha) / down.shape[0] == pytest.approx(expected.get(name, 2 / 4), rel=1e-6)


# --- exact round trips ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha_dtype", [torch.float32, None])
def test_webui_to_ours_to_webui_is_exact_to_the_byte(tmp_path, dtype, alpha_dtype):
    unet, text = make_unet("sd1"), make_text_encoder()
    layers = {"unet": lora_for(unet, kohya_targets(unet), alpha=0.3, dtype=dtype), "text_encoder": lora_for(text, text_targets(text), True, alpha=1.5, dtype=dtype)}
    original = {key: tensor.to(alpha_dtype or dtype) if key.endswith(".alpha") else tensor for key, tensor in to_webui(layers, SD1).tensors.items()}
    save_tensors(tmp_path / "in.safetensors", original, {"ss_base_model_version": "sd_v1"})
    read = load_lora(tmp_path / "in.safetensors")
    paths = write_ours(tmp_path, read.layers, "sd_v1", name="x", kept={})
    assert [path.name for path in paths] == ["unet-x.safetensors", "text_encoder-x.safetensors"]
    back, _ = webui_file(tmp_path / "out.safetensors", join([(path, load_lora(path)) for path in paths]))
    assert set(back) == set(original) and len(back) == 3 * (192 + 18)
    for key, tensor in original.items():
        assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape and torch.equal(back[key], tensor), key
    assert payload_hash(tmp_path / "out.safetensors") == payload_hash(tmp_path / "in.safetensors")


def test_ours_to_webui_to_ours_is_exact(tmp_path):
    unet = make_unet("sd2")
    save_lora(tmp_path / "unet-1.safetensors", lora_for(unet, kohya_targets(unet), rank=3, alpha=2.0), {"component": "unet"})
    webui_file(tmp_path / "w.safetensors", load_lora(tmp_path / "unet-1.safetensors").layers, SD2, "sd_v2")
    write_ours(tmp_path / "back", load_lora(tmp_path / "w.safetensors").layers, "sd_v2", name="1", kept={})
    before, after = read_tensors(tmp_path / "unet-1.safetensors")[0], read_tensors(tmp_path / "back" / "unet-1.safetensors")[0]
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("family", "version", "unet_config", "clip_config", "counts"), [
    (SD1, "sd_v1", SD15_UNET, CLIP_L, (192, 72)), (SD2, "sd_v2", SD21_UNET, CLIP_H, (192, 138)), (SDXL, "sdxl_base_v1-0", SDXL_UNET, CLIP_L, (722, 72))])
def test_the_kohya_set_of_real_shapes_converts_whole_and_its_family_is_found(tmp_path, family, version, unet_config, clip_config, counts):
    unet, text = meta_unet(unet_config), meta_clip(clip_config)
    layers = {"unet": lora_for(unet, kohya_targets(unet), rank=1, dtype=torch.float16), "text_encoder": lora_for(text, text_targets(text), True, rank=1, dtype=torch.float16)}
    found = find_family(layers, {})
    assert found.family is family and found.version == family.version and "widths" in found.how
    tensors, metadata = webui_file(tmp_path / "w.safetensors", layers, family, version)
    assert len(tensors) == 3 * sum(counts)
    assert metadata["ss_base_model_version"] == version
    again = load_lora(tmp_path / "w.safetensors")
    assert {component: len(named) for component, named in again.layers.items()} == dict(zip(("unet", "text_encoder"), counts, strict=True))
    assert set(again.spelling.split("+")) == ({"webui-ldm", "webui"} if family is SDXL else {"webui"}) and faults_of(again.layers, layers) == []


def test_diffusers_finds_every_layer_of_an_sdxl_file_under_its_own_name():
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers

    unet, texts = meta_unet(SDXL_UNET), (meta_clip(CLIP_L), meta_clip(CLIP_G, projection=True))
    layers = {"unet": lora_for(unet, kohya_targets(unet), rank=1)}
    layers |= {name: lora_for(text, text_targets(text), True, rank=1) for name, text in zip(("text_encoder", "text_encoder_2"), texts, strict=True)}
    mapped = _maybe_map_sgm_blocks_to_diffusers(to_webui(layers, SDXL).tensors, type("Config", (), {"layers_per_block": 2}))
    keys = [read_key(key) for key in _convert_non_diffusers_lora_to_diffusers(mapped)[0]]  # diffusers' old spelling
    found = {component: {key.path for key in keys if key.component == component} for component in layers}
    assert found == {component: set(named) for component, named in layers.items()} and list(map(len, found.values())) == [722, 72, 192]


# --- the traps of formats.md ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [SD1, SD2])
def test_text_encoder_names_carry_text_model_and_never_te1(family):
    text = make_text_encoder()
    assert all(not path.startswith("text_model.") for path in text_targets(text))  # transformers 5: flat
    tensors = to_webui({"text_encoder": lora_for(text, text_targets(text), True)}, family).tensors
    assert tensors and all(key.startswith("lora_te_text_model_encoder_layers_") for key in tensors)


def test_keys_have_one_dot_free_base_and_only_the_three_parts():
    unet = make_unet("sd1")
    tensors = to_webui({"unet": lora_for(unet, kohya_targets(unet))}, SD1).tensors
    assert {key.split(".", 1)[1] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}


@pytest.mark.parametrize("family", [SD1, SD2])
def test_projections_are_4d_where_the_layer_is_a_convolution_and_2d_where_it_is_linear(family):
    path, flat = "mid_block.attentions.0.proj_in", LoraTensors(torch.ones(2, 6), torch.ones(6, 2), 2.0)
    deep = LoraTensors(flat.down[..., None, None], flat.up[..., None, None], 2.0)
    for lora in (flat, deep):
        written = to_webui({"unet": {path: lora}}, family).layers["unet"][path]
        assert written.down.shape[2:] == written.up.shape[2:] == ((1, 1) if family is SD1 else ())


def test_a_kernel_that_the_layer_does_not_have_is_refused():
    with pytest.raises(CheckpointError, match=r"conv_in: factors with a kernel of \(1, 1\)"):
        to_webui({"unet": {"conv_in": random_lora((8, 4, 1, 1), 0)}}, SD1)


def test_sd2_attention_is_completed_with_zero_effect_since_webui_wants_all_four(tmp_path):
    base = "text_model.encoder.layers.0.self_attn"
    layers = {"text_encoder": {f"{base}.q_proj": random_lora((6, 6), 0), f"{base}.v_proj": random_lora((6, 6), 1), "text_model.encoder.layers.0.mlp.fc1": random_lora((12, 6), 2)}}
    lora = write_webui(tmp_path / "w.safetensors", layers, SD2, "sd_v2", name="w", kept={})
    assert lora.completed == [f"text_encoder {base}.k_proj", f"text_encoder {base}.out_proj"]
    after = load_lora(tmp_path / "w.safetensors").layers["text_encoder"]
    assert set(after) == {f"{base}.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")} | {"text_model.encoder.layers.0.mlp.fc1"}
    assert after[f"{base}.k_proj"].delta().shape == (6, 6) and not after[f"{base}.k_proj"].delta().any()
    assert to_webui(layers, SD1).completed == []  # CLIP-L has no fused attention


def test_diffusers_is_given_the_exact_effect_also_of_mixed_alphas_when_folded(tiny_sd1, tmp_path):
    """load_lora_weights of the file itself for equal alphas; for mixed ones its known fault is worked around as formats.md says."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1, torch_dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    x, t, hidden = torch.randn(1, 4, 8, 8, generator=g).double(), torch.tensor([500]), torch.randn(1, 77, 32, generator=g).double()
    ids = torch.randint(0, 1000, (1, 77), generator=g)
    clean = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    for mixed in (False, True):
        alphas = [3.0, 0.5] if mixed else [3.0]
        layers = {"unet": {}, "text_encoder": {}}
        for component, model, paths in (("unet", clean[0], kohya_targets(clean[0])), ("text_encoder", clean[1], text_targets(clean[1]))):
            for number, (path, lora) in enumerate(lora_for(model, paths, component != "unet", scale=0.1).items()):
                layers[component][path] = LoraTensors(lora.down, lora.up, alphas[number % len(alphas)])
        tensors, _ = webui_file(tmp_path / "w.safetensors", layers)
        unet, text = (merged_by_hand(model, layers[component]) for model, component in zip(copy.deepcopy(clean), layers, strict=True))
        pipe.load_lora_weights(folded(tensors) if mixed else str(tmp_path / "w.safetensors"))
        with torch.no_grad():
            for got, expected, before in ((pipe.unet(x, t, hidden)[0], unet(x, t, hidden)[0], clean[0](x, t, hidden)[0]),
                                          (pipe.text_encoder(ids)[0], text(ids)[0], clean[1](ids)[0])):
                effect = (expected - before).abs().max()
                assert effect > 1e-2 and (got - expected).abs().max() < 1e-4 * effect
        pipe.unload_lora_weights()


def merged_by_hand(model, layers):
    modules = dict(model.named_modules())
    for path, lora in layers.items():
        weight = modules[path if path in modules else path.removeprefix("text_model.")].weight
        weight.data += lora.delta().reshape(weight.shape)
    return model


def folded(tensors):
    """sqrt(alpha / rank) into both factors, alpha dropped."""
    state = {}
    for key in tensors:
        if key.endswith(".alpha"):
            base = key.removesuffix(".alpha")
            root = (tensors[key] / tensors[f"{base}.lora_down.weight"].shape[0]).sqrt()
            state.update({f"{base}.lora_{part}.weight": tensors[f"{base}.lora_{part}.weight"] * root for part in ("down", "up")})
    return state


def test_the_ancestors_alpha_is_multiplied_by_rank(tmp_path):
    path, rank, stored = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 4, 0.125
    lora = random_lora((6, 6), 0, rank=rank)
    save_tensors(tmp_path / "unet-1.safetensors", {f"lora:{path}.___.layer.W_down": lora.down, f"lora:{path}.___.layer.W_up": lora.up,
                                                   f"lora:{path}.___.alpha": torch.tensor(stored)}, {})
    tensors, _ = webui_file(tmp_path / "w.safetensors", load_lora(tmp_path / "unet-1.safetensors").layers)
    base = f"lora_unet_{path.replace('.', '_')}"
    assert float(tensors[f"{base}.alpha"]) == stored * rank
    delta = float(tensors[f"{base}.alpha"]) / rank * tensors[f"{base}.lora_up.weight"] @ tensors[f"{base}.lora_down.weight"]
    assert torch.allclose(delta, stored * lora.up @ lora.down, atol=1e-7)


# --- metadata -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "version", "architecture", "v2"), [
    (SD1, "sd_v1", "stable-diffusion-v1/lora", "False"), (SD2, "sd_v2", "stable-diffusion-v2-512/lora", "True"),
    (SD2, "sd_v2_v", "stable-diffusion-v2-768-v/lora", "True"), (SDXL, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "False")])
def test_metadata_is_what_webui_reads(tmp_path, family, version, architecture, v2):
    layers = {"unet": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": random_lora((6, 6), 0, rank=3, alpha=1.5)}}
    write_webui(tmp_path / "w.safetensors", layers, family, version, name="my lora", kept={"hcpdiff.step": "70", "hcpdiff.base_model": "/home/me/models/base"})
    metadata = read_tensors(tmp_path / "w.safetensors")[1]
    expected = {"ss_base_model_version": version, "ss_v2": v2, "modelspec.architecture": architecture, "ss_output_name": "my lora", "ss_network_module": "networks.lora",
                "ss_network_dim": "3", "ss_network_alpha": "1.5", "ss_steps": "70", "ss_sd_model_name": "base",
                "modelspec.prediction_type": {"sd_v2_v": "v", "sdxl_base_v1-0": None}.get(version, "epsilon"), "sshs_model_hash": payload_hash(tmp_path / "w.safetensors")}
    assert {key: metadata.get(key) for key in expected} == expected  # of an SDXL file that does not say what its model predicts, nothing is made up
    assert "/home" not in json.dumps(metadata)


def test_hashes_are_never_copied_and_captions_folders_and_paths_stay_behind():
    source = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "1", "modelspec.hash_sha256": "0x1", "ss_tag_frequency": '{"me": {"cat": 3}}', "ss_dataset_dirs": '{"me": {}}',
              "ss_sd_model_name": "C:\\models\\x.safetensors", "ss_vae_name": "/data/vae.pt", "ss_output_name": "x", "ss_training_comment": "a/b ratio, and/or",
              "hcpdiff.step": "7", "hcpdiff.settings": '{"layers": ["re:.*\\\\.attn"]}', "hcpdiff.format": "1", "modelspec.author": "me", "ss_sd_model_hash": "abc", "modelspec.description": "see https://example.org/a/b", "format": "pt", "lora_adapter_metadata": "{}"}
    kept, dropped = carried(source)
    assert set(kept) == {"hcpdiff.step", "ss_output_name", "ss_training_comment", "modelspec.author", "ss_sd_model_hash", "modelspec.description"}
    assert set(dropped) == {"ss_tag_frequency", "ss_dataset_dirs", "ss_sd_model_name", "ss_vae_name"}
    assert set(carried(source, keep_all=True)[0]) == set(kept) | set(dropped)


# --- family, dtype, self-check --------------------------------------------------------------------------------------------------------------


def one(path, shape=(6, 6), component="unet"):
    return {component: {path: random_lora(shape, 0)}}


@pytest.mark.parametrize(("layers", "metadata", "name"), [
    (one("down_blocks.0.attentions.0.proj_in", (6, 6, 1, 1)), {}, "sd1"), (one("down_blocks.0.attentions.0.proj_in"), {}, "sd2"),
    (one("mid_block.attentions.0.transformer_blocks.9.ff.net.2"), {}, "sdxl"), (one("text_model.encoder.layers.0.mlp.fc1", component="text_encoder_2"), {}, "sdxl"),
    (one("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", (6, 1024)), {}, "sd2"),
    (one("mid_block.attentions.0.transformer_blocks.0.attn1.to_k"), {"ss_base_model_version": "sd_v2_v"}, "sd2"),
    (one("mid_block.attentions.0.transformer_blocks.0.attn1.to_k"), {"hcpdiff.base_version": "sdxl_base_v1-0"}, "sdxl")])
def test_the_family_is_found_from_names_shapes_and_metadata(layers, metadata, name):
    found = find_family(layers, metadata)
    assert found.family.name == name and not found.open and (found.version or found.family.version_stem).startswith(found.family.version_stem)


def test_widths_are_believed_before_metadata():
    found = find_family(one("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", (6, 1024)), {"ss_base_model_version": "sd_v1"})
    assert found.family is SD2 and found.version is None and "widths" in found.how


@pytest.mark.parametrize(("metadata", "version", "predicts"), [
    ({}, None, None), ({"ss_v2": "True"}, None, None), ({"modelspec.prediction_type": "v"}, "sd_v2_v", "v"), ({"hcpdiff.prediction_type": "epsilon"}, "sd_v2", "epsilon"),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd_v2_v", "v"), ({"ss_base_model_version": "sd_v2"}, "sd_v2", "epsilon")])
def test_an_sd2_file_says_what_its_base_predicts_only_where_that_is_known_and_stays_sd2(tmp_path, metadata, version, predicts):
    """webui files it under SD2 by ss_v2 alone."""
    layers = one("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")  # SD1's and SDXL's too
    found = find_family(layers, metadata, told="sd2")
    assert found.version == version and str(found).startswith(f"Stable Diffusion 2.x ({version})" if version else "Stable Diffusion 2.x, as told")
    write_webui(tmp_path / "w.safetensors", layers, SD2, found.version, name="w", kept=metadata | {"modelspec.author": "me"})
    write_diffusers(tmp_path / "d.safetensors", layers, SD2, found.version, name="d", kept=metadata)
    for name in "wd":
        said = read_tensors(tmp_path / f"{name}.safetensors")[1]
        assert said.get("modelspec.architecture") == (SD2.versions[version] if version else None) and said["ss_v2"] == "True"
        again = find_family(load_lora(tmp_path / f"{name}.safetensors").layers, said)
        assert again.family is SD2 and again.version == version and not again.open
    said = read_tensors(tmp_path / "w.safetensors")[1]
    assert said.get("ss_base_model_version") == version and said.get("modelspec.prediction_type") == predicts and said["modelspec.author"] == "me"


def test_what_is_open_or_contradicts_itself_is_said():
    open_ones = one("mid_block.attentions.0.transformer_blocks.0.attn1.to_k")
    assert find_family(open_ones, {}).open and "--family" in find_family(open_ones, {}).how
    assert find_family(open_ones, {}, told="sd2").version is None and find_family(open_ones, {}, told="sd1").version == "sd_v1"
    with pytest.raises(CheckpointError, match="Stable Diffusion XL was asked for, but .* of Stable Diffusion 1.x"):
        find_family(one("down_blocks.0.attentions.0.proj_in", (6, 6, 1, 1)), {}, told="sdxl")
    with pytest.raises(CheckpointError, match="1 of 1 layers have names that .* unet transformer.h.0"):
        find_family(one("transformer.h.0"), {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stored_dtype_keeps_the_delta_within_its_rounding(tmp_path, dtype):
    layers = one("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", (64, 64))
    tensors, _ = webui_file(tmp_path / "w.safetensors", layers, dtype=dtype)
    assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {dtype}
    assert faults_of(load_lora(tmp_path / "w.safetensors").layers, layers, dtype) == [] != faults_of(load_lora(tmp_path / "w.safetensors").layers, layers)


def test_values_that_a_dtype_cannot_hold_stop_the_conversion(tmp_path):
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.raises(CheckpointError, match="more than torch.float16 can hold"):
        webui_file(tmp_path / "w.safetensors", {"unet": {path: LoraTensors(torch.full((1, 4), 1e6), torch.full((4, 1), 1e6), 1.0)}}, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="weight delta changed"):  # underflow
        webui_file(tmp_path / "w.safetensors", {"unet": {path: LoraTensors(torch.full((1, 4), 1e-9), torch.full((4, 1), 1e-9), 1.0)}}, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("down", "up"), [(0.1, 1e-6), (1e-7, 1.0), (1e6, 1e-3), (1e-3, 3e5), (0.1, 0.1)])
def test_fp16_has_room_for_factors_of_unlike_size(tmp_path, down, up):
    lora = random_lora((64, 64), 0)
    lora = LoraTensors(lora.down * 10 * down, lora.up * 10 * up, 1.0)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    webui_file(tmp_path / "w.safetensors", {"unet": {path: lora}}, dtype=torch.float16)
    after = load_lora(tmp_path / "w.safetensors").layers["unet"][path]
    assert after.up.dtype == torch.float16 and after.alpha == 1.0 and distance(lora, after) < 2.0**-11
    if down == up:  # nothing is moved where nothing has to be
        assert torch.equal(after.down, lora.down.half()) and torch.equal(after.up, lora.up.half())


def test_the_self_check_sees_a_changed_scale_a_lost_layer_and_a_foreign_name(tmp_path, monkeypatch):
    from hcpdiff.checkpoint import export

    layers = {"unet": {f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{n}": random_lora((6, 6), i) for i, n in enumerate("qk")}}
    whole = to_webui(layers, SD1)
    key = next(iter(whole.tensors)).split(".")[0]
    damages = {"weight delta changed": {**whole.tensors, f"{key}.alpha": torch.tensor(9.0)},
               "is missing": {k: t for k, t in whole.tensors.items() if not k.startswith(f"{key}.")},
               "no name that webui knows": {k.replace("mid_block_attentions_0", "middle_block_1"): t for k, t in whole.tensors.items()}}
    for words, tensors in damages.items():
        monkeypatch.setattr(export, "to_webui", lambda *_, tensors=tensors: type(whole)(tensors, whole.layers))
        with pytest.raises(CheckpointError, match=f"w.safetensors is not written, .*{words}"):
            write_webui(tmp_path / "w.safetensors", layers, SD1, "sd_v1", name="w", kept={})
    assert list(tmp_path.iterdir()) == []


def test_distance_is_that_of_the_dense_deltas():
    a, b = random_lora((7, 5, 3, 3), 0, rank=3, alpha=2.0), random_lora((7, 5, 3, 3), 1, rank=2, alpha=5.0)
    dense = (a.delta(torch.float64) - b.delta(torch.float64)).norm() / a.delta(torch.float64).norm()
    assert distance(a, b) == pytest.approx(float(dense), rel=1e-9)
    for near in (cast(a, torch.bfloat16), LoraTensors(a.down, a.up * 1.001, a.alpha), LoraTensors(a.down, a.up, a.alpha * 1.05)):  # by the faster way
        dense = (near.delta(torch.float64) - a.delta(torch.float64)).norm() / a.delta(torch.float64).norm()
        assert distance(a, near) == pytest.approx(float(dense), rel=1e-7)
    assert distance(a, a) < 1e-14 and same_delta(a, cast(a, torch.float64)) and not same_delta(a, b) and distance(a, random_lora((7, 6, 3, 3), 0)) == float("inf")


def test_parts_that_hold_the_same_layer_are_not_put_together(tmp_path):
    save_lora(tmp_path / "unet-1.safetensors", one("conv_in", (6, 4, 3, 3))["unet"], {"component": "unet"})
    file = load_lora(tmp_path / "unet-1.safetensors")
    with pytest.raises(CheckpointError, match="both hold 1 layers"):
        join([(tmp_path / "a", file), (tmp_path / "b", file)])


def test_only_what_the_converter_made_is_replaceable(tmp_path):
    webui_file(tmp_path / "made.safetensors", one("conv_in", (6, 4, 3, 3)))
    save_tensors(tmp_path / "other.safetensors", {"x": torch.ones(1)}, {})
    (tmp_path / "text").write_text("x", encoding="utf-8")
    assert [replaceable(tmp_path / name) for name in ("made.safetensors", "nothing", "other.safetensors", "text")] == [True, True, False, False]

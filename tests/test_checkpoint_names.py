"""The enumerated names against the released architectures, built from their public configs on the meta device."""

import pytest
import torch
from real_configs import (CLIP_G, CLIP_H, CLIP_L, SD15_UNET, SD21_UNET, SDXL_UNET, kohya_targets, layers_with_weights, locon_targets, meta_clip,
                          meta_unet)

from hcpdiff.families.unet_names import ANY, SD1, SD2, SDXL, clip_modules, clip_path, text_path, unet_modules, unet_path
from hcpdiff.families.webui import BY_NAME, TEXT, TEXT_2, UNET

CASES = {"sd1": (SD1, SD15_UNET, 192), "sd2": (SD2, SD21_UNET, 192), "sdxl": (SDXL, SDXL_UNET, 722)}


@pytest.fixture(scope="module")
def unets():
    return {name: meta_unet(config) for name, (_, config, _) in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_table_has_exactly_the_layers_of_the_real_unet(unets, name):
    table, real = unet_modules(CASES[name][0]), layers_with_weights(unets[name])
    assert set(table) == set(real)
    for path, module in table.items():
        weight = real[path].weight
        assert {"linear": weight.dim() == 2, "conv1": weight.shape[2:] == (1, 1), "conv3": weight.shape[2:] == (3, 3), "norm": weight.dim() == 1}[module.kind], path


@pytest.mark.parametrize("name", CASES)
def test_every_name_resolves_to_one_module_in_both_spellings(name):
    table = unet_modules(CASES[name][0])
    assert len({module.ldm for module in table.values()}) == len(table)
    for path, module in table.items():
        assert unet_path(path.replace(".", "_")) == path
        assert unet_path(module.ldm.replace(".", "_")) == path


def test_no_two_modules_of_any_family_share_a_name():
    names = [path.replace(".", "_") for path in unet_modules(ANY)] + [module.ldm.replace(".", "_") for module in unet_modules(ANY).values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", CASES)
def test_ldm_names_are_those_that_diffusers_reads_from_original_checkpoints(unets, name):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    table, real = unet_modules(CASES[name][0]), layers_with_weights(unets[name])
    original, expected = {}, {}
    for number, (path, module) in enumerate(table.items()):
        for part, _ in real[path].named_parameters(recurse=False):
            original[f"model.diffusion_model.{module.ldm}.{part}"] = torch.tensor([float(number)])
            expected[f"{path}.{part}"] = float(number)
    converted = convert_ldm_unet_checkpoint(original, dict(unets[name].config) | {"layers_per_block": 2})
    assert {key: float(value) for key, value in converted.items()} == expected


@pytest.mark.parametrize("name", CASES)
def test_kohya_target_sets_have_the_known_counts(unets, name):
    family, count = BY_NAME[name], CASES[name][2]
    bases = [family.webui_base(UNET, path) for path in kohya_targets(unets[name])]
    assert len(set(bases)) == len(bases) == count
    assert None not in bases and all(base.startswith("lora_unet_") and "." not in base for base in bases)


def test_locon_adds_86_modules_on_sd1(unets):
    bases = [BY_NAME["sd1"].webui_base(UNET, path) for path in locon_targets(unets["sd1"])]
    assert len(set(bases)) == 86 and None not in bases


def test_sdxl_is_written_with_ldm_names_and_sd1_with_diffusers_names():
    assert BY_NAME["sdxl"].webui_base(UNET, "up_blocks.0.upsamplers.0.conv") == "lora_unet_output_blocks_2_2_conv"
    assert BY_NAME["sdxl"].webui_base(UNET, "add_embedding.linear_2") == "lora_unet_label_emb_0_2"
    assert BY_NAME["sdxl"].webui_base(UNET, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k") \
        == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"
    assert BY_NAME["sd1"].webui_base(UNET, "up_blocks.0.upsamplers.0.conv") == "lora_unet_up_blocks_0_upsamplers_0_conv"


def test_ldm_upsamplers_stand_after_the_attention_where_there_is_one():
    def ldm(plan):
        return [module.ldm for path, module in unet_modules(plan).items() if ".upsamplers." in path]

    assert ldm(SD1) == ldm(SD2) == ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"]
    assert ldm(SDXL) == ["output_blocks.2.2.conv", "output_blocks.5.2.conv"]


def test_ldm_upsamplers_are_found_with_and_without_attention():
    assert unet_path("output_blocks_2_1_conv") == unet_path("output_blocks_2_2_conv") == "up_blocks.0.upsamplers.0.conv"


@pytest.mark.parametrize(("name", "component", "config", "projection", "count"), [
    ("sd1", TEXT, CLIP_L, False, 72), ("sd2", TEXT, CLIP_H, False, 138), ("sdxl", TEXT, CLIP_L, False, 72), ("sdxl", TEXT_2, CLIP_G, True, 192)])
def test_text_encoders_have_the_known_counts_and_always_text_model(name, component, config, projection, count):
    model = meta_clip(config, projection)
    targets = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." in path]
    paths = [text_path(path) for path in targets]
    assert sorted(paths) == sorted(clip_modules(config["num_hidden_layers"]))
    bases = {BY_NAME[name].webui_base(component, path) for path in paths}
    prefix = {"sd1": "lora_te", "sd2": "lora_te"}.get(name, {TEXT: "lora_te1", TEXT_2: "lora_te2"}[component])
    assert len(bases) == count and all(base.startswith(f"{prefix}_text_model_encoder_layers_") for base in bases)
    assert [clip_path(base.removeprefix(f"{prefix}_")) for base in sorted(bases)] == [
        path for _, path in sorted((BY_NAME[name].webui_base(component, path), path) for path in paths)]


def test_what_no_model_has_is_not_found():
    assert unet_path("down_blocks_0_attentions_7_proj_in") is None
    assert clip_path("text_model_encoder_layers_0_self_attn_z_proj") is None
    assert BY_NAME["sd1"].webui_base(UNET, "conv_norm_out") is None and BY_NAME["sd1"].webui_base(TEXT_2, "text_model.encoder.layers.0.mlp.fc1") is None


def test_the_tables_need_nothing_and_are_all_that_checkpoints_take_from_families():
    import re
    from pathlib import Path

    root = Path(__file__).parents[1] / "hcpdiff"
    taken = set()
    for path in sorted((root / "checkpoint").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        taken |= set(re.findall(r"from \.\.families\.(\w+) import", text)) | set(re.findall(r"from \.\.families import (.+)", text))
    assert taken == {"file_kind", "unet_names", "webui"}
    for name in (*taken, "ldm_names"):
        imported = re.findall(r"^(?:from|import) (\S+)", (root / "families" / f"{name}.py").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(imported) <= {"re", "collections.abc", "dataclasses", "functools", "typing", ".unet_names", ".ldm_names"}, imported

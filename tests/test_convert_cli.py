"""lora_convert as users run it: the guide's command, both directions, and one clear message with exit code 2 for each mistake."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hcpdiff import cli
from hcpdiff.checkpoint.format import load_lora, save_lora
from hcpdiff.checkpoint.io import read_tensors, save_tensors
from hcpdiff.families.unet_names import SD1, clip_modules, unet_modules
from hcpdiff.lora_tensors import LoraTensors
from hcpdiff.tools import lora_convert


ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def convert(*args, cwd):
    """(exit code, stdout, stderr) of the command in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "hcpdiff.tools.lora_convert", *map(str, args)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def here(monkeypatch, capsys):
    """The same without a new process (each loads torch for seconds)."""

    def call(*args, cwd):
        monkeypatch.chdir(cwd)
        with pytest.raises(SystemExit) as caught:
            cli.run(lora_convert.main, lora_convert.parser, list(map(str, args)))
        return caught.value.code, *capsys.readouterr()

    return call


def some_lora(paths, alpha=2.0):
    g = torch.Generator().manual_seed(0)
    return {path: LoraTensors(torch.randn(4, 768, generator=g), torch.randn(768, 4, generator=g), alpha) for path in paths}


@pytest.fixture
def run(tmp_path):
    """A run folder with two steps, the newer with a text encoder."""
    unet = [path for path in unet_modules(SD1) if path.endswith((".to_k", ".to_v"))]
    for step in (100, 200):
        save_lora(tmp_path / f"run/ckpts/unet-{step}.safetensors", some_lora(unet), {"component": "unet", "step": str(step), "base_version": "sd_v1"})
    save_lora(tmp_path / "run/ckpts/text_encoder-200.safetensors", some_lora(clip_modules(12)), {"component": "text_encoder", "step": "200", "base_version": "sd_v1"})
    return tmp_path


def fails(result, *words):
    code, out, err = result
    assert code == 2 and "Traceback" not in err and err.startswith("error: "), err
    for word in words:
        assert word in err, err


def test_the_guides_command_works_with_and_without_auto_scale_alpha_and_twice(run, here):
    args = ["--to_webui", "--lora_path", "run/ckpts/unet-200.safetensors", "--lora_path_TE", "run/ckpts/text_encoder-200.safetensors", "--dump_path", "new/lora-200.safetensors"]
    code, out, err = convert(*args, "--auto_scale_alpha", cwd=run)
    assert code == 0, err
    first = (run / "new/lora-200.safetensors").read_bytes()
    code, out, err = here(*args, cwd=run)
    assert code == 0 and (run / "new/lora-200.safetensors").read_bytes() == first
    assert "sd_v1" in out and "checked by reading it back: 136 of 136 layers" in out and "warning" not in out
    tensors, metadata = read_tensors(run / "new/lora-200.safetensors")
    assert len(tensors) == 3 * 136 and metadata["ss_output_name"] == "lora-200" and metadata["ss_base_model_version"] == "sd_v1"
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {2.0}


def test_a_run_folder_stands_for_its_newest_step_and_comes_back_whole(run, here):
    code, out, err = here("--to_webui", "--lora_path", "run", "--dump_path", "out/", "--name", "cat", cwd=run)
    assert code == 0 and "step 200" in out, err
    code, out, err = here("--from_webui", "--lora_path", "out/cat.safetensors", "--dump_path", "back", "--name", "200", cwd=run)
    assert code == 0, err
    for stem in ("unet", "text_encoder"):
        before, after = (read_tensors(run / folder / f"{stem}-200.safetensors")[0] for folder in ("run/ckpts", "back"))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_runs_converted_into_one_folder_keep_their_names_and_replace_only_themselves(run, here):
    (run / "cat/ckpts").mkdir(parents=True)
    save_lora(run / "cat/ckpts/unet-200.safetensors", some_lora(["mid_block.attentions.0.transformer_blocks.0.attn1.to_k"]), {"component": "unet", "base_version": "sd_v1"})
    for source in ("run", "cat", "cat/ckpts/unet-200.safetensors"):
        assert here("--to_webui", "--lora_path", source, "--dump_path", "out/", cwd=run)[0] == 0
    assert sorted(path.name for path in (run / "out").iterdir()) == ["cat-200.safetensors", "run-200.safetensors"]
    before = (run / "out/run-200.safetensors").read_bytes()
    for way, made in (("--to_webui", "out/run-200.safetensors"), ("--to_diffusers", "d/x.safetensors"), ("--to_peft", "p/unet/adapter_model.safetensors")):
        target = ["--dump_path", made.removesuffix("/unet/adapter_model.safetensors")]
        assert here(way, "--lora_path", "run", *target, cwd=run)[0] == 0
        fails(here(way, "--lora_path", "cat", *target, cwd=run), f"{made} exists and was made from another LoRA; --overwrite replaces it.")
    assert (run / "out/run-200.safetensors").read_bytes() == before
    assert here("--from_webui", "--lora_path", "out/cat-200.safetensors", "--dump_path", "own", "--name", "x", cwd=run)[0] == 0
    fails(here("--from_webui", "--lora_path", "out/run-200.safetensors", "--dump_path", "own", "--name", "x", cwd=run), "own/unet-x.safetensors exists and was made from another LoRA")


def test_what_comes_of_pefts_folder_has_the_folders_name(run, here):
    assert here("--to_peft", "--lora_path", "run", "--dump_path", "for_peft", cwd=run)[0] == 0
    for source in ("for_peft", "for_peft/unet"):
        code, _, err = here("--from_webui", "--lora_path", source, "--dump_path", f"back/{source}", cwd=run)
        assert code == 0, err
    assert sorted(path.relative_to(run / "back").as_posix() for path in (run / "back").rglob("*.safetensors")) == [
        "for_peft/text_encoder-for_peft.safetensors", "for_peft/unet-for_peft.safetensors", "for_peft/unet/unet-for_peft.safetensors"]


def test_a_text_encoder_that_lies_beside_is_named(run, here):
    code, out, _ = here("--to_webui", "--lora_path", "run/ckpts/unet-200.safetensors", "--dump_path", "a", "--save_dtype", "bf16", "--metadata", "modelspec.author=me", cwd=run)
    assert code == 0 and "warning: run/ckpts/text_encoder-200.safetensors lies beside" in out and "a is taken for a.safetensors" in out
    tensors, metadata = read_tensors(run / "a.safetensors")
    assert metadata["modelspec.author"] == "me" and tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.lora_up.weight"].dtype == torch.bfloat16


def test_mistakes_of_the_command_line(run):
    unet = "run/ckpts/unet-100.safetensors"
    fails(convert("--to_webui", "--from_webui", cwd=run), "3 faults", "which way? --to_webui and --from_webui were given", "--lora_path is missing", "--dump_path is missing")
    fails(convert("--to_webui", "--lora_path", unet, " ", cwd=run), "stray argument ' '", "comment after a '\\'")
    fails(convert("--to_webui", "--lora_path", unet, "#", "unet", cwd=run), "stray argument '#'")
    fails(convert("--to_webui", "--lora_path", unet, "--dump_pth", "x", cwd=run), "--dump_pth", "Did you mean --dump_path?")
    fails(convert("--to_webui", "--lora_path", "run/ckpts/unet-300.safetensors", "--lora_path_TE", "te.safetensors", "--dump_path", "x", cwd=run),
          "--lora_path: run/ckpts/unet-300.safetensors does not exist. Nearest", "unet-100.safetensors", "--lora_path_TE: te.safetensors does not exist")
    assert sorted(path.name for path in run.iterdir()) == ["run"]


def test_mistakes_about_files(run, here):
    unet, raw = "run/ckpts/unet-100.safetensors", (run / "run/ckpts/unet-100.safetensors").read_bytes()
    (run / "cut.safetensors").write_bytes(raw[: len(raw) // 2])
    save_tensors(run / "model.safetensors", {"model.diffusion_model.out.2.weight": torch.ones(2, 2)}, {})
    before = sorted(run.rglob("*"))
    fails(convert("--to_webui", "--lora_path", "cut.safetensors", "--dump_path", "x.safetensors", cwd=run), "cut.safetensors is cut short")
    fails(convert("--to_webui", "--lora_path", "model.safetensors", "--dump_path", "x.safetensors", cwd=run), "model.safetensors is a whole model (Stable Diffusion 1.x), not a LoRA: name it as the base model")
    fails(convert("--to_webui", "--lora_path", unet, "--dump_path", f"{unet}/x.safetensors", cwd=run), "cannot be written", "is a file, not a folder")
    fails(here("--to_webui", "--lora_path", unet, "--dump_path", unet, "--overwrite", cwd=run), "is the file that is read")
    fails(here("--to_webui", "--lora_path", unet, "--dump_path", "model.safetensors", cwd=run), "model.safetensors exists", "--overwrite")
    fails(here("--to_webui", "--lora_path", unet, "--lora_path_TE", "run/ckpts/unet-200.safetensors", "--dump_path", "x.safetensors", cwd=run), "layers of the UNet")
    fails(here("--to_webui", "--lora_path", unet, "--dump_path", "x.safetensors", "--sdxl", cwd=run), "Stable Diffusion XL was asked for")
    fails(here("--from_webui", "--lora_path", unet, "--dump_path", "x.safetensors", cwd=run), "this is a folder")
    fails(here("--from_webui", "--lora_path", unet, "--dump_path", "x", cwd=run), "already a file of hcpdiff")
    assert sorted(run.rglob("*")) == before and (run / unet).read_bytes() == raw


def test_an_old_file_of_the_ancestor_is_exported_by_the_guides_command(tmp_path, here):
    path, lora = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", LoraTensors(torch.randn(4, 768), torch.randn(1280, 4), 1.0)
    save_tensors(tmp_path / "unet-9.safetensors", {f"lora:{path}.___.layer.W_down": lora.down, f"lora:{path}.___.layer.W_up": lora.up, f"lora:{path}.___.alpha": torch.tensor(0.5)}, {})
    code, out, err = here("--to_webui", "--lora_path", "unet-9.safetensors", "--dump_path", "w.safetensors", "--auto_scale_alpha", cwd=tmp_path)
    assert code == 0 and "ancestor" in out, err
    assert load_lora(tmp_path / "w.safetensors").layers["unet"][path].scale == 0.5
    assert float(read_tensors(tmp_path / "w.safetensors")[0][f"lora_unet_{path.replace('.', '_')}.alpha"]) == 2.0


def test_overwrite_replaces_a_foreign_file_when_told(run, here):
    save_tensors(run / "old.safetensors", {"x": torch.ones(1)}, {})
    code, _, err = here("--to_webui", "--lora_path", "run", "--dump_path", "old.safetensors", "--overwrite", cwd=run)
    assert code == 0 and load_lora(run / "old.safetensors").count == 136, err


def test_the_converter_needs_neither_diffusers_nor_transformers_and_help_needs_no_torch(run):
    code = ("import sys\nfrom hcpdiff.tools import lora_convert\nassert 'torch' not in sys.modules\n"
            "lora_convert.main(lora_convert.cli.parse(lora_convert.parser(), ['--to_webui', '--lora_path', 'run', '--dump_path', 'w.safetensors']))\n"
            "print([name for name in ('diffusers', 'transformers', 'accelerate', 'peft') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=run, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    start = time.monotonic()
    assert convert("--help", cwd=run)[0] == 0 and time.monotonic() - start < 1.5


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_guide_to_conversion_names_every_option_and_no_other(language):
    text = (Path(__file__).parents[1] / f"docs/{language}/user_guides/convert.md").read_text(encoding="utf-8")
    options = {flag for action in lora_convert.parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert set(re.findall(r"--[a-zA-Z_]+", text)) == options - {"--help", "--debug"}

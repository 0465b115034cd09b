"""Weights are asked for before anything large is imported: which files, and that they are in the system's cache afterwards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_memory import sharded

from hcpdiff import train_ac_single, visualizer
from hcpdiff.families.ahead import _ask, read_ahead, weights_ahead


ROOT = Path(__file__).parents[1]


def names(files, base) -> list[str]:
    return [str(file.relative_to(base)) for file in files]


def test_the_files_of_a_model_in_the_order_of_their_use(tiny_sd1, tiny_sdxl, tmp_path):
    assert names(weights_ahead(str(tiny_sd1)), tiny_sd1) == ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert [file.parent.name for file in weights_ahead(str(tiny_sdxl))] == ["text_encoder", "text_encoder_2", "unet", "vae"]
    model = shutil.copytree(tiny_sd1, tmp_path / "model")
    (model / "text_encoder" / "model.safetensors").rename(model / "text_encoder" / "model.fp16.safetensors")
    sharded(model)
    (tmp_path / "other.safetensors").write_bytes(b"x")
    found = names(weights_ahead(str(model), vae=str(tmp_path / "other.safetensors"), variant="fp16"), tmp_path)
    assert found == ["model/text_encoder/model.fp16.safetensors", "other.safetensors"], "the UNet has no such variant: the library decides"
    found = names(weights_ahead(str(model)), model)
    assert found == [*(f"unet/diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)), "vae/diffusion_pytorch_model.safetensors"]
    assert weights_ahead(str(tmp_path / "other.safetensors")) == [tmp_path / "other.safetensors"]


@pytest.mark.parametrize("what", ["nothing", "broken index", "a file as part"])
def test_what_is_wrong_is_left_to_who_reads(tiny_sd1, tmp_path, what):
    model = tmp_path / "model"
    if what == "broken index":
        shutil.copytree(tiny_sd1, model)
        (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../x"}}))
    elif what == "a file as part":
        model.mkdir()
        (model / "unet").write_text("x")
    assert weights_ahead(str(model)) == []
    _ask([tmp_path / "none", tmp_path])


def test_a_hub_id_is_found_in_the_hubs_cache(tiny_sd1, tmp_path):
    """In a process of its own: where the cache lies is read from the environment once. Neither torch nor the libraries are imported for it."""
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(tiny_sd1, repository / "snapshots" / "abc")
    code = ("import sys; from hcpdiff.families.ahead import weights_ahead; "
            "print([len(weights_ahead(name, revision=revision)) for name, revision in "
            "(('stable-diffusion-v1-5/stable-diffusion-v1-5', None), ('runwayml/stable-diffusion-v1-5', 'main'), ('a/b', None), ('stable-diffusion-v1-5/stable-diffusion-v1-5', 'no'))],"
            "sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}, check=True)
    assert done.stdout.strip() == "[3, 3, 0, 0] []"


def in_cache(file) -> list[bool]:
    """Of each MiB, whether its first byte is in memory."""
    found = []
    with open(file, "rb", buffering=0) as opened:
        for start in range(0, os.fstat(opened.fileno()).st_size, 1 << 20):
            try:
                os.preadv(opened.fileno(), [bytearray(1)], start, os.RWF_NOWAIT)
                found.append(True)
            except BlockingIOError:
                found.append(False)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is in its cache")
def test_what_lies_on_the_disk_is_in_memory_afterwards(tmp_path):
    file = tmp_path / "weights"
    with open(file, "wb") as opened:
        opened.write(os.urandom(1 << 20) * 100)
        opened.flush()
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if all(in_cache(file)):
        pytest.skip("this file system is in memory")
    assert not any(in_cache(file)[40:60])
    read_ahead([tmp_path / "gone", file]).join()
    assert all(in_cache(file)[:-16]) and len(in_cache(file)) == 100


@pytest.mark.parametrize("program, words", [
    (train_ac_single, ["--cfg", str(ROOT / "cfgs/train/examples/lora_conventional.yaml"), "model.pretrained_model_name_or_path={model}", "data.dataset1.source.data_source1.img_root=images",
                       "data.dataset1.source.data_source1.caption_file=null"]),
    (visualizer, ["--cfg", str(ROOT / "cfgs/infer/text2img.yaml"), "pretrained_model={model}"])])
def test_both_commands_ask_before_they_import(program, words, tiny_sd1, tmp_path, monkeypatch):
    class Asked(BaseException):
        """With the files; it ends the command."""

    def ask(files):
        raise Asked(files)

    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hcpdiff.families.ahead.read_ahead", ask)
    with pytest.raises(Asked) as caught:
        program.main(program.parser().parse_args([word.format(model=tiny_sd1) for word in words]))
    assert [file.parent.name for file in caught.value.args[0]] == ["text_encoder", "unet", "vae"]

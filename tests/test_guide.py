"""The guide, command by command and block by block as printed, with only model, folder and run names replaced.

The first of each kind of command starts a Python of its own, as users do; those after it run in this process (a start takes five seconds to import torch).
"""

import contextlib
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file

from hcpdiff import cli

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "zh" / "tutorials" / "lora.md"
MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SIZES = [(120, 180), (180, 120), (128, 128), (100, 150), (150, 100)]


def blocks(kind: str) -> list[str]:
    """Fenced blocks of the guide."""
    return re.findall(rf"```{kind}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)


def block(kind: str, mark: str) -> str:
    """The one block that contains `mark`."""
    (found,) = [text for text in blocks(kind) if mark in text]
    return found


def words(command: str) -> list[str]:
    """A shell command of the guide as its words, by the shell itself."""
    script = 'python() { printf "%s\\0" python "$@"; }; accelerate() { printf "%s\\0" accelerate "$@"; }\n' + command
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.rstrip("\0").split("\0")


def execute(arguments: list[str], cwd: Path, code: int = 0) -> str:
    """Runs the words of a guide's command with this interpreter."""
    first = [sys.executable, "-m", "accelerate.commands.launch"] if arguments[0] == "accelerate" else [sys.executable]
    rest = arguments[2:] if arguments[0] == "accelerate" else arguments[1:]
    done = subprocess.run([*first, *rest], cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def execute_here(arguments: list[str], cwd: Path) -> None:
    """Runs the words of a guide's command in this process."""
    name = arguments.index("-m") + 1
    module, threads, told = importlib.import_module(arguments[name]), torch.get_num_threads(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
        cli.run(module.main, module.parser, arguments[name + 1:])
    torch.set_num_threads(threads)
    assert ended.value.code == 0, told.getvalue()[-3000:]


def make_images(folder: Path) -> None:
    folder.mkdir()
    for i, size in enumerate(SIZES, 1):
        image = Image.new("RGB", size, (40 * i, 255 - 40 * i, 90))
        ImageDraw.Draw(image).ellipse((20, 20, size[0] - 20, size[1] - 20), fill=(255 - 30 * i, 30 * i, 200))
        image.save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_sd1):
    """A working directory as the guide has it, with txt captions."""
    folder = tmp_path_factory.mktemp("guide")
    make_images(folder / "train_data")
    for i in range(1, len(SIZES) + 1):
        (folder / "train_data" / f"{i}.txt").write_text(f"标注{i}, a cat on a sofa", encoding="utf-8")
    (folder / "cfgs" / "train").mkdir(parents=True)
    text = block("yaml", "lora_conventional.yaml").replace(MODEL, str(tiny_sd1))
    # the guide's own number of pixels is for real models; a tiny one would spend minutes on its attention
    (folder / "cfgs" / "train" / "lora1.yaml").write_text(text.replace("512*768", "64*96"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """The guide's first training command, under accelerate launch; the run folder."""
    output = execute(words(block("shell", "--cfg cfgs/train/lora1.yaml \n")), place)
    (run,) = (place / "exps").iterdir()
    return run, output


def test_the_first_training_command_leaves_the_run_folder_of_the_guide(trained):
    run, output = trained
    assert re.fullmatch(r"\d{4}(-\d\d){5}", run.name)
    assert (run / "cfg.yaml").is_file() and (run / "train.log").is_file() and list((run / "tblog").glob("events.out.tfevents.*"))
    files = sorted(path.name for path in (run / "ckpts").iterdir())
    assert files == ["unet-100.safetensors"] or len(files) == 1 and re.fullmatch(r"unet-\d+\.safetensors", files[0])
    assert "pt-cat1, 标注" in output  # trigger word and caption both reach the model


def test_its_file_holds_160_layers_with_alpha(trained):
    run, _ = trained
    (path,) = (run / "ckpts").iterdir()
    tensors = load_file(path)
    ups = [key for key in tensors if key.endswith(".lora_up.weight")]
    assert len(ups) == 160 and all(key.replace("lora_up.weight", "alpha") in tensors for key in ups)
    assert all(tensors[key].abs().sum() > 0 for key in ups)
    with safe_open(path, "pt") as file:
        assert not any(str(run.parents[1]) in value for value in file.metadata().values())


def test_tensorboard_has_a_loss_for_every_step(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = trained
    events = EventAccumulator(str(run / "tblog"))
    events.Reload()
    steps = [event.step for event in events.Scalars("loss")]
    (path,) = (run / "ckpts").iterdir()
    assert steps == list(range(1, int(path.stem.split("-")[1]) + 1))
    assert {"loss", "grad_norm", "lr/unet"} <= set(events.Tags()["scalars"])


def test_the_second_training_command_changes_lr_and_epochs(trained, place):
    before = set((place / "exps").iterdir())
    arguments = words(block("shell", "unet_lr=0.0002"))
    assert arguments[-2:] == ["unet_lr=0.0002", "train.train_epochs=10"]
    execute_here(arguments, place)
    (run,) = set((place / "exps").iterdir()) - before
    log = (run / "train.log").read_text(encoding="utf-8")
    first = int(next(iter((trained[0] / "ckpts").iterdir())).stem.split("-")[1])
    second = int(next(iter((run / "ckpts").iterdir())).stem.split("-")[1])
    assert second * 2 == first and "lr unet 2.00e-04" in log


def test_the_run_can_be_started_again_from_its_cfg_yaml(trained, place):
    run, _ = trained
    before = set((place / "exps").iterdir())
    execute_here(["-m", "hcpdiff.train_ac_single", "--cfg", str(run / "cfg.yaml")], place)
    (again,) = set((place / "exps").iterdir()) - before
    old, new = (load_file(next(iter((folder / "ckpts").iterdir()))) for folder in (run, again))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


@pytest.fixture(scope="module")
def with_text_encoder(place):
    """The guide's advanced block appended to its config, json captions."""
    make_images(place / "json_data")
    (place / "json_data" / "captions.json").write_text(json.dumps({str(i): f"标注{i}" for i in range(1, len(SIZES) + 1)}, ensure_ascii=False), encoding="utf-8")
    text = (place / "cfgs/train/lora1.yaml").read_text(encoding="utf-8").replace("train_data/", "json_data/")
    (place / "cfgs/train/lora2.yaml").write_text(text + "\n" + block("yaml", "lora_text_encoder:"), encoding="utf-8")
    execute_here(["-m", "hcpdiff.train_ac_single", "--cfg", "cfgs/train/lora2.yaml", "exp_dir=exps/advanced", "train.train_epochs=3"], place)
    return place / "exps" / "advanced"


def test_the_advanced_block_trains_both_with_rank_and_alpha_as_written(with_text_encoder):
    unet, text = (load_file(next((with_text_encoder / "ckpts").glob(f"{stem}-*.safetensors"))) for stem in ("unet", "text_encoder"))
    assert {tensor.shape[0] for key, tensor in unet.items() if key.endswith("lora_down.weight")} == {16}
    assert {tensor.item() for key, tensor in unet.items() if key.endswith("alpha")} == {2.0}
    downs = [key for key in text if key.endswith("lora_down.weight")]
    assert len(downs) == 18 and all(key.startswith("text_model.encoder.layers.") for key in downs)
    assert {text[key].shape[0] for key in downs} == {2} and all(text[key.replace("down", "up")].abs().sum() > 0 for key in downs)


def draw(arguments: list[str], place: Path, run: Path, model: Path, how=execute) -> list[Path]:
    """Runs a visualizer command of the guide, by `how`, and returns the new pictures."""
    newest = max((run / "ckpts").glob("unet-*.safetensors"), key=lambda path: path.stat().st_mtime)
    arguments = [word.replace(MODEL, str(model)).replace("exps/2023-07-26-01-05-35/ckpts/unet-1000.safetensors", str(newest.relative_to(place))) for word in arguments]
    before = set(place.glob("output/**/*.png"))
    how(arguments, place)
    return sorted(set(place.glob("output/**/*.png")) - before)


def test_the_visualizer_command_draws(trained, place, tiny_sd1):
    (picture,) = draw(words(block("shell", "hcpdiff.visualizer")), place, trained[0], tiny_sd1)
    with Image.open(picture) as image:
        assert image.size == (64, 64) and len(set(image.getdata())) > 50 and "pt-cat1" in str(image.info)


def test_the_advanced_drawing_block_changes_size_sampler_and_vae(trained, place, tiny_sd1, tmp_path):
    shutil.copytree(tiny_sd1 / "vae", place / "any3.0" / "vae", dirs_exist_ok=True)
    text = block("yaml", "DPMSolverMultistepScheduler").replace("768", "128").replace("num_inference_steps: 25", "num_inference_steps: 4")
    (place / "cfgs" / "my_infer.yaml").write_text(text, encoding="utf-8")
    arguments = [word.replace("cfgs/infer/t2i_lora.yaml", "cfgs/my_infer.yaml") for word in words(block("shell", "hcpdiff.visualizer"))]
    (picture,) = draw(arguments, place, trained[0], tiny_sd1, execute_here)
    with Image.open(picture) as image:
        assert image.size == (128, 128) and "DPM" in str(image.info)


def test_the_conversion_command_makes_a_webui_file(with_text_encoder, place):
    names = {stem: str(next((with_text_encoder / "ckpts").glob(f"{stem}-*.safetensors")).relative_to(place)) for stem in ("unet", "text_encoder")}
    arguments = words(block("shell", "lora_convert"))
    arguments = [names[word.split("-xxxx")[0]] if word.split("-xxxx")[0] in names else word for word in arguments]
    execute(arguments, place)
    tensors = load_file(place / "lora-xxxx.safetensors")
    bases = {key.split(".")[0] for key in tensors}
    assert len([base for base in bases if base.startswith("lora_te_text_model_encoder_layers_")]) == 18 and len([base for base in bases if base.startswith("lora_unet_")]) == 96
    plain = [word for word in arguments if word != "--auto_scale_alpha"]
    plain[plain.index("lora-xxxx.safetensors")] = "plain.safetensors"
    execute_here(plain, place)
    other = load_file(place / "plain.safetensors")
    assert other.keys() == tensors.keys() and all(torch.equal(other[key], tensors[key]) for key in other)

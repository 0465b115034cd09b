"""Base models as single files: what they are taken for, that every weight arrives, and what is refused by name."""

import re

import pytest
import torch

from hcpdiff.families import quick_faults
from hcpdiff.families.place import open_place
from tests.single_models import PARTS, ldm_state, make_parts, save_folder, save_single


@pytest.fixture(scope="module")
def singles(tmp_path_factory):
    """kind -> (parts, file); one small model of each kind."""
    made = {}
    for kind in PARTS:
        parts = make_parts(kind)
        metadata = {"modelspec.prediction_type": "epsilon"} if kind == "sd2" else None
        made[kind] = parts, save_single(tmp_path_factory.mktemp(kind) / f"{kind}.safetensors", kind, parts, metadata)
    return made


@pytest.mark.parametrize("kind", PARTS)
def test_every_weight_of_a_file_arrives(singles, kind):
    parts, path = singles[kind]
    place = open_place(path)
    assert place.kind.name == kind
    place.check(place.parts())
    for name, part in parts.items():
        read = place.load(type(part), name, torch.float32)
        wanted = part.state_dict()
        assert read.state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in read.state_dict().items())
        assert not any(tensor.is_meta for tensor in (*read.parameters(), *read.buffers())) and not read.training


def header_of(kind: str):
    """name -> shape as a file of this kind has them; a copy to change."""
    return {name: tuple(tensor.shape) for name, tensor in ldm_state(kind, make_parts(kind)).items()}


def fault(path, *args, **kwargs) -> str:
    """What is said of the file, as far as it shows without torch."""
    faults = quick_faults(str(path), *args, **kwargs)
    assert faults
    return "\n".join(faults)


def test_a_file_trains_and_draws_as_its_folder_does(singles, tmp_path, monkeypatch):
    """Not to the last bit: libraries map a folder's weights from the disk, and sums depend on how memory is aligned."""
    parts, path = singles["sd1"]
    folder = save_folder(tmp_path / "model", "sd1", parts)
    monkeypatch.chdir(tmp_path)
    runs = [trained(tmp_path, model) for model in (folder, path)]
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-4)
    for name, tensors in runs[0][2].items():
        most = max(tensor.abs().max() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))
        assert all((tensor - runs[1][2][name][key]).abs().max() <= 0.02 * most for key, tensor in tensors.items())
    assert f"{path.name} is a Stable Diffusion 1.x model" in runs[1][3]
    pictures = [drawn(model, runs[1][0], tmp_path / model.name.replace(".", "_")) for model in (folder, path)]
    assert abs(pictures[0] - pictures[1]).max() <= 1


def trained(tmp_path, model, *overrides):
    """(run folder, losses, weight files, log) of two steps."""
    from PIL import Image
    from safetensors.torch import load_file

    from hcpdiff.config.load import load
    from hcpdiff.config.schema import RunConfig
    from hcpdiff.train.parallel import Parallel
    from hcpdiff.train.run import Run
    from tests.test_run import CONFIG

    if not (tmp_path / "images").is_dir():
        (tmp_path / "images").mkdir()
        Image.effect_noise((64, 64), 50).save(tmp_path / "images" / "0.png")
        Image.effect_noise((64, 64), 20).save(tmp_path / "images" / "1.png")
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=model), encoding="utf-8")
    words = "lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*self_attn$']}]"
    run = Run(load("cfg.yaml", [f"exp_dir=run_{model.name}", words, *overrides], RunConfig), Parallel())
    assert run.train() == 0
    log = (run.folder / "train.log").read_text(encoding="utf-8")
    return run.folder, [float(value) for value in re.findall(r"loss (\d+\.\d+)", log)], {file.name: load_file(file) for file in (run.folder / "ckpts").iterdir()}, log


def drawn(model, lora, out, **more):
    """A picture with the LoRA of a run folder, as integers (H, W, 3)."""
    import numpy as np
    from PIL import Image

    from hcpdiff.config.infer_schema import InferConfig
    from hcpdiff.vis.request import read
    from hcpdiff.vis.run import run

    config = InferConfig(pretrained_model=str(model), prompt="a cat", seed=3, lora_path=str(lora) if lora else None, out_dir=str(out), cpu_threads=1,
                         infer_args={"width": 64, "height": 64, "num_inference_steps": 3}, **more)
    files = run(read(config), say=lambda line: None)
    return np.asarray(Image.open(files[0])).astype(int)

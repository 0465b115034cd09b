"""A folder of real photographs in several shapes, from files to checkpoint."""

import re
from pathlib import Path

import pytest
from PIL import Image

from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.run import Run

PHOTOS = Path(__file__).parents[1] / "demo" / "photos"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_sd1):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "cfg.yaml").write_text(f"""
exp_dir: '{folder}/run'
train: {{train_steps: 3, cpu_threads: 1, log_step: 1}}
model: {{pretrained_model_name_or_path: '{tiny_sd1}'}}
lora_unet:
  - {{lr: 1.0e-3, rank: 2, layers: ['re:.*attn2$']}}
data:
  photos:
    batch_size: 2
    source: {{a: {{img_root: '{PHOTOS}', caption_file: '{PHOTOS}'}}}}
    bucket: {{target_area: 16384, num_bucket: 3, step_size: 16}}
""", encoding="utf-8")
    run = Run(load(str(folder / "cfg.yaml"), [], RunConfig), Parallel())
    assert run.train() == 0
    return run


def test_each_shape_has_its_bucket_and_a_checkpoint_comes_out(run):
    assert sorted(round(width / height, 2) for width, height in (Image.open(path).size for path in PHOTOS.glob("*.jpg"))) == [0.66, 0.75, 1.0, 1.5, 1.5, 1.5]
    log = (run.folder / "train.log").read_text(encoding="utf-8")
    rows = re.findall(r"(\d+) x (\d+)[^\d\n]+(\d+)[^\d\n]+[\d.]+%", log)
    assert rows == [("112", "144", "2"), ("128", "128", "1"), ("144", "96", "3")], log
    assert (run.folder / "ckpts" / "unet-3.safetensors").is_file()


def test_every_photo_has_its_caption(run):
    prompts = set(run.data.prompts_ahead(run.data.plan.start_of(0), 100, 100)[0])
    assert len(prompts) == 6 and any("tabby cat, close up" in prompt for prompt in prompts)

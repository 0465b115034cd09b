"""Wrong configs at the command line: exit code 2, one message, no traceback, nothing written."""

import pytest
from config_help import SMALL, command, write

FILES = {
    "good.yaml": SMALL, "loop.yaml": "_base_: other.yaml\n", "other.yaml": "_base_: loop.yaml\n", "gone.yaml": "_base_: [cfgs/train/nowhere.yaml]\n" + SMALL,
    "code.yaml": SMALL.replace("0.0006", "${hcp.eval:\"__import__('os').getpid()\"}"), "twice.yaml": SMALL + "unet_lr: 1\n", "tabs.yaml": SMALL + "preview:\n\tseed: 1\n",
}
WRONG = {
    "misspelt key": (["--cfg", "good.yaml", "train.train_epoch=3"], "Nearest: train_epochs"),
    "misspelt key on the top": (["--cfg", "good.yaml", "lora_unt=null"], "Nearest: lora_unet"),
    "wrong type": (["--cfg", "good.yaml", "data.dataset1.batch_size=many"], "a whole number is expected"),
    "out of range": (["--cfg", "good.yaml", "lora_unet.0.rank=0"], "must be above 0"),
    "several faults": (["--cfg", "good.yaml", "seed=x", "train.workers=-1", "data.dataset1.bucket.num_buckets=3"], "error: 4 faults"),
    "loop": (["--cfg", "loop.yaml"], "loop.yaml -> other.yaml -> loop.yaml"),
    "missing base": (["--cfg", "gone.yaml"], "'cfgs/train/nowhere.yaml' (gone.yaml:1) is not there. Looked in cfgs/train"),
    "missing file": (["--cfg", "god.yaml"], "Nearest: good.yaml"),
    "bad interpolation": (["--cfg", "good.yaml", "lora_unet.0.lr=${unet_lrr}"], "Nearest: unet_lr"),
    "code in hcp.eval": (["--cfg", "code.yaml"], "arithmetic only"),
    "foreign target": (["--cfg", "good.yaml", "train.optimizer._target_=os.system"], "not among those allowed"),
    "remote code": (["--cfg", "good.yaml", "model.noise_scheduler={_target_: diffusers.DDIMScheduler, trust_remote_code: true}"], "is refused"),
    "comment after a backslash": (["--cfg", "good.yaml", "unet_lr=0.0002", " #", "text"], "A comment after a '\\'"),
    "key twice": (["--cfg", "twice.yaml"], "stands here a second time (first in line 2)"),
    "tab": (["--cfg", "tabs.yaml"], "Indent with spaces"),
    "no model folder": (["--cfg", "good.yaml", "model.pretrained_model_name_or_path=./models/sd"], "is no folder or file here"),
    "no image folder": (["--cfg", "good.yaml", "data.dataset1.source.source1.img_root=picture"], "does not exist (looked from"),
    "no caption file": (["--cfg", "good.yaml", "data.dataset1.source.source1.caption_file=captions.json"], "does not exist"),
    "broken pattern": (["--cfg", "good.yaml", "lora_unet.0.layers=['re:attn(']"], "is no regular expression"),
    "removed key": (["--cfg", "good.yaml", "model.enable_xformers=true"], "was removed; use model.attention"),
    "epochs and steps": (["--cfg", "good.yaml", "train.train_epochs=1", "train.train_steps=1"], "two ways"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_is_one_message_and_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so the base model cannot be had either, which is told with what is wrong beside it
    for file, text in FILES.items():
        write(tmp_path, text, file)
    before = sorted(tmp_path.rglob("*"))
    arguments, says = WRONG[name]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and says in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before

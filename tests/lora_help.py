"""What the tests of the LoRA tools share: small LoRA, files of them, a tool called in this process."""

from pathlib import Path

import pytest
import torch

from hcpdiff import cli
from hcpdiff.checkpoint.export import write_webui
from hcpdiff.families.unet_names import clip_modules
from hcpdiff.families.webui import BY_NAME
from hcpdiff.lora_tensors import LoraTensors

SD1, SD2, SDXL = BY_NAME["sd1"], BY_NAME["sd2"], BY_NAME["sdxl"]


def random_lora(weight_shape, seed, rank=2, alpha=1.0, dtype=torch.float32, scale=0.1):
    """A LoRA of a weight, drawn by its seed."""
    g = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight_shape[1:], generator=g) * scale
    up = torch.randn(weight_shape[0], rank, *(1,) * (len(weight_shape) - 2), generator=g) * scale
    return LoraTensors(down.to(dtype), up.to(dtype), alpha)


def sd1_layers(seed, text=False, **options):
    """LoRA of twelve layers of an SD1 UNet with small widths (attention, 1x1 and 3x3 convolutions), and of twelve of a text encoder."""
    shapes = {"attentions.0.transformer_blocks.0.attn2.to_k": (16, 768), "attentions.1.proj_in": (16, 16, 1, 1), "resnets.0.conv1": (16, 8, 3, 3), "resnets.0.time_emb_proj": (16, 64)}
    unet = {f"down_blocks.{block}.{name}": random_lora(shape, 100 * seed + 10 * block + n, **options) for block in range(3) for n, (name, shape) in enumerate(shapes.items())}
    te = {path: random_lora((768, 768) if "attn" in path else (32, 768) if "fc1" in path else (768, 32), 100 * seed + n, **options) for n, path in enumerate(clip_modules(2))}
    return {"unet": unet, "text_encoder": te} if text else {"unet": unet}


def webui_file(path, layers, family=SD1, version="sd_v1", **options):
    """Writes them as webui's file."""
    path = Path(path)
    write_webui(path, layers, family, version, name=path.stem, kept={}, **options)
    return path


def command(module, capsys, *args):
    """(exit code, stdout, stderr) of a command line, in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.run(module.main, module.parser, list(map(str, args)))
    return caught.value.code, *capsys.readouterr()


def fails(result, *words):
    """The command ended with 2, one message and no traceback, and these words are in it."""
    code, _, err = result
    assert code == 2 and "Traceback" not in err and err.startswith("error: "), err
    for word in words:
        assert word in err, err

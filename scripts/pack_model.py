"""Pack WORK/vae and WORK/unet.pt (its averaged weights) as a diffusers StableDiffusionPipeline folder in half precision.

    python scripts/pack_model.py --work WORK [--out demo/model]
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import Ema
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from train_unet import SCHEDULE, TEXT, TOKENIZER, Captions, Models
from transformers import CLIPTextConfig, CLIPTextModel

LIMIT = 24 * 10**6  # bytes of weights


def averaged(work: Path, captions: Captions, state_file: str) -> Models:
    models = Models(captions)
    ema, state = Ema(models.params, 0.0), torch.load(work / state_file, weights_only=True)
    ema.load_state_dict(state["ema"])
    print(f"{state_file}: step {state['step']}, {state['spent']:.0f} s of CPU time")
    ema.swap()
    return models


@torch.no_grad()
def full_text_encoder(small: CLIPTextModel, tokens: list[int], vocab: int) -> CLIPTextModel:
    """The same encoder over CLIP's whole table; tokens that never occurred get random rows like the trained ones in size."""
    full = CLIPTextModel(CLIPTextConfig(vocab_size=vocab, bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=vocab - 1, **TEXT))
    state = small.state_dict()
    name = next(n for n in state if n.endswith("token_embedding.weight"))
    trained = state.pop(name)
    full.load_state_dict(state, strict=False)
    table = full.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    table.copy_(trained.mean(0) + trained.std(0) * torch.randn(table.shape, generator=generator))
    table[torch.tensor(tokens)] = trained
    return full


def build(work: Path, state_file: str = "unet.pt") -> StableDiffusionPipeline:
    captions = Captions(json.loads((work / "pictures.json").read_text("utf-8")))
    models = averaged(work, captions, state_file)
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=full_text_encoder(models.text, captions.tokens, len(captions.tokenizer)).eval(),
        tokenizer=captions.tokenizer,
        unet=models.unet.eval(),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument("--state", default="unet.pt")
    args = parser.parse_args()
    pipeline = build(args.work, args.state).to(torch.float16)
    pipeline.save_pretrained(args.out, safe_serialization=True)
    shutil.rmtree(args.out / "tokenizer")  # the files that hcpdiff ships, not another form of them
    shutil.copytree(TOKENIZER, args.out / "tokenizer")
    for config in args.out.glob("*/config.json"):  # no paths of the machine that packed it
        values = json.loads(config.read_text("utf-8"))
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    for weights in args.out.rglob("*.safetensors"):
        weights.chmod(0o644)
    total = sum(f.stat().st_size for f in args.out.rglob("*.safetensors"))
    print(f"{args.out}: {total / 1e6:.1f} MB of weights")
    if total > LIMIT:
        raise SystemExit(f"{total} bytes are more than the limit of {LIMIT}")


if __name__ == "__main__":
    main()

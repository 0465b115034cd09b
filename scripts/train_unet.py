"""Train UNet and text encoder together on cached latents of WORK/pictures.npz; resumable.

    python scripts/train_unet.py --work WORK [--seconds 14400]

Needs WORK/vae. State goes to WORK/unet.pt every few minutes; WORK/unet_stable.pt keeps the state from before the learning
rate falls, so that a longer run can go on from there (copy it over unet.pt, raise --seconds). Progress is counted in
seconds of CPU time, kept over restarts: other programs on the machine change nothing. v-prediction; 10 % of the captions are empty.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would take the core from those that work

import numpy as np
import torch
from common import Ema, Log, Muon, save_atomic
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from train_vae import encode_means
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENIZER = Path(__file__).parent.parent / "hcpdiff" / "assets" / "clip_tokenizer"
CORE = Path(__file__).parent / "core.txt"
EMPTY, UNSTYLED, FOREIGN = 0.1, 0.1, 0.2  # shares of captions that are '', the thing's name alone, and in a style of an unknown name
MAX_SNR = 5.0  # the v loss counts less where there is less noise than this
UNET = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64, 96, 96),
    layers_per_block=2,
    cross_attention_dim=64,
    attention_head_dim=2,  # diffusers' name for the number of heads
    norm_num_groups=16,
)
TEXT = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=77, projection_dim=64)
SCHEDULE = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    prediction_type="v_prediction",
)


class Captions:
    """Prompts as rows of a small token table: only tokens that occur have a row while training."""

    def __init__(self, rows: list[dict]):
        self.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        prompts = [p for r in rows for p in (r["caption"], r["name"])] + [""]
        ids = self.tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
        self.tokens = sorted({i for row in ids for i in row})  # small id -> CLIP's id
        small = {token: index for index, token in enumerate(self.tokens)}
        self.table = torch.tensor([[small[i] for i in row] for row in ids])
        self.count = len(rows)
        words = {style: len(self.tokenizer(style, add_special_tokens=False).input_ids) for style in {r["style"] for r in rows}}
        places = torch.arange(77)
        self.style_place = torch.stack([(places >= 1) & (places <= words[r["style"]]) for r in rows])  # (N,77) where the style's name is

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) rows -> ids (B,77), and where an unknown word stands in the place of the style's name (B,77)."""
        kind = torch.rand(len(index), generator=generator)
        position = torch.where(kind < EMPTY, 2 * self.count, 2 * index + (kind < EMPTY + UNSTYLED))
        return self.table[position], self.style_place[index] & (kind > 1 - FOREIGN)[:, None]


class Models:
    def __init__(self, captions: Captions):
        self.unet = UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)
        vocab = len(captions.tokens)  # the two special tokens are CLIP's last, so they are last here too
        self.text = CLIPTextModel(CLIPTextConfig(vocab_size=vocab, bos_token_id=vocab - 2, eos_token_id=vocab - 1, **TEXT))
        named = [*self.unet.named_parameters(), *self.text.named_parameters()]
        self.params = [p for _, p in named]
        self.unknown = None  # (B,77) where the next prompts have words that nobody knows, and their vectors (B,77,D)
        self.text.get_input_embeddings().register_forward_hook(lambda module, args, out: out if self.unknown is None else torch.where(self.unknown[0][..., None], self.unknown[1], out))
        plain = [p.dim() < 2 or "embedding" in name or name.startswith(("conv_in", "conv_out")) for name, p in named]
        self.matrices = [p for (_, p), is_plain in zip(named, plain) if not is_plain]
        self.others = [p for (_, p), is_plain in zip(named, plain) if is_plain]


class Threads:
    """One thread or two, whichever is faster at the moment: other programs come and go."""

    def __init__(self, most: int):
        self.most, self.times, self.count = most, {}, 0
        self.use(1)

    def use(self, threads: int) -> None:
        self.now = threads
        torch.set_num_threads(threads)

    def note(self, seconds: float) -> None:
        if self.most == 1:
            return
        self.count += 1
        self.times.setdefault(self.now, []).append(seconds)
        phase = self.count % 100
        if phase == 0:  # try the other number for a few steps
            self.times = {}
            self.use(1)
        elif phase == 3:
            self.use(self.most)
        elif phase == 6:
            medians = {n: float(np.median(t)) for n, t in self.times.items()}
            self.use(min(medians, key=medians.get))


def lr_factor(progress: float, decay: float) -> float:
    """Short warmup, constant, then linear to 2 % over the last share `decay`."""
    return min(1.0, progress / 0.005 + 0.01, 0.02 + 0.98 * max(0.0, 1 - progress) / decay)


def encode(models: Models, tokens: torch.Tensor, unknown: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B,77) -> (B,77,64). Unknown words get random vectors of the known ones' size: so a prompt with a new word, a LoRA's trigger say, still draws its thing."""
    table = models.text.get_input_embeddings().weight.detach()
    models.unknown = unknown, table.mean(0) + table.std(0) * torch.randn(*tokens.shape, table.shape[1], generator=generator)
    hidden = models.text(tokens).last_hidden_state
    models.unknown = None
    return hidden


def loss_of(models: Models, schedule: DDIMScheduler, latents: torch.Tensor, captions: tuple, generator: torch.Generator) -> torch.Tensor:
    batch = len(latents)
    noise = torch.randn(latents.shape, generator=generator)
    places = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch  # spread evenly
    t = (places * schedule.config.num_train_timesteps).long()
    alpha = schedule.alphas_cumprod[t]
    snr = alpha / (1 - alpha)
    noisy = schedule.add_noise(latents, noise, t).contiguous(memory_format=torch.channels_last)
    target = schedule.get_velocity(latents, noise, t)
    out = models.unet(noisy, t, encode(models, *captions, generator)).sample
    weight = (MAX_SNR + 1) / (snr.clamp(min=MAX_SNR) + 1)  # 1 where noise rules: there the text decides what it will be
    return ((out - target).square().mean((1, 2, 3)) * weight).mean()


def read_state(path: Path, models: Models, ema: Ema, optimizer: Muon) -> dict:
    state = torch.load(path, weights_only=True)
    models.unet.load_state_dict(state["unet"])
    models.text.load_state_dict(state["text"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def train(models: Models, ema: Ema, latents: torch.Tensor, captions: Captions, weights: torch.Tensor, args) -> None:
    path, log, schedule = args.work / "unet.pt", Log(args.work / "logs" / "unet.jsonl"), DDIMScheduler(**SCHEDULE)
    optimizer, threads = Muon(models.matrices, models.others, args.lr), Threads(args.threads)
    step, spent, losses, counts = 0, 0.0, [], []
    if path.exists():
        state = read_state(path, models, ema, optimizer)
        step, spent = state["step"], state["spent"]
        log.write(resumed=step, seconds=round(spent))

    def save(to: Path) -> None:
        parts = {"unet": models.unet, "text": models.text, "ema": ema, "optimizer": optimizer}
        save_atomic({name: part.state_dict() for name, part in parts.items()} | {"step": step, "spent": spent}, to)

    last, saved = time.process_time(), time.monotonic()
    wall = saved
    while spent < args.seconds:
        generator = torch.Generator().manual_seed(step)
        index = torch.multinomial(weights, args.batch, replacement=True, generator=generator)
        loss = loss_of(models, schedule, latents[index], captions.draw(index, generator), generator)
        loss.backward()
        optimizer.step(lr_factor(spent / args.seconds, args.decay))
        ema.update()
        losses.append(float(loss.detach()))
        counts.append(threads.now)
        now, began, wall = time.process_time(), wall, time.monotonic()
        threads.note(wall - began)
        before, step, spent, last = spent, step + 1, spent + now - last, now
        if step % 50 == 0:
            log.write(step=step, seconds=round(spent), loss=float(np.mean(losses)), threads=float(np.mean(counts)))
            losses, counts = [], []
        if before < (1 - args.decay) * args.seconds <= spent:
            save(args.work / "unet_stable.pt")
        if wall - saved > 120 or spent >= args.seconds:
            save(path)
            saved = wall


def cached_latents(work: Path) -> torch.Tensor:  # -> (N,4,16,16), scaled
    path = work / "latents.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
        pixels = torch.from_numpy(np.load(work / "pictures.npz")["pixels"]).permute(0, 3, 1, 2)
        save_atomic({"latents": encode_means(vae, pixels) * vae.config.scaling_factor}, path)
    return torch.load(path, weights_only=True)["latents"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=14400)
    parser.add_argument("--decay", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--core-weight", type=float, default=12.0, help="how often a thing of core.txt is seen, against another")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = json.loads((args.work / "pictures.json").read_text("utf-8"))
    core = {line.strip() for line in CORE.read_text("utf-8").splitlines() if not line.startswith("#")}
    captions = Captions(rows)
    models = Models(captions)
    weights = torch.tensor([args.core_weight if r["name"] in core else 1.0 for r in rows])
    train(models, Ema(models.params, 0.997), cached_latents(args.work), captions, weights, args)


if __name__ == "__main__":
    main()

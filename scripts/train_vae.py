"""Train the VAE (64 px, f = 4, 4 channels) on WORK/pictures.npz and WORK/vae_pictures.npz; resumable.

    python scripts/train_vae.py --work WORK [--seconds 900] [--decoder-only] [--threads 1]

Writes WORK/vae.pt (state), then WORK/vae/ (diffusers folder) whose latents are decorrelated by a change of basis folded into
the 1x1 quant convolutions, and WORK/vae_reconstructions.png. With --decoder-only it takes WORK/vae/ and makes its decoder better,
at any time later: latents, and what was trained on them, stay as they are. Runs are measured in seconds of CPU time,
kept over restarts.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from common import Ema, Log, Muon, lr_factor, save_atomic
from diffusers import AutoencoderKL
from PIL import Image

SCALING = 0.18215  # as in SD1.x, so that code which forgets it shows
CONFIG = dict(
    block_out_channels=(16, 32, 64),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=64,
    scaling_factor=SCALING,
)


def load_pixels(work: Path) -> torch.Tensor:  # -> (N,3,64,64) uint8
    files = [work / "pictures.npz", work / "vae_pictures.npz"]
    return torch.from_numpy(np.concatenate([np.load(f)["pixels"] for f in files])).permute(0, 3, 1, 2).contiguous()


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirrored, moved by up to 3 pixels, and sometimes with other colours, so that colours are learned as such."""
    draw = lambda high: int(torch.randint(high, (), generator=generator))
    if draw(2):
        pixels = pixels.flip(3)
    pixels = torch.roll(pixels, (draw(7) - 3, draw(7) - 3), (2, 3))
    return pixels[:, torch.randperm(3, generator=generator)] if draw(5) == 0 else pixels


def loss_of(vae: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """L1 + 4 MSE + a little KL; the PSNR in dB for the log."""
    posterior = vae.encode(x).latent_dist
    out = vae.decode(posterior.sample()).sample
    mse = (out - x).square().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return (out - x).abs().mean() + 4 * mse + 1e-4 * kl, float(10 * torch.log10(4 / mse.detach()))


def train(vae: AutoencoderKL, ema: Ema, pixels: torch.Tensor, args, stem: str) -> None:
    path, log, params = args.work / f"{stem}.pt", Log(args.work / "logs" / f"{stem}.jsonl"), ema.params
    optimizer = Muon([p for p in params if p.dim() > 1], [p for p in params if p.dim() == 1], args.lr)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    psnrs, last = [], time.process_time()
    while spent < args.seconds:
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(pixels), (args.batch,), generator=generator)
        x = augment(pixels[index], generator)
        if spent < 0.6 * args.seconds:  # cheap crops first, whole pictures at the end
            top, left = torch.randint(25, (2,), generator=generator).tolist()
            x = x[:, :, top : top + 40, left : left + 40]
        x = x.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        loss, psnr = loss_of(vae, x)
        loss.backward()
        optimizer.step(lr_factor(spent / args.seconds))
        ema.update()
        psnrs.append(psnr)
        step, now = step + 1, time.process_time()
        spent, last = spent + now - last, now
        if step % 100 == 0:
            log.write(step=step, seconds=round(spent), psnr=float(np.mean(psnrs)))
            psnrs = []
        if step % 100 == 0 or spent >= args.seconds:
            parts = {"vae": vae, "ema": ema, "optimizer": optimizer}
            save_atomic({name: part.state_dict() for name, part in parts.items()} | {"step": step, "spent": spent}, path)


@torch.no_grad()
def encode_means(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:  # -> (N,4,16,16), unscaled
    parts = [vae.encode(part.float().div(127.5).sub(1)).latent_dist.mean.contiguous() for part in pixels.split(64)]
    return torch.cat(parts)


@torch.no_grad()
def whiten(vae: AutoencoderKL, means: torch.Tensor) -> None:
    """Fold a change of basis into the quant convolutions: latents get mean 0, no correlation, deviation 1 / SCALING."""
    flat = means.permute(1, 0, 2, 3).flatten(1).double()
    centre = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    forward = torch.diag(values.rsqrt()) @ vectors.T / SCALING
    backward = torch.linalg.inv(forward)
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:, :, 0, 0].double(), quant.bias.double()
    quant.weight[:4, :, 0, 0] = (forward @ weight[:4]).float()
    quant.bias[:4] = (forward @ (bias[:4] - centre)).float()
    quant.weight[4:] = 0  # one variance per channel is enough: that of the mixture, at the data's mean
    quant.bias[4:] = (forward.square() @ bias[4:].exp()).log().float()
    decode = post.weight[:, :, 0, 0].double()
    post.bias += (decode @ centre).float()
    post.weight[:, :, 0, 0] = (decode @ backward).float()


@torch.no_grad()
def psnr_of(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    errors = []
    for part in pixels.split(64):
        x = part.float().div(127.5).sub(1)
        errors.append((vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x).square().mean((1, 2, 3)))
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())


@torch.no_grad()
def draw_reconstructions(vae: AutoencoderKL, pixels: torch.Tensor, path: Path) -> None:
    x = pixels.float().div(127.5).sub(1)
    out = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    rows = [torch.cat(list(part), 2) for pair in zip(x.split(16), out.split(16)) for part in pair]
    Image.fromarray(((torch.cat(rows, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(path)


def finish(vae: AutoencoderKL, pixels: torch.Tensor, args, stem: str) -> None:
    vae.save_pretrained(args.work / "vae")
    shown = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))
    Log(args.work / "logs" / f"{stem}.jsonl").write(final_psnr=psnr_of(vae, pixels[shown[:1000]]))
    draw_reconstructions(vae, pixels[shown[:64]], args.work / "vae_reconstructions.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pixels = load_pixels(args.work)
    if args.decoder_only:
        vae = AutoencoderKL.from_pretrained(args.work / "vae").to(memory_format=torch.channels_last)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        ema = Ema([*vae.post_quant_conv.parameters(), *vae.decoder.parameters()], 0.995)
        train(vae, ema, pixels, args, "vae_decoder")
        ema.swap()
        return finish(vae.eval(), pixels, args, "vae_decoder")
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    ema = Ema(list(vae.parameters()), 0.995)
    train(vae, ema, pixels, args, "vae")
    ema.swap()
    vae.eval()
    means = encode_means(vae, pixels[torch.from_numpy(np.random.default_rng(0).permutation(len(pixels))[:2000])])
    print("latent correlations before", torch.corrcoef(means.permute(1, 0, 2, 3).flatten(1)))
    whiten(vae, means)
    print("posterior's deviation, scaled", (0.5 * vae.quant_conv.bias[4:]).exp() * SCALING)
    finish(vae, pixels, args, "vae")


if __name__ == "__main__":
    main()

"""What a training step needs of a GPU's memory, counted to the byte where there is none.

    python benchmarks/fit.py                                          # SD1.5 at 512 px and SDXL at 1024 px
    python benchmarks/fit.py --family sdxl --pixels 768 --batch 1 6 --rank 64
    python benchmarks/fit.py --write                                  # also puts the tables into docs/*/user_guides/train.md

The UNet of the published config stands on torch's meta device, where a tensor has a shape and no memory. Our LoRA is laid on its attention and feed-forward layers,
and one step is done in bf16, or in another type with --dtype: forward, backward, clipping, AdamW, and the copies by which an update is taken back beside a GPU. Every
storage that an operation makes is counted from then until nobody holds it any more; the figure is the most at any moment, with the weights as they are kept.

Attention is counted as a GPU's flash or memory-efficient kernel has it, which keeps q, k, v, its output and one number a row; torch's fallback on meta would keep
the whole matrix of N x N. Not counted: what is no tensor of torch's (CUDA's context, workspace of single kernels, the allocator's rounding), and what is not a step:
the VAE while latents are encoded, previews. So this is computed, and was not measured on a GPU.
"""

import argparse
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest.mock import patch

from common import MIB, ROOT

from hcpdiff.quiet import quiet_libraries

quiet_libraries()

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hcpdiff.adapters.lora import HALF
from hcpdiff.adapters.shadow import Shadow
from hcpdiff.config.schema import LoraGroup
from hcpdiff.device import DTYPES
from hcpdiff.diffusion.objective import DiscreteObjective
from hcpdiff.families import detect
from hcpdiff.families.base import Conditioning, Models
from hcpdiff.families.place import Folder
from hcpdiff.families.read_parts import empty, set_weight
from hcpdiff.loss import make_loss
from hcpdiff.quantized import Plan, Quantized, stored_bytes
from hcpdiff.train.optim import Gradients, optimizer_groups
from hcpdiff.train.probe import blank_batch
from hcpdiff.train.step import DenoisingStep
from hcpdiff.train.undo import Undo
from hcpdiff.trainables.lora import LoraTrainable, lay_groups

GIB = 2**30
CONFIGS = ROOT / "hcpdiff" / "assets" / "base_models"
GUIDES = {language: ROOT / "docs" / language / "user_guides" / "train.md" for language in ("en", "zh")}
LAYERS = [r"re:.*\.attn.?$", r"re:.*\.ff$"]  # as in cfgs/train/examples/lora_conventional.yaml
META = torch.device("meta")
Sums = dict[tuple[int, bool, str | None], int]  # (batch, checkpointing, quantize) -> bytes
SIDES = {"sd1": 512, "sdxl": 1024}
CARDS = (6, 8, 12, 16, 24)  # GB
BESIDE = 1.5  # GiB of a card that this leaves to what it does not count, and to the desktop
QUANTIZE = (None, "int8", "nf4")
aten = torch.ops.aten
KERNELS = {"gpu": lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)[0],
           "cpu": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]}


class Live(TorchDispatchMode):
    """Bytes of the storages of a device that operations inside have made and somebody still holds: `now`, and the most so far, `peak`. `before`: tensors that
    were there."""

    def __init__(self, device: torch.device, before: Sequence[Tensor]):
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self.before = [tensor.untyped_storage() for tensor in before]
        self.held = {id(storage) for storage in self.before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if Quantized in types:
            return NotImplemented  # it makes the weight dense and asks again
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == self.device:
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self.held:
            self.held.add(key)
            self.now += size
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.held.remove(key)
        self.now -= size


@contextmanager
def attention(kernel: str) -> Iterator[None]:
    """Attention by the kernel that a device takes, whichever device the tensors are on."""
    calls = []

    def chosen(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **rest):
        assert attn_mask is None and not dropout_p and not is_causal and not rest.get("scale"), "this is not what the kernels are called with here"
        calls.append(1)
        return KERNELS[kernel](query, key, value)

    with patch.object(nn.functional, "scaled_dot_product_attention", chosen):
        yield
    assert calls, "attention went another way"


@dataclass(frozen=True)
class Need:
    """Bytes: of the frozen weights as they are kept; of what the adapters hold between steps (their weights, gradients, AdamW's moments, half-precision copies); and
    of the rest of the most at any moment of a step."""

    weights: int
    adapters: int
    activations: int

    @property
    def sum(self) -> int:
        """Of all."""
        return self.weights + self.adapters + self.activations


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    pixels: int
    batch: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    quantize: str | None = None
    checkpointing: bool = False


def model(folder: Path, case: Case, device: torch.device) -> tuple[Models, LoraTrainable]:
    """The denoiser of a folder's configs on a device, frozen and kept as a run keeps it, its weights without values; and the LoRA on it."""
    place = Folder(folder)
    family = detect(place)
    unet = empty(family._kind("unet"), place.config("unet"), str(folder)).to(case.dtype).requires_grad_(False).eval()
    models = Models(family, folder, folder.name, {"unet": unet}, {}, place.config("scheduler"), {"latent_shift": 0.0, "latent_scale": 1.0})
    (lora,) = lay_groups(models, "lora_unet", [LoraGroup(lr=1e-4, rank=case.rank, layers=LAYERS)], seed=0)
    for adapter in lora.adapters.values():
        adapter.to(device)
    if case.checkpointing:
        family.checkpointing(models, "unet")
        unet.train()  # as base.py does
    keep = Plan(case.quantize, family.dense).keeper(unet) if case.quantize else lambda name, weight: weight
    for name, parameter in [(name, parameter) for name, parameter in unet.named_parameters() if not parameter.requires_grad]:
        set_weight(unet, name, keep(name, torch.zeros_like(parameter, device=device)))
    return models, lora


def text_of(models: Models, batch: int) -> Conditioning:
    """Encoded prompts of one chunk, as the UNet's config wants them."""
    config = models.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim if config.addition_embed_type == "text_time" else 0
    return Conditioning(torch.zeros(batch, 77, config.cross_attention_dim), torch.zeros(batch, pooled) if pooled else None)


def need(folder: Path, case: Case, device: torch.device = META, kernel: str | None = "gpu", undo: bool = True, around: Callable = nullcontext) -> Need:
    """What a step needs. kernel: whose attention, None: the device's own; undo: with the copies that a device which works ahead of the host takes; around: a context
    manager that the step is done in."""
    models, lora = model(folder, case, device)
    frozen = [parameter for parameter in models.unet.parameters() if not parameter.requires_grad]
    own = [parameter for adapter in lora.adapters.values() for parameter in adapter.parameters()]
    weights, text = stored_bytes(models.unet) - sum(parameter.nbytes for parameter in own), text_of(models, case.batch).to(device)
    objective = DiscreteObjective(models.family.alphas_cumprod(models))
    step = DenoisingStep(models, objective, make_loss("mse", 1.0), lambda prompts: text, device, case.dtype)
    batch = blank_batch((case.batch, case.pixels, case.pixels), (8, models.unet.config.in_channels))
    parts = [part for parameter in frozen for part in (parameter.parts if isinstance(parameter.data, Quantized) else (parameter,))]
    with Live(device, [*parts, *own, *models.unet.buffers(), text.hidden]) as live:
        groups = lora.param_groups()
        shadow = Shadow(list(lora.adapters.values()), case.dtype) if case.dtype in HALF else None
        gradients, optimizer = Gradients(groups, device), torch.optim.AdamW(optimizer_groups(groups, 1.0), foreach=False)
        optimizer.step()  # it makes its moments now
        live.peak = held = live.now
        with around(), attention(kernel) if kernel else nullcontext():
            _step(step, batch, gradients, optimizer, shadow, Undo(optimizer, gradients.parameters) if undo else None)
    assert live.now == held, "a step leaves nothing behind"
    return Need(weights, held + (0 if shadow else sum(parameter.nbytes for parameter in own)), live.peak - held)


def _step(step: DenoisingStep, batch, gradients: Gradients, optimizer: torch.optim.Optimizer, shadow: Shadow | None, undo: Undo | None) -> None:
    """As Trainer does one; nothing of it is held afterwards."""
    gradients.clear()
    with shadow.fresh() if shadow else nullcontext():
        step.losses(batch).sum().backward()
    gradients.clip(1.0)
    if undo:
        undo.remember()
    optimizer.step()
    if undo:
        undo.take_back(torch.zeros((), dtype=torch.bool, device=gradients.flat.device))


def encoding(folder: Path, pixels: int) -> int:
    """Bytes that the VAE takes to encode an image, in fp32 as a run does it, before there is anything else."""
    family, place = detect(Folder(folder)), Folder(folder)
    vae = empty(family._kind("vae"), place.config("vae"), str(folder)).requires_grad_(False).eval()
    models, image = Models(family, folder, folder.name, {"vae": vae}, {}, {}), torch.zeros(1, 3, pixels, pixels, device=META)
    with Live(META, [*vae.parameters(), *vae.buffers()]) as live, torch.no_grad():
        family.posterior(models, image)
    return stored_bytes(vae) + image.nbytes + live.peak


# ---- tables -----------------------------------------------------------------------------------------------------------------------------------------

NOTHING = "–"
CARD = {"en": "card", "zh": "显卡"}
SAVING = {"en": {True: "with checkpointing, ", False: "without checkpointing, "}, "zh": {True: "开启梯度检查点，", False: "不开启梯度检查点，"}}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def largest(sums: Sums, card: int, checkpointing: bool, quantize: str | None) -> str:
    """The largest of the batches that a card has room for."""
    fits = [batch for (batch, *rest), size in sums.items() if rest == [checkpointing, quantize] and size <= (card - BESIDE) * GIB]
    return str(max(fits, default=NOTHING))


def tables(sums: Sums, language: str) -> str:
    """The sums in GiB, and the largest batch for each card."""
    kinds = [f"`quantize: {kind or 'null'}`" for kind in QUANTIZE]
    needs = [["`gradient_checkpointing`", "`batch_size`", *kinds]]
    for checkpointing, batch in dict.fromkeys((checkpointing, batch) for batch, checkpointing, _ in sums):
        needs.append([str(checkpointing).lower(), str(batch), *(f"{sums[batch, checkpointing, kind] / GIB:.1f}" for kind in QUANTIZE)])
    ways = list(product((True, False), QUANTIZE))
    fits = [[CARD[language], *(f"{SAVING[language][checkpointing]}`quantize: {kind or 'null'}`" for checkpointing, kind in ways)]]
    fits += [[f"{card} GB", *(largest(sums, card, *way) for way in ways)] for card in CARDS]
    return f"{table(needs)}\n{table(fits)}"


def count(family: str, args: argparse.Namespace) -> Sums:
    """Bytes of each case; those of a family's own size where no other is asked for."""
    sums = {}
    for checkpointing, batch, kind in product((True, False), args.batch, QUANTIZE):
        found = need(CONFIGS / family, Case(args.pixels or SIDES[family], batch, args.rank, DTYPES[args.dtype], kind, checkpointing))
        sums[batch, checkpointing, kind] = found.sum
        parts = ", ".join(f"{name} {getattr(found, name) / MIB:.0f}" for name in ("weights", "adapters", "activations"))
        print(f"{family}, batch {batch}, checkpointing {str(checkpointing).lower()}, quantize {kind or 'null'}: {found.sum / MIB:.0f} MiB ({parts})", flush=True)
    return sums


def write(family: str, sums: Sums) -> None:
    """Replaces the family's tables in the guides of both languages."""
    for language, guide in GUIDES.items():
        begin, end, page = f"<!-- counted: {family} -->", f"<!-- end: {family} -->", guide.read_text("utf-8")
        before, _, rest = page.partition(begin)
        if not rest:
            raise SystemExit(f"error: {guide} has no line {begin}")
        guide.write_text(f"{before}{begin}\n{tables(sums, language)}{end}{rest.partition(end)[2]}", "utf-8")


def main() -> None:
    """Counts and prints the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--family", choices=list(SIDES), help="default: both")
    options.add_argument("--pixels", type=int, help="of a side (default: the model's own)")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    options.add_argument("--write", action="store_true", help="also put the tables into the guides")
    args = options.parse_args()
    for family in [args.family] if args.family else SIDES:
        sums, pixels = count(family, args), args.pixels or SIDES[family]
        print(f"encoding an image of {pixels} x {pixels} before that: {encoding(CONFIGS / family, pixels) / MIB:.0f} MiB\n\n{tables(sums, 'en')}", flush=True)
        if args.write:
            write(family, sums)


if __name__ == "__main__":
    main()

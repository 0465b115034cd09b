"""One layer with a LoRA, forward and backward, to the frozen layer alone: ours, peft's, and through a weight that has the LoRA merged in.

    python benchmarks/layers.py --threads 1                        # the layers of SD1.5 at 512 px, rank 8, fp32
    python benchmarks/layers.py --device cuda --dtype bf16
    python benchmarks/layers.py --shape 64 32 256 --rounds 1       # one layer: tokens, width of the input, width of the output

`merged` is the best that this route can do: W + s up down is made anew in every step, since every step changes up and down; one product each
in forward and backward does the base and the LoRA together; the factors' gradients come from rank-sized products. It is measured to know
whether `ours`, which keeps the LoRA beside the weight, should give way to it anywhere. In half precision it would round the LoRA's effect away; the factors are
fp32 on both sides. A turn is as many calls as take a while, and what a step does once is done once in it and timed: our copies of the factors, and the casts that
autocast keeps for peft. `peft plain` is without autocast: peft casts by itself, in every call.
"""

import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch
from common import Figure, in_turn, parser, ratios, show
from peft.tuners.lora import Linear as PeftLinear
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from hcpdiff.adapters.base import put
from hcpdiff.adapters.lora import HALF, Lora
from hcpdiff.adapters.shadow import Shadow

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(4096, 320, 320), (4096, 320, 2560), (1024, 640, 640), (1024, 640, 5120), (256, 1280, 1280), (256, 1280, 10240)]  # tokens, in, out
WANTED = 0.01  # seconds that a measurement takes at least: a call is repeated so often


class _Merged(torch.autograd.Function):
    """y = x (W + s up down)^T + b."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale):
        whole = torch.addmm(weight, up, down, alpha=scale)
        ctx.save_for_backward(x, whole, down, up)
        ctx.scale = scale
        return F.linear(x, whole, bias)

    @staticmethod
    def backward(ctx, g):
        x, whole, down, up = ctx.saved_tensors
        gh, h = (up.t() @ g.t()).t(), x @ down.t()
        return g @ whole, None, None, (gh.t() @ x).mul_(ctx.scale), (h.t() @ g).t().mul_(ctx.scale), None


@dataclass(frozen=True)
class Way:
    """A function of x (N, in) that gives y (N, out), and what it is called in, once for all calls of a turn."""

    forward: Callable[[Tensor], Tensor]
    around: Callable[[], AbstractContextManager] = nullcontext

    def turn(self, x: Tensor, g: Tensor, times: int) -> None:
        """Forward and backward so often."""
        with self.around():
            for _ in range(times):
                self.forward(x).backward(g)


def ways(layer: nn.Linear, rank: int) -> dict[str, Way]:
    """On the same frozen weight."""
    lora = Lora(layer, rank, rank)
    lora.reset(torch.rand_like(lora.down))
    base = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
    base.weight, base.bias = layer.weight, layer.bias
    peft = PeftLinear(base, "default", LoraConfig(r=rank, lora_alpha=rank), r=rank, lora_alpha=rank)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    put(layer, lora)
    if layer.weight.dtype in HALF:
        device, dtype = layer.weight.device.type, layer.weight.dtype
        return {"floor": Way(base), "peft": Way(peft, lambda: torch.autocast(device, dtype)), "peft plain": Way(peft), "ours": Way(layer, Shadow([lora], dtype).fresh)}
    down, up = lora.down.detach().clone().requires_grad_(), lora.up.detach().clone().requires_grad_()
    merged = Way(lambda x: _Merged.apply(x, layer.weight, layer.bias, down, up, lora.scale))
    return {"floor": Way(base), "peft": Way(peft), "ours": Way(layer), "merged": merged}


def measure(args) -> list[Figure]:
    """For each layer: ours to the floor, to peft's, and to peft's without autocast or to the merged weight."""
    figures = []
    for tokens, width, out in args.shape or SHAPES:
        like = {"device": args.device, "dtype": DTYPES[args.dtype]}
        x, g = torch.randn(args.batch * tokens, width, requires_grad=True, **like), torch.randn(args.batch * tokens, out, **like)
        layer = nn.Linear(width, out, **like).requires_grad_(False)
        found = ways(layer, args.rank)
        times = max(1, round(WANTED / statistics.median(in_turn({"floor": lambda: found["floor"].turn(x, g, 1)}, 3, args.device)["floor"])))
        seconds = in_turn({name: lambda way=way: way.turn(x, g, times) for name, way in found.items()}, args.rounds, args.device)
        label = f"layer, {args.batch * tokens} tokens, {width} to {out}, {args.dtype}"
        for name in [name for name in found if name != "ours"]:
            values = {f"{which} ms": 1000 * statistics.median(seconds[which]) / times for which in ("ours", name)}
            figures.append(Figure(label, name, ratios(seconds["ours"], seconds[name]), 1.0 if name.startswith("peft") else None, values=values))
    return figures


def main() -> None:
    """Measures and prints the table."""
    made = parser(__doc__, rounds=15)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--dtype", choices=DTYPES, default="fp32")
    made.add_argument("--shape", type=int, nargs=3, action="append", metavar=("TOKENS", "IN", "OUT"), help="a layer in the place of SD1.5's; may be given several times")
    args = made.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    show(f"rank {args.rank}: forward and backward of one layer with ours to that of another way", measure(args), args)


if __name__ == "__main__":
    main()

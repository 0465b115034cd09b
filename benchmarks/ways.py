"""Ways to train the same LoRA on the same frozen UNet: ours, and the references that it is measured against.

Each is a context manager: inside, the UNet carries that way's adapters, and `step()` does forward, backward, clipping and AdamW (torch's fused one, in all) on
the batch and returns the loss; `step.trained` counts the numbers that it learns. Afterwards the UNet is as it was. The references are written here, in the
manner of their models.

floor    the frozen model alone: forward, and backward to the output of every layer that would be trained, without which nothing is learnt
loop     a plain loop with peft's LoRA; latents and text encoded ahead; in half precision under autocast, as diffusers' example is run
loop plain  the same without autocast: peft casts by itself
example  the same with VAE and text encoder in every step, as diffusers' train_text_to_image_lora has them
hooks    a layer's forward replaced by one that calls the old one and adds the product of two small Linears, as sd-scripts does
ours     hcpdiff's adapters, half-precision copies of them, gradient buffer, clipping and fused AdamW
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hcpdiff.adapters.base import adapted_layers, detach, put
from hcpdiff.adapters.lora import HALF, Lora
from hcpdiff.adapters.shadow import Shadow
from hcpdiff.train.optim import Gradients, optimizer_groups
from hcpdiff.trainables.lora import ParamGroup

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")  # attention and feed-forward: kohya's default set without proj_in/out
LR, MAX_NORM = 1e-4, 1.0


@dataclass
class Batch:
    """What a step trains on. `encode` gives latents and text afresh, for `example`; `compiled`: the model's blocks are; `rows`: how many samples are taken, None
    for all; the rest is as it comes out of caches."""

    noisy: Tensor
    t: Tensor
    hidden: Tensor
    target: Tensor
    added: dict[str, Tensor] | None = None
    encode: Callable[[], tuple[Tensor, Tensor]] | None = None
    compiled: bool = False
    rows: int | None = None

    def loss(self, unet: nn.Module, noisy: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """Mean squared error in fp32."""
        noisy, hidden = (own if other is None else other for own, other in ((self.noisy, noisy), (self.hidden, hidden)))
        added = self.added and {name: value[: self.rows] for name, value in self.added.items()}
        pred = unet(noisy[: self.rows], self.t[: self.rows], hidden[: self.rows], added_cond_kwargs=added).sample
        return nn.functional.mse_loss(pred.float(), self.target[: self.rows].float())


@dataclass(frozen=True)
class Step:
    """A step to call, and how many numbers it trains."""

    run: Callable[[], Tensor]
    trained: int = 0

    def __call__(self) -> Tensor:
        """The loss."""
        return self.run()


def targets(unet: nn.Module) -> dict[str, nn.Linear]:
    """Path -> layer of all that is trained."""
    return {path: layer for path, layer in unet.named_modules() if path.endswith(TARGETS) and ".attentions." in f".{path}"}


class _Learnt(torch.autograd.Function):
    """A tensor as it is, to which the backward pass has to come: of its gradient one number goes on to `anchor`, or a compiler would leave all of it out."""

    @staticmethod
    def forward(ctx, out, anchor):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, g):
        return g, g[(0,) * g.dim()].float()


def _marked(out: Tensor, anchor: Tensor) -> Tensor:
    """For a compiler."""
    return out if out.requires_grad else _Learnt.apply(out, anchor)


def _needs_gradient(out: Tensor, anchor: Tensor) -> Tensor:
    """The same without a compiler, for nothing."""
    return out if out.requires_grad else out.requires_grad_()


@contextmanager
def floor(unet: nn.Module, batch: Batch, rank: int) -> Iterator[Step]:
    def step() -> Tensor:
        loss = batch.loss(unet)
        loss.backward()
        return loss.detach()

    anchor = torch.zeros((), device=batch.noisy.device, requires_grad=True)
    mark = _marked if batch.compiled else _needs_gradient
    marks = [layer.register_forward_hook(lambda module, args, out: mark(out, anchor)) for layer in targets(unet).values()]
    try:
        yield Step(step)
    finally:
        for handle in marks:
            handle.remove()


def _fused(batch: Batch) -> bool:
    """Whether AdamW is torch's fused one."""
    return batch.noisy.device.type != "meta"


def _plain(parameters: list[nn.Parameter], loss_of: Callable[[], Tensor], batch: Batch, autocast: bool = True) -> Step:
    """A step as a plain loop has it: in half precision under autocast, as diffusers' example and sd-scripts are run, or without."""
    optimizer, device, dtype = torch.optim.AdamW(parameters, lr=LR, fused=_fused(batch)), batch.noisy.device.type, batch.noisy.dtype

    def step() -> Tensor:
        with torch.autocast(device, dtype) if dtype in HALF and autocast else nullcontext():
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Step(step, _count(parameters))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@contextmanager
def _peft(unet: nn.Module, rank: int) -> Iterator[list[nn.Parameter]]:
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=sorted(targets(unet))))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    try:
        yield parameters
    finally:
        unet.delete_adapters("default")
        for path, layer in [(path, layer) for path, layer in unet.named_modules() if isinstance(layer, BaseTunerLayer)]:
            parent, _, name = path.rpartition(".")
            setattr(unet.get_submodule(parent), name, layer.get_base_layer())
        unet._hf_peft_config_loaded = False


@contextmanager
def loop(unet: nn.Module, batch: Batch, rank: int) -> Iterator[Step]:
    with _peft(unet, rank) as parameters:
        yield _plain(parameters, lambda: batch.loss(unet), batch)


@contextmanager
def loop_plain(unet: nn.Module, batch: Batch, rank: int) -> Iterator[Step]:
    with _peft(unet, rank) as parameters:
        yield _plain(parameters, lambda: batch.loss(unet), batch, autocast=False)


@contextmanager
def example(unet: nn.Module, batch: Batch, rank: int) -> Iterator[Step]:
    def loss_of() -> Tensor:
        with torch.no_grad():
            latents, hidden = batch.encode()
        return batch.loss(unet, batch.noisy + 0 * latents, batch.hidden + 0 * hidden)  # encoded, and then the same numbers as the others'

    with _peft(unet, rank) as parameters:
        yield _plain(parameters, loss_of, batch)


@contextmanager
def hooks(unet: nn.Module, batch: Batch, rank: int) -> Iterator[Step]:
    layers, parameters = targets(unet), []

    def patched(layer: nn.Linear, down: nn.Linear, up: nn.Linear) -> Callable[[Tensor], Tensor]:
        old = layer.forward
        return lambda x: old(x) + up(down(x))

    for layer in layers.values():
        down, up = (nn.Linear(*shape, bias=False, device=layer.weight.device) for shape in ((layer.in_features, rank), (rank, layer.out_features)))
        nn.init.zeros_(up.weight)
        parameters += [down.weight, up.weight]
        layer.forward = patched(layer, down, up)
    try:
        yield _plain(parameters, lambda: batch.loss(unet), batch)
    finally:
        for layer in layers.values():
            del layer.forward


@contextmanager
def ours(unet: nn.Module, batch: Batch, rank: int) -> Iterator[Step]:
    for layer in targets(unet).values():
        lora = Lora(layer, rank, rank)
        lora.reset(torch.rand_like(lora.down))
        put(layer, lora)
    loras = [layer.adapter for layer in adapted_layers(unet).values()]
    shadow = Shadow(loras, batch.noisy.dtype) if batch.noisy.dtype in HALF and not batch.compiled else None
    group = ParamGroup("unet", LR, tuple(p for lora in loras for p in lora.parameters()))
    gradients, optimizer = Gradients([group], batch.noisy.device), torch.optim.AdamW(optimizer_groups([group], 1.0), fused=_fused(batch))

    def step() -> Tensor:
        gradients.clear()
        with shadow.fresh() if shadow else nullcontext():
            loss = batch.loss(unet)
            loss.backward()
        gradients.clip(MAX_NORM)
        optimizer.step()
        return loss.detach()

    try:
        yield Step(step, _count(group.parameters))
    finally:
        detach(unet)


WAYS = {"floor": floor, "loop": loop, "loop plain": loop_plain, "example": example, "hooks": hooks, "ours": ours}

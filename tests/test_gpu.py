"""What only a GPU reaches; skipped without one."""

import contextlib
import copy
import gc
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from data_help import filled, folder_of
from safetensors.torch import load_file
from test_quantized import BOTH, LAYERS, pair, ways
from test_run import CONFIG, train  # noqa: F401 - the fixture
from test_step_reference import Setup, make_batch
from tiny import make_unet, make_vae
from torch.nn.attention import SDPBackend, sdpa_kernel

from hcpdiff import device as machine
from hcpdiff.adapters.base import put
from hcpdiff.adapters.lora import Lora
from hcpdiff.adapters.shadow import Shadow
from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.data.sample import load_views, stack_pixels
from hcpdiff.families import detect
from hcpdiff.families.base import Models
from hcpdiff.families.read_parts import move
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.quantized import Plan, Quantized, stored_bytes
from hcpdiff.train.compiled import compile_regions
from hcpdiff.train.conditioning import Encoder, FrozenText
from hcpdiff.train.latents import _encoder
from hcpdiff.train.optim import Gradients, optimizer_groups
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.parts import make_optimizer
from hcpdiff.train.run import Run
from hcpdiff.train.signals import StopRequest
from hcpdiff.train.trainer import Hook, Trainer
from hcpdiff.trainables.lora import ParamGroup

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def full_products(monkeypatch):
    """fp32 in fp32: torch lets convolutions round their inputs to ten bits else."""
    for products in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(products, "allow_tf32", False)


def on_gpu(dtype: torch.dtype) -> Setup:
    setup = Setup(dtype=torch.float32)
    device = torch.device("cuda")
    setup.unet.to(device)
    for path, module in setup.unet.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and not path.endswith("adapter"):
                parameter.data = parameter.data.to(dtype)
    setup.hidden = setup.hidden.to(device, dtype)
    setup.step.device, setup.step.dtype = device, dtype
    setup.step.objective = replace(setup.step.objective, alphas_cumprod=setup.step.objective.alphas_cumprod.to(device))
    return setup


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.02)])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(dtype, tolerance):
    reference, ours = Setup(dtype=torch.float32), on_gpu(dtype)
    batch = make_batch(dtype=torch.float32)
    expected, loss = reference.step.loss(batch), ours.step.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    expected.backward()
    loss.backward()
    pairs = zip(reference.trainable.adapters.values(), ours.trainable.adapters.values())
    flat = [torch.cat([p.grad.flatten().cpu() for lora in side for p in lora.parameters()]) for side in zip(*pairs)]
    assert torch.dot(*flat) / flat[0].norm() / flat[1].norm() > 1 - tolerance
    assert all(p.grad.dtype == torch.float32 for lora in ours.trainable.adapters.values() for p in lora.parameters())


def test_auto_precision_and_words_for_the_device():
    assert machine.compute_dtype("auto", torch.device("cuda", 0)) in (torch.bfloat16, torch.float16)
    assert "GiB" in machine.describe(torch.device("cuda", 0)) and "GiB" in machine.peak_memory(torch.device("cuda", 0))


def test_attention_of_a_half_precision_unet_runs_in_kernels_that_hold_no_scores():
    dtype = machine.compute_dtype("auto", torch.device("cuda", 0))
    unet = make_unet(widths=(128, 256, 256, 256)).requires_grad_(False).cuda().to(dtype)
    assert machine.set_attention(unet, "auto", "model.attention") == "sdpa"
    x = torch.randn(2, 4, 8, 8, device="cuda", dtype=dtype, requires_grad=True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        unet(x, torch.tensor([500], device="cuda"), torch.randn(2, 77, 32, device="cuda", dtype=dtype)).sample.float().square().mean().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_what_is_expanded_can_be_sent():
    rows = torch.tensor([[1, 2]]).expand(3, 2)
    assert torch.equal(machine.send(rows, torch.device("cuda")).cpu(), rows)


class Steps:
    """Batches 0 to 5; those of `bad` have a NaN in a latent."""

    def __init__(self, bad):
        self.bad = bad

    def batches(self, start, rank, world, first_index, count):
        for step in range(count):
            batch = make_batch(seed=step, dtype=torch.float32)
            batch.latent_mean[1, 0, 0, 0] = math.nan if step in self.bad else 0.0
            yield step, [SimpleNamespace(epoch=0)], [batch]

    def names(self, step, world):
        return [[[(f"{step}.{i}", 1 / 3) for i in range(3)]]]


def trained(bad=(), lag=True, fp16=False, hooks=(), make=torch.optim.AdamW):
    setup = on_gpu(torch.float32)
    groups = setup.trainable.param_groups()
    trainer = Trainer(feed=Steps(bad), loss=setup.step.losses, gradients=Gradients(groups, torch.device("cuda"), samples=3), optimizer=make(optimizer_groups(groups, 1.0)),
                      lr_factor=lambda step: 1.0, parallel=SimpleNamespace(rank=0, world=1, sum_=lambda t: t), hooks=hooks, total_steps=6, max_grad_norm=1.0, max_nonfinite=5,
                      fp16=fp16, lag=lag)
    trainer.state.positions = [SimpleNamespace(epoch=0)]
    try:
        trainer.fit(StopRequest())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return trainer


@pytest.mark.parametrize("fp16", [False, True])
def test_no_step_but_the_first_waits_for_the_gpu(fp16):
    strict = Hook()
    strict.on_step_end = lambda trainer: torch.cuda.set_sync_debug_mode("error")
    strict.on_end = lambda trainer: torch.cuda.set_sync_debug_mode("default")
    assert trained(bad=(2, 3), fp16=fp16, hooks=[strict]).state.skipped == 2


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda g: torch.optim.AdamW(g, fused=True), lambda g: torch.optim.SGD(g, momentum=0.9)])
def test_what_the_host_learns_late_is_what_it_learns_at_once(make):
    late, once = (trained(bad=(0, 2, 3), lag=lag, make=make) for lag in (True, False))
    assert late.state.skipped == once.state.skipped == 3
    assert [str(skip) for skip in late.take_skips()] == [str(skip) for skip in once.take_skips()]
    for ours, theirs in zip(late.gradients.parameters, once.gradients.parameters):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    states = [[state["step"] for state in trainer.optimizer.state.values() if "step" in state] for trainer in (late, once)]
    assert [float(step) for step in states[0]] == [float(step) for step in states[1]]


@BOTH
def test_a_quantized_weight_has_the_same_numbers_on_the_gpu(code):
    """But for the last bit of a scale, since a GPU divides by a number by multiplying, and a weight in the middle between two codes that may follow from it."""
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    here, there = (Quantized.of(weight.to(device), code, torch.float32) for device in ("cpu", "cuda"))
    assert torch.equal(here.dense(), here.to("cuda").dense().cpu())
    torch.testing.assert_close(there.scales.cpu(), here.scales, rtol=3e-7, atol=0)
    assert (here.codes != there.codes.cpu()).sum() <= 3 and (there.dense().cpu() - here.dense()).norm() < 0.01 * here.dense().norm()


@BOTH
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_on_a_quantized_layer_is_that_on_the_dense_one_and_waits_for_nothing(name, code, dtype):
    layer, dense, x = pair(name, code, dtype, 4)
    x = x.detach().cuda().requires_grad_()
    layer.cuda(), dense.cuda()
    expected = ways(dense, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ways(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize("choice,most", [("int8", 0.56), ("nf4", 0.5)])
def test_a_quantized_model_takes_so_much_of_the_gpu(choice, most):
    """At most, not only afterwards: no dense weight is kept for the backward pass, and of one layer there are two or three in the making."""
    unet = make_unet(widths=(128, 256, 256, 256)).requires_grad_(False).to(torch.bfloat16)
    dense, largest = stored_bytes(unet), max(parameter.nbytes for parameter in unet.parameters())
    unet.cuda()
    beside_weights(unet)  # the first time libraries take memory that they keep
    beside = beside_weights(unet)
    move(unet, torch.device("cpu"), Plan(choice, ["conv_in", "conv_out"]).keeper(unet))
    before = allocated()
    unet.cuda()
    assert stored_bytes(unet) <= most * dense
    assert torch.cuda.max_memory_allocated() - before <= stored_bytes(unet) + 512 * 3 * len(list(unet.parameters()))  # rounded up to 512
    assert beside_weights(unet) <= beside + 4 * largest < beside + dense / 2


def allocated() -> int:
    """Bytes that tensors take on the GPU; the most is counted from here on."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def beside_weights(unet) -> int:
    """The most that a forward and backward pass takes beside what is there before."""
    torch.manual_seed(0)
    x, t, hidden = torch.randn(1, 4, 8, 8).cuda().bfloat16().requires_grad_(), torch.tensor([500]).cuda(), torch.randn(1, 7, 32).cuda().bfloat16()
    before = allocated()
    unet(x, t, hidden).sample.float().square().sum().backward()
    assert x.grad.isfinite().all()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_latents_cached_beside_the_gpu_are_those_of_each_image_alone(mode, tmp_path):
    """They come down while later images are encoded: a copy that was looked at too early would show."""
    vae = make_vae().cuda().eval().requires_grad_(False)
    models = Models(StableDiffusion(), None, "tiny", {"vae": vae}, {}, {})
    encode = _encoder(models, torch.device("cuda"))
    data, _ = filled(folder_of(tmp_path / "imgs", 40), tmp_path / "c", Counting(encode), mode=mode)
    one = data.datasets[0]
    for number in range(len(one)):
        pixels = stack_pixels([load_views(one, number, one.views(number)[:1], 8)[0][0]])
        entry, fresh = data._stores[0].get(number, 0), [part[0].cpu() for part in encode(pixels)]
        assert all(torch.equal(entry[name], part) and not entry[name].is_pinned() for name, part in zip(("mean", "std"), fresh))


class Counting:
    """An encoder whose results stay on the device."""

    def __init__(self, encode):
        self.encode, self.calls = encode, 0

    def __call__(self, pixels):
        self.calls += 1
        found = self.encode(pixels)
        assert all(part.is_cuda for part in found)
        return found


def test_adamw_is_fused_and_goes_on_exactly_from_its_state():
    """State of the step lies on the GPU, as `load_state_dict` of a fused optimizer puts it."""
    def made():
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 64, device="cuda"))
        cfg = SimpleNamespace(train=SimpleNamespace(optimizer={"_target_": "torch.optim.AdamW"}, scale_lr=False))
        return weight, make_optimizer([ParamGroup("a", 1e-2, (weight,))], cfg, 1, ())

    (whole, one), (first, two), (second, three) = made(), made(), made()
    assert one.param_groups[0]["fused"]
    for step in range(6):
        optimizer, weight = (two, first) if step < 3 else (three, second)
        if step == 3:
            state = copy.deepcopy(two.state_dict())
            state["state"][0]["step"] = state["state"][0]["step"].cpu()  # as it comes from a file
            three.load_state_dict(state)
            second.data.copy_(first)
        for parameter in (whole, weight):
            parameter.grad = torch.cos(torch.arange(64.0, device="cuda") + step)
        one.step()
        optimizer.step()
    assert torch.equal(whole, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_of_the_weights_give_the_gradients_that_casting_gives(dtype):
    """Of a whole UNet, and so within rounding: backward kernels of attention add up in no fixed order, and a sum near zero may be any other one near zero. That layers
    get the same bits is held on the CPU (test_shadow.py)."""
    setup, batch = on_gpu(dtype), make_batch(dtype=torch.float32)
    loras, found = list(setup.trainable.adapters.values()), []
    for shadow in (None, Shadow(loras, dtype)):
        with shadow.fresh() if shadow else contextlib.nullcontext():
            setup.step.loss(batch).backward()
        found.append([p.grad.clone() for lora in loras for p in lora.parameters()])
        setup.unet.zero_grad()
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("relative", [1e-4, 1e-3])
@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_keeps_the_effect_compiled_too(relative, compiled):
    """With an elementwise operation behind it, for which inductor would take a sum of products apart."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(1024, 1024).bfloat16().cuda().requires_grad_(False)
    lora = Lora(layer, 8, 4)
    lora.reset(torch.rand_like(lora.down))
    with torch.no_grad():
        lora.up.normal_()
        lora.up.mul_(relative * layer.weight.float().norm() / (lora.scale * lora.up @ lora.down).norm())
        x = torch.randn(16384, 1024, device="cuda").bfloat16()
        base = layer(x).float()
        put(layer, lora)
        true = lora.scale * (x.float() @ lora.down.t() @ lora.up.t())

        def run(x):
            return layer(x) * 2

        y = (torch.compile(run, fullgraph=True) if compiled else run)(x).float() / 2
        assert abs(((y - base) * true).sum() / true.square().sum() - 1) < 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sizes", [1, 2])
def test_a_compiled_step_is_the_step(sizes, checkpointing):
    setup = on_gpu(torch.float32)
    batches = [make_batch(size, dtype=torch.float32) for size in (3, 2)[:sizes]]
    if checkpointing:
        setup.unet.train().enable_gradient_checkpointing()

    def grads():
        setup.unet.zero_grad()
        for batch in batches:
            setup.step.loss(batch).backward()
        return torch.cat([p.grad.flatten() for lora in setup.trainable.adapters.values() for p in lora.parameters()])

    eager = grads()
    compile_regions(setup.step.models, ["unet"], {(len(batch.prompts), 64, 64) for batch in batches}, "sdpa")
    ours = grads()
    assert (ours - eager).norm() / eager.norm() < 1e-3


def test_weights_of_an_outline_come_straight_to_the_gpu(tiny_sd1):
    family = detect(tiny_sd1)
    outline, whole = (family.load(tiny_sd1, "m", ["unet"], torch.bfloat16, outlines=names) for names in (["unet"], []))
    before = allocated()
    outline.read("unet", torch.device("cuda"))
    most, state = torch.cuda.max_memory_allocated() - before, outline.unet.state_dict()
    assert all(tensor.is_cuda and torch.equal(tensor.cpu(), whole.unet.state_dict()[name]) for name, tensor in state.items())
    assert most <= 1.02 * sum(-(-tensor.nbytes // 512) * 512 for tensor in state.values()), "at no time is a weight held twice"


def test_prompts_do_not_depend_on_what_was_encoded_beside_them_and_the_encoder_goes_home(tiny_sd1):
    models = detect(tiny_sd1).load(tiny_sd1, "m", ["text_encoder"], torch.bfloat16)
    prompts = [f"a picture of {number} cats" for number in range(37)]
    found = []
    for asked in (prompts, prompts[20:], prompts[::-1]):
        text = FrozenText(Encoder(models, 1, 0), SimpleNamespace(prompts_ahead=lambda *_, asked=asked: (asked, True)), torch.device("cuda"))
        text.ahead(None, 1)
        assert text.whole and not any(p.is_cuda for p in models.text_encoder.parameters())
        found.append(text(prompts[20:22]).hidden)
        assert found[-1].is_cuda and "" in text.cache, "the probe asks for empty prompts"
    assert all(torch.equal(found[0], other) for other in found[1:])


# ---- whole runs -------------------------------------------------------------------------------------------------------------------------------------

LEARNS = "mixed_precision=bf16", "train.optimizer={_target_: torch.optim.AdamW}", "lora_unet=[{lr: 0.001, rank: 2, layers: ['re:.*attn.?$', 're:.*resnets$']}]"
DRAWS = "preview.prompts=[red, blue]", "preview.every=2", "preview.num_inference_steps=2", "preview.bs=2"


@pytest.mark.parametrize("overrides", [(), ("model.quantize=nf4",), ("model.gradient_checkpointing=true",), ("mixed_precision=fp16",),
                                       pytest.param(("model.compile=true",), marks=pytest.mark.long),
                                       pytest.param(("model.compile=true", "model.quantize=int8"), marks=pytest.mark.long)], ids=" ".join)
def test_a_run_trains_draws_saves_and_goes_on(train, overrides):  # noqa: F811
    """Batches of 2, one of which is a part of an epoch."""
    keys = *LEARNS, *DRAWS, *overrides
    run, log, losses = train(*keys, "train.train_steps=4", "train.save_step=2")
    assert run.device.type == "cuda" and re.search(r"largest batch \(2 x 64 x 64\) fits: peak memory \d", log)
    assert len(losses) == 4 and all(map(math.isfinite, losses)) and "warning" not in log
    resumed, log, losses = train(*keys, "train.train_steps=6", "train.save_step=2", f"train.resume={run.folder}", f"exp_dir={run.folder}")
    assert resumed.folder == run.folder and len(losses) == 6 and "warning" not in log
    assert sorted(path.name for path in (run.folder / "previews").iterdir()) == [f"{step}-{number}.png" for step in (2, 4, 6) for number in (0, 1)]
    saved = [load_file(run.folder / "ckpts" / f"unet-{step}.safetensors") for step in (4, 6)]
    ups = [name for name in saved[0] if "to_v.lora_up" in name]  # where a picture is one token, queries and keys decide nothing
    assert ups and all(tensor.isfinite().all() for tensors in saved for tensor in tensors.values())
    assert all(saved[0][name].any() and not torch.equal(saved[0][name], saved[1][name]) for name in ups)


class Strict(Run):
    """Any wait for the GPU is an error in all steps but the first, with what is between them: the next batch, the log."""

    def _hooks(self):
        strict = Hook()
        strict.on_step_end = lambda trainer: torch.cuda.set_sync_debug_mode("error")
        strict.on_end = lambda trainer: torch.cuda.set_sync_debug_mode("default")
        return [strict, *super()._hooks()]


WORDS = "lora_text_encoder=[{lr: 0.001, rank: 2, layers: ['re:.*self_attn$']}]"


@pytest.mark.parametrize("model", ["tiny_sd1", "tiny_sdxl"])
@pytest.mark.parametrize("overrides", [(), (WORDS,), ("model.quantize=int8",), ("mixed_precision=fp16", "train.gradient_accumulation_steps=2"),
                                       ("data.one.source.a.caption_file=images", "train.loss.min_snr_gamma=5", "train.noise_offset=0.1"),
                                       pytest.param(("model.compile=true", "data.one.batch_size=3"), marks=pytest.mark.long)], ids=" ".join)
def test_no_step_of_a_real_run_but_the_first_waits_for_the_gpu(train, tmp_path, request, model, overrides):  # noqa: F811
    """`train` makes the images and the folder."""
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=request.getfixturevalue(model)), encoding="utf-8")
    for number in range(3):
        (tmp_path / "images" / f"{number}.txt").write_text(f"caption {number}", "utf-8")
    strict = Strict(load("cfg.yaml", ["exp_dir=strict", "train.train_steps=6", "train.save_step=null", *LEARNS, *overrides], RunConfig), Parallel())
    try:
        assert strict.train() == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")

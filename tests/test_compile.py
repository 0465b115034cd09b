"""`model.compile`: blocks compiled in place give the numbers that they give without, for every kind of layer and mode. aot_eager goes through the same capture and
the same autograd as inductor without writing kernels; inductor itself is tried on one block."""

import logging
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import run_help
import torch
from PIL import Image
from safetensors.torch import load_file
from test_adapters import LAYERS, adapted
from test_run import CONFIG
from tiny import make_text_encoder
from torch import nn
from torch.utils.checkpoint import checkpoint

from hcpdiff import device as machine
from hcpdiff.adapters.base import adapted_layers, put
from hcpdiff.adapters.lora import Lora
from hcpdiff.errors import ConfigError
from hcpdiff.families.base import Models
from hcpdiff.families.read_parts import CPU, move
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.quantized import Plan
from hcpdiff.train import compiled
from hcpdiff.train.hooks import LogHook

MOST = 64


@pytest.fixture(autouse=True)
def fresh():
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # pytest would keep all of a compiler's trace, which takes longer than to compile
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=MOST):
        yield
    torch._dynamo.reset()


def everything(run, lora, x):
    """Result and gradients of x, down, up."""
    torch.manual_seed(3)
    y = run(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, lora.down, lora.up])]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_is_the_layer(name, dropout):
    layer, lora, x = adapted(name, dropout=dropout)
    for ours, eager in zip(everything(torch.compile(layer.forward, backend="aot_eager", fullgraph=True), lora, x), everything(layer, lora, x)):
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_under_autocast_is_the_layer_under_autocast(name):
    """fp32 weights, as a caller's own loop may have them. Graphs and the passes without one see the same roundings, so little more than the last bit may differ."""
    layer, lora, x = adapted(name, torch.float32, dropout=0.5)
    run = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = [everything(way, lora, x) for way in (run, lambda x: checkpoint(run, x, use_reentrant=False), layer)]
    for ours, again, eager in zip(*found):
        assert torch.equal(ours, again) and ours.dtype == eager.dtype
        assert (ours.float() - eager.float()).norm() <= 2 * torch.finfo(torch.bfloat16).eps * eager.float().norm()
    assert found[0][0].dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in found[0][1:])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_half_precision_keeps_the_effect_far_below_the_last_bit(backend):
    torch.manual_seed(0)
    layer = nn.Linear(256, 256).bfloat16().requires_grad_(False)
    lora = Lora(layer, 8, 4)
    lora.reset(torch.rand(lora.down.shape))
    with torch.no_grad():
        lora.up.normal_()
        lora.up.mul_(1e-4 * layer.weight.float().norm() / (lora.scale * lora.up @ lora.down).norm())
    x = torch.randn(4096, 256).bfloat16().requires_grad_()
    base = layer(x).float()
    put(layer, lora)
    true = lora.scale * (x.float() @ lora.down.t() @ lora.up.t())
    ours, eager = everything(torch.compile(lambda x: nn.functional.silu(layer(x)), backend=backend, fullgraph=True), lora, x), everything(lambda x: nn.functional.silu(layer(x)), lora, x)
    y = torch.compile(layer.forward, backend=backend, fullgraph=True)(x)
    assert abs(((y.float() - base) * true).sum() / true.square().sum() - 1) < 0.1
    for got, want in zip(ours, eager):
        assert (got.float() - want.float()).norm() / want.float().norm() < 0.01
        assert got.dtype == want.dtype


def test_the_sum_of_both_products_has_the_gradients_of_its_parts():
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=grad) for shape, grad in (((5, 2), True), ((4, 2), True), ((5, 3), True), ((4, 3), False))]
    torch.library.opcheck(torch.ops.hcpdiff.small_first.default, inputs)
    assert torch.autograd.gradcheck(torch.ops.hcpdiff.small_first, inputs)


def tiny_unet(cross_dim=8):
    """The regions of a true UNet, few kinds of them."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, layers_per_block=1, block_out_channels=(16,), norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D",),
                                up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None, cross_attention_dim=cross_dim, attention_head_dim=2).requires_grad_(False)


def with_loras(model, names, dropout=0.0):
    for path, layer in list(model.named_modules()):
        if path.endswith(names) and isinstance(layer, (nn.Linear, nn.Conv2d)):
            lora = Lora(layer, 2, 1, dropout)
            lora.reset(torch.rand(lora.down.shape))
            nn.init.normal_(lora.up, std=0.1)
            put(layer, lora)
    return [p for layer in adapted_layers(model).values() for p in layer.adapter.parameters()]


def models_of(**modules):
    return Models(StableDiffusion(), None, "tiny", modules, {}, {})


@pytest.mark.parametrize("sizes", [(8,), pytest.param((8, 16), marks=pytest.mark.long)])
def test_a_compiled_unet_learns_the_same_with_checkpointing_and_dropout_and_draws_uncompiled(sizes):
    unet = tiny_unet().train()
    parameters, names = with_loras(unet, ("to_q", "to_v", "ff.net.2", "conv1", "proj_in"), dropout=0.2), list(unet.state_dict())
    inputs = [(torch.randn(2, 4, size, 8), torch.full((2,), 500), torch.randn(2, 5, 8)) for size in sizes]

    def step():
        found = []
        for x in inputs:
            torch.manual_seed(1)
            y = unet(*x).sample
            found += [y, *torch.autograd.grad(y.square().mean(), parameters)]
        return found

    eager = step()
    said = compiled.compile_regions(models_of(unet=unet), ["unet"], {(2, 64, 8 * size) for size in sizes}, "sdpa", backend="aot_eager")
    results = [step()]
    with torch.no_grad(), compiled.eagerly(True):
        unet.eval()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch.equal(unet(*inputs[0]).sample, unet(*inputs[0]).sample)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0
    unet.train().enable_gradient_checkpointing()
    results.append(step())
    for result in results:
        for got, want in zip(result, eager):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert list(unet.state_dict()) == names == list(dict(unet.named_parameters(remove_duplicate=False)))
    assert not [path for path, _ in unet.named_modules() if "orig_mod" in path]
    assert "3 BasicTransformerBlock" in said and "3 ResnetBlock2D" in said and ("any size" if len(sizes) > 1 else "one size") in said


def test_a_compiled_text_encoder_learns_the_same():
    torch.manual_seed(0)
    text = make_text_encoder(layers=2).requires_grad_(False).train()
    parameters = with_loras(text, ("q_proj", "fc1"))
    ids = torch.randint(0, 1000, (2, 77))

    def step():
        y = text(ids).last_hidden_state
        return [y, *torch.autograd.grad(y.square().mean(), parameters)]

    eager = step()
    said = compiled.compile_regions(models_of(text_encoder=text), ["text_encoder"], {(2, 64, 64)}, "sdpa", backend="aot_eager")
    for got, want in zip(step(), eager):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert "2 CLIPEncoderLayer" in said and "one size" in said


def test_there_is_room_for_every_size_of_every_region():
    unet = tiny_unet()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=8):
        compiled.compile_regions(models_of(unet=unet), ["unet"], {(1, 64, 8 * n) for n in range(8, 20)}, "sdpa")
        regions = len(StableDiffusion().regions(models_of(unet=unet), "unet"))
        assert torch._dynamo.config.recompile_limit >= 12 * regions
        assert torch._dynamo.config.accumulated_recompile_limit >= 12 * regions


MORE = ("lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*q_proj$']}]", "preview={prompts: [thing], every: 1, num_inference_steps: 1, width: 64, height: 64}")


@pytest.fixture
def train(tmp_path, monkeypatch, tiny_sd1):
    """train('key=value', ...) -> (the finished run, its log)."""
    monkeypatch.chdir(tmp_path)
    run_help.images(tmp_path / "images", count=4, sizes=((64, 64),))
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
    return lambda name, *overrides: run_help.run("cfg.yaml", f"exp_dir={name}", *MORE, *overrides)


def weights(run):
    return {f"{path.name}/{name}": tensor for path in (run.folder / "ckpts").glob("*.safetensors") for name, tensor in load_file(path).items()}


def compare_runs(train, monkeypatch):
    monkeypatch.setattr(compiled, "EVERY", 0.05)
    eager, _ = train("eager")
    ours, log = train("compiled", "model.compile=true", "model.gradient_checkpointing=true")
    expected, got = weights(eager), weights(ours)
    assert list(got) == list(expected) and not any("_orig_mod" in name for name in got)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-6)
    pictures = [[Image.open(path).tobytes() for path in sorted((run.folder / "previews").iterdir())] for run in (eager, ours)]
    assert len(pictures[0]) == 2 and max(abs(a - b) for sides in zip(*pictures) for a, b in zip(*sides)) <= 1
    assert re.search(r"compiled .*3 CLIPEncoderLayer", log)
    assert re.search(r"still compiling: \d+ s so far", log) and threads() == []
    said = [line.split(" ", 2)[2] for line in log.splitlines() if re.search(r"\d (compiling:|step 1 took|step 1/|step 2/)", line)]
    assert said[0] == "compiling: the first step may take minutes" and re.fullmatch(r"step 1 took \d+ s, compiling included", said[1])
    assert "steps/s" not in said[2] and "left" not in said[2] and "steps/s" in said[3]  # of the first step no speed can be told
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_compiled_run_writes_what_an_uncompiled_one_writes(train, monkeypatch):
    """Of the text encoder only, and without a compiler of C++: the rest is the next one's."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(machine, "check_compiler", lambda device, key: None)
    monkeypatch.setattr(StableDiffusion, "blocks", frozenset({"CLIPEncoderLayer"}))
    compare_runs(train, monkeypatch)


class Graphs:
    """A backend that counts what is compiled and what of it is called; `by_step` has both of each finished step."""

    def __init__(self):
        self.made = self.called = 0
        self.by_step = []

    def __call__(self, graph, inputs):
        self.made += 1
        return lambda *args: self._call(graph, args)

    def _call(self, graph, args):
        self.called += 1
        return graph(*args)

    def on_step_end(self, trainer):
        self.by_step.append((self.made, self.called))
        self.made = self.called = 0


def test_a_run_over_several_sizes_and_short_batches_compiles_in_its_first_steps_and_uses_that_for_all(tmp_path, monkeypatch, tiny_sd1):
    """Three buckets with batches of two and of one: each kind of block is compiled once for each of these two, for any width and height, and no block ever runs uncompiled. No
    square here: where width and height were one number at first, a resnet is compiled once more."""
    monkeypatch.chdir(tmp_path)
    graphs, sizes = Graphs(), [(96, 64), (64, 96), (112, 80)]
    monkeypatch.setattr(compiled, "BACKEND", graphs)
    monkeypatch.setattr(machine, "check_compiler", lambda device, key: None)
    monkeypatch.setattr(LogHook, "on_step_end", lambda hook, trainer: graphs.on_step_end(trainer))
    shutil.copytree(tiny_sd1, "model", ignore=shutil.ignore_patterns("unet"))
    tiny_unet(cross_dim=32).save_pretrained("model/unet")
    run_help.images(tmp_path / "images", count=9, sizes=sizes)
    Path("cfg.yaml").write_text(CONFIG.format(model="model"), encoding="utf-8")
    words = f"data.one.bucket={{sizes: {[list(size) for size in sizes]}}}", "train.train_steps=12", "lora_unet=[{lr: 1.0, rank: 2, layers: ['re:.*attn.$', 're:.*conv1$']}]"
    run, eager = (run_help.run("cfg.yaml", f"exp_dir={name}", f"model.compile={name == 'ours'}", *words)[0] for name in ("ours", "eager"))
    steps, regions = graphs.by_step[:12], len(StableDiffusion().regions(run.models, "unet"))
    assert len(run.data.plan.shapes()) == 6 and [called for _, called in steps] == [regions] * 12 == [6] * 12
    assert sorted(made for made, _ in steps) == [0] * 10 + [3] * 2 and steps[0][0] == 3, "three kinds of blocks"
    assert graphs.by_step[12:] == [(0, 0)] * 12
    expected = weights(eager)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("text", [True, False])
def test_a_run_compiles_every_block_that_gradients_go_through(train, monkeypatch, text):
    asked = []
    monkeypatch.setattr(machine, "check_compiler", lambda device, key: None)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: asked.append((module, how["fullgraph"], how["dynamic"])))
    run, _ = train("run", "model.compile=true", *([] if text else ["lora_text_encoder=[]"]))
    blocks = [module for part in (["unet", "text_encoder"] if text else ["unet"]) for module in run.models.modules[part].modules()
              if type(module).__name__ in ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")]
    assert {id(module) for module, *_ in asked} == {id(block) for block in blocks} and len(asked) == len(blocks) > 30
    assert {(full, dynamic) for _, full, dynamic in asked} == {(True, False)}  # all pictures of one size


def slow(seconds):
    """A compiler that takes its time."""
    def backend(graph, inputs):
        time.sleep(seconds)
        return graph.forward

    return backend


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name == compiled.HEARTBEAT]


def test_a_long_compilation_is_told_again_and_again_and_leaves_no_thread():
    said, x = [], torch.ones(3)
    with compiled.heartbeat(lambda line: said.append(line), every=60.0):
        torch.compile(lambda x: x + 2, backend=slow(0.0))(x)
    assert said == [] and threads() == [], "what was short is no news"
    with compiled.heartbeat(lambda line: said.append((line, time.monotonic())), every=0.5):
        began = time.monotonic()
        for _ in range(2):  # one after the other
            torch.compile(lambda x: x * 3, backend=slow(0.8))(x)
        ended = time.monotonic()
        wait_for(lambda: threads() == [])
    assert len(said) >= 2 and all(re.fullmatch(r"still compiling: \d+ s so far", line) for line, _ in said)
    assert all(began < moment < ended + 0.5 for _, moment in said)
    told = len(said)
    torch.compile(lambda x: x - 1, backend=slow(0.8))(x)
    assert len(said) == told and threads() == [], "afterwards nobody listens"


def test_what_clears_the_compilers_callbacks_hides_no_error():
    with pytest.raises(ZeroDivisionError), compiled.heartbeat(lambda line: None):
        torch._dynamo.reset()
        raise ZeroDivisionError
    assert threads() == []


def wait_for(true, patience=20.0):
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < patience
        time.sleep(0.02)


def test_a_fault_while_it_compiles_ends_the_heartbeat():
    def backend(graph, inputs):
        time.sleep(0.15)
        raise NotImplementedError

    with pytest.raises(RuntimeError), compiled.heartbeat(lambda line: None, every=0.05):
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    assert threads() == []


@pytest.mark.long
def test_a_run_compiled_by_inductor_writes_what_an_uncompiled_one_writes(train, monkeypatch):
    compare_runs(train, monkeypatch)


def test_a_missing_compiler_is_told_beside_the_other_faults(train, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(ConfigError) as caught:
        train("run", "model.compile=true", "data.one.source.a.bg_color=[0,0,0]", "train.optimizer._target_=torch.optim.Adammm")
    assert len(caught.value.faults) == 2
    assert "model.compile = true" in str(caught.value) and "/nowhere/g++ is not found" in str(caught.value) and "model.compile: false" in str(caught.value)


def test_a_compiler_that_does_not_work_is_told_beforehand(monkeypatch):
    monkeypatch.setattr(machine, "_no_compiler", lambda device: "")
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "fx_graph_cache": False}), pytest.raises(ConfigError, match="does not work on this machine.*model.compile: false"):
        machine.check_compiler(torch.device("cpu"), "model.compile")


def test_a_compiler_that_gives_up_in_a_step_is_a_fault_and_no_traceback():
    def backend(graph, inputs):
        raise NotImplementedError("no such kernel")

    unet = tiny_unet()
    for region in StableDiffusion().regions(models_of(unet=unet), "unet"):
        region.compile(backend=backend)
    with pytest.raises(RuntimeError) as caught:
        unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 5, 8))
    assert "no such kernel" in str(compiled.compile_failed(caught.value)) and compiled.compile_failed(RuntimeError("other")) is None


def test_a_compiled_layer_whose_weight_is_in_few_bits_is_the_layer():
    """The sum of both products gets the dense weight; what is kept for the backward pass is the one in few bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128)).bfloat16().requires_grad_(False)
    move(model, CPU, Plan("int8").keeper(model))
    lora = Lora(model[0], 4, 2)
    lora.reset(torch.rand(lora.down.shape))
    nn.init.normal_(lora.up, std=0.1)
    put(model[0], lora)
    x = torch.randn(32, 64).bfloat16().requires_grad_()
    eager = everything(model[0], lora, x)
    for got, want in zip(everything(torch.compile(model[0].forward, backend="aot_eager", fullgraph=True), lora, x), eager):
        assert (got.float() - want.float()).norm() / want.float().norm() < 0.01 and got.dtype == want.dtype

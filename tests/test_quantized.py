"""Frozen weights in 8 and 4 bits: what is kept of them, and that every way through a layer is that of the dense weight with the same numbers."""

import copy
import json
import logging
import weakref

import pytest
import torch
from run_help import assert_same_run, images, run
from tiny import make_unet
from torch import nn

from hcpdiff.adapters.base import put
from hcpdiff.adapters.lora import Lora
from hcpdiff.checkpoint.safetensors_header import read_header
from hcpdiff.errors import CheckpointError
from hcpdiff.families import detect
from hcpdiff.families.read_parts import CPU, move
from hcpdiff.quantized import Plan, Quantized, stored_bytes
from hcpdiff.quantized.codes import BLOCK, CODES, INT8, NF4, decode, encode

PAPER = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,  # QLoRA, appendix E
         0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
LAYERS = {
    "linear": (lambda: nn.Linear(128, 96), (2, 5, 128)),
    "linear without bias": (lambda: nn.Linear(128, 96, bias=False), (7, 128)),
    "conv 1x1": (lambda: nn.Conv2d(64, 96, 1), (2, 64, 4, 5)),
    "conv 3x3": (lambda: nn.Conv2d(32, 64, 3, padding=1), (2, 32, 5, 4)),
    "conv 3x3 stride 2": (lambda: nn.Conv2d(32, 64, 3, stride=2, padding=1), (2, 32, 6, 4)),
}
BOTH = pytest.mark.parametrize("code", CODES)


def pair(name: str, code: str, dtype: torch.dtype, rank: int = 0) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A layer whose weight is quantized, the same with the dense weight of the same numbers, and an input; with LoRA of `rank` beside both."""
    torch.manual_seed(2)
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False).to(dtype)
    layer.weight = nn.Parameter(Quantized.of(layer.weight, code, dtype), requires_grad=False)
    dense = copy.deepcopy(layer)
    dense.weight = nn.Parameter(layer.weight.dense(), requires_grad=False)
    for one in (layer, dense) if rank else ():
        lora = Lora(one, rank, 2.0)
        lora.reset(torch.rand(lora.down.shape, generator=torch.Generator().manual_seed(3)))
        lora.up.data.fill_(0.01)
        put(one, lora)
    return layer, dense, torch.randn(shape, dtype=dtype, requires_grad=True)


def ways(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The result, and the gradients of the input and of what is trained."""
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])]


def test_the_levels_of_nf4_are_those_of_the_paper():
    blocks = torch.zeros(1, BLOCK)
    blocks[0, :16] = torch.tensor(PAPER)
    torch.testing.assert_close(decode(encode(blocks, NF4), NF4, torch.float32), blocks, rtol=0, atol=2e-7)


@BOTH
def test_every_number_becomes_the_nearest_that_its_block_has(code):
    blocks = torch.randn(9, BLOCK) * torch.logspace(-6, 4, 9)[:, None]
    kept = decode(encode(blocks, code), code, torch.float32)
    steps = torch.arange(-127, 128) / 127 if code == INT8 else torch.tensor(PAPER)
    most = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / most)[..., None] - steps).abs().amin(-1)
    torch.testing.assert_close((kept - blocks).abs() / most, nearest, rtol=0, atol=1e-6)


@BOTH
def test_zeros_stay_zeros_and_the_source_stays_as_it_was(code):
    weight = torch.cat([torch.zeros(2, BLOCK), torch.randn(1, BLOCK)])
    before = weight.clone()
    assert torch.equal(Quantized.of(weight, code, torch.float32).dense()[:2], torch.zeros(2, BLOCK)) and torch.equal(weight, before)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [0, 4])
def test_result_and_gradients_are_those_of_the_dense_weight_bit_for_bit(name, code, dtype, rank):
    layer, dense, x = pair(name, code, dtype, rank)
    for ours, theirs in zip(ways(layer, x), ways(dense, x), strict=True):
        assert torch.equal(ours, theirs)


@BOTH
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [0, 4])
def test_nothing_dense_of_the_weight_is_kept_for_the_backward_pass(name, code, rank):
    layer, _, x = pair(name, code, torch.float32, rank)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert any(isinstance(tensor, Quantized) for tensor in kept)
    assert all(isinstance(tensor, Quantized) or tensor.numel() < layer.weight.numel() for tensor in kept)


@BOTH
def test_a_merged_weight_holds_the_dense_numbers(code):
    layer, dense, _ = pair("linear", code, torch.float32, 4)
    assert torch.equal(layer.adapter.merged(layer.weight, None)[0], dense.adapter.merged(dense.weight, None)[0])


@BOTH
def test_copies_other_types_and_other_shapes_stay_in_few_bits(code):
    layer, dense, x = pair("linear", code, torch.float32)
    double = copy.deepcopy(layer)
    assert torch.equal(double(x), layer(x)) and double.weight.codes.data_ptr() != layer.weight.codes.data_ptr()
    assert isinstance(double.to(torch.bfloat16).weight, Quantized) and double.weight.dtype == torch.bfloat16 and isinstance(double.weight, nn.Parameter)
    torch.testing.assert_close(double.weight.dense(), dense.weight.bfloat16(), rtol=2**-7, atol=0)
    assert isinstance(layer.weight.t(), Quantized) and torch.equal(layer.weight.t().dense(), dense.weight.t())
    assert isinstance(layer.weight.reshape(-1, 64), Quantized) and torch.equal(layer.weight.reshape(-1, 64).dense(), dense.weight.reshape(-1, 64))
    assert double.to("meta").weight.codes.is_meta
    with pytest.raises(TypeError, match="frozen"):
        layer.weight.zero_()


@BOTH
@pytest.mark.parametrize("name,dtype,rank,most", [("conv 3x3 stride 2", torch.float32, 0, 0), ("linear", torch.bfloat16, 4, 0.01), ("conv 3x3", torch.float32, 4, 1e-5)])
def test_a_compiled_layer_is_the_layer(code, name, dtype, rank, most):
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # pytest would keep all of a compiler's trace
    torch._dynamo.reset()
    layer, _, x = pair(name, code, dtype, rank)
    compiled, kept = copy.copy(layer), []
    compiled.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)  # Module.compile skips torch's own layers
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = ways(compiled, x)
    for ours, theirs in zip(found, ways(layer, x), strict=True):
        assert (ours.float() - theirs.float()).norm() <= most * theirs.float().norm()
    assert layer.weight.codes.shape in [tensor.shape for tensor in kept] and all(not tensor.is_floating_point() or tensor.numel() < layer.weight.numel() for tensor in kept)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_compiled_block_keeps_for_its_backward_pass_what_it_keeps_with_dense_weights(backend):
    """The partitioner weighs what is kept by size and by how far it is from the backward pass; in a small block the dense weight seemed cheaper than nf4's codes and levels."""
    from diffusers.models.attention import BasicTransformerBlock

    logging.getLogger("torch.__trace").setLevel(logging.WARNING)

    def kept(code: str | None) -> dict[int, int]:
        """Bytes by storage."""
        torch.manual_seed(0)
        torch._dynamo.reset()
        block, held = BasicTransformerBlock(64, 2, 32, cross_attention_dim=32).bfloat16().requires_grad_(False), []
        if code:
            move(block, CPU, Plan(code).keeper(block))
        put(block.attn1.to_q, Lora(block.attn1.to_q, 2, 2.0))
        own = {part.untyped_storage()._cdata for parameter in block.parameters() for part in (parameter.parts if isinstance(parameter, Quantized) else (parameter,))}
        block.compile(backend=backend, fullgraph=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.untyped_storage()) or tensor, lambda tensor: tensor):
            block(torch.randn(2, 16, 64).bfloat16().requires_grad_(), encoder_hidden_states=torch.randn(2, 7, 32).bfloat16())
        return {storage._cdata: storage.nbytes() for storage in held if storage._cdata not in own}

    assert sorted(kept(NF4).values()) == sorted(kept(None).values())


def test_first_and_last_layers_small_ones_and_all_that_is_no_matrix_stay_dense():
    unet = make_unet(widths=(128, 64, 64, 64)).requires_grad_(False)
    assert {"conv_in.weight", "conv_out.weight"} < Plan("nf4").codes(unet).keys()
    plan = Plan("nf4", ["conv_in", "conv_out"])
    codes = plan.codes(unet)
    assert not {"conv_in.weight", "conv_out.weight"} & codes.keys() and all(name.endswith(".weight") and "norm" not in name for name in codes)
    assert codes["mid_block.resnets.0.conv1.weight"] == INT8 and codes["mid_block.attentions.0.proj_in.weight"] == codes["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"] == NF4
    assert set(Plan("int8").codes(unet).values()) == {INT8}
    names, (kept, dense) = [name for name, _ in unet.named_parameters()], plan.bytes(unet)
    move(unet, CPU, plan.keeper(unet))
    assert [name for name, _ in unet.named_parameters()] == names == list(unet.state_dict())
    assert stored_bytes(unet) == kept < dense / 2
    put(unet.mid_block.resnets[0].conv1, Lora(unet.mid_block.resnets[0].conv1, 4, 4.0))
    assert plan.bytes(unet) == (kept, dense)  # of what is frozen, adapters or not
    assert {name for name, parameter in unet.named_parameters() if isinstance(parameter, Quantized)} == codes.keys()


@pytest.mark.parametrize("model,int8,nf4", [("sd1", 0.54, 0.45), ("sdxl", 0.54, 0.32)])
def test_full_size_models_need_less_than_six_tenths(model, int8, nf4):
    from diffusers import UNet2DConditionModel

    sizes = {"sd1": {"cross_attention_dim": 768, "attention_head_dim": 8}, "sdxl": {
        "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes[model]).to(torch.bfloat16).requires_grad_(False)
    for choice, most in ((INT8, int8), (NF4, nf4)):
        kept, dense = Plan(choice, ["conv_in", "conv_out"]).bytes(unet)
        assert kept <= most * dense and dense == stored_bytes(unet)


@BOTH
def test_recomputing_activations_changes_no_gradient(code):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(4)
        unet = make_unet(widths=(32, 64, 64, 64)).requires_grad_(False).train()
        move(unet, CPU, Plan(code).keeper(unet))
        layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        put(layer, Lora(layer, 2, 2.0))
        layer.adapter.reset(torch.rand(layer.adapter.down.shape))
        nn.init.ones_(layer.adapter.up)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 7, 32)).sample.square().sum().backward()
        grads.append(layer.adapter.up.grad)
    assert grads[0].abs().sum() > 0 and torch.equal(*grads)


def test_a_model_is_read_layer_by_layer_and_no_dense_weight_outlives_its_turn(tiny_sd1):
    models = detect(tiny_sd1).load(tiny_sd1, "tiny", ["unet"], torch.bfloat16, outlines=["unet"])
    keep, dense = Plan("int8").keeper(models.unet), []

    def watched(name: str, weight: torch.Tensor) -> torch.Tensor:
        assert not [old for old, reference in dense if reference() is not None], name
        kept = keep(name, weight)
        dense.extend([(name, weakref.ref(weight))] if kept is not weight else [])
        return kept

    models.read("unet", torch.device("cpu"), watched)
    assert len(dense) == len(Plan("int8").codes(models.unet)) == sum(isinstance(parameter, Quantized) for parameter in models.unet.parameters()) > 100
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in models.unet.parameters())
    plain = detect(tiny_sd1).load(tiny_sd1, "tiny", ["unet"], torch.bfloat16)
    move(plain.unet, CPU, Plan("int8").keeper(plain.unet))
    for name, parameter in models.unet.named_parameters():
        assert torch.equal(parameter.float(), plain.unet.get_parameter(name).float()), name


CONFIG = """
train: {{train_steps: 4, cpu_threads: 1, log_step: 1, save_step: 2, optimizer: {{_target_: torch.optim.AdamW}}}}
model: {{pretrained_model_name_or_path: '{model}', quantize: nf4}}
lora_unet:
  - {{lr: 0.01, rank: 2, layers: ['re:.*attn.?$', 're:.*resnets$']}}
preview: {{prompts: [red], num_inference_steps: 2}}
data:
  one: {{batch_size: 2, source: {{a: {{img_root: images, caption_file: images}}}}, bucket: {{sizes: [[64, 64]]}}}}
"""


def test_a_run_on_a_quantized_base_says_so_and_goes_on_exactly_and_only_with_it(tmp_path, monkeypatch, tiny_sd1):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "images", 4)
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
    whole, log = run("cfg.yaml", "exp_dir=whole")
    unet = whole.models.unet
    assert "unet kept as nf4: " in log and isinstance(unet.mid_block.resnets[0].conv1.weight, Quantized)
    assert not any(isinstance(parameter, Quantized) for parameter in (*unet.conv_in.parameters(), *unet.conv_out.parameters()))
    assert (tmp_path / "whole" / "previews" / "4-0.png").is_file()
    run("cfg.yaml", "exp_dir=parts", stop=2)
    run("cfg.yaml", "train.resume=parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)
    header = read_header(tmp_path / "whole" / "ckpts" / "unet-4.safetensors")
    assert json.loads(header.metadata["hcpdiff.settings"])["quantize"] == "nf4" and all(entry.dtype == "F32" for entry in header.entries.values())
    with pytest.raises(CheckpointError, match="model.quantize: 'nf4' before, null now"):
        run("cfg.yaml", "train.resume=parts", "train.train_steps=6", "model.quantize=null")

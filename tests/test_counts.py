"""What work is done how often, as exact counts: images decoded and hashed, VAE and text encoder called, batches drawn. Seconds are for benchmarks."""

import sys
import threading
import time
import tracemalloc
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import torch
from data_help import Encoder, build, cached, epoch, filled, folder_of, right
from PIL import Image, ImageFile
from safetensors.torch import save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import data_scale

from hcpdiff import device as devices
from hcpdiff import threads
from hcpdiff.adapters.base import adapted_layers
from hcpdiff.config.infer_schema import InferConfig
from hcpdiff.config.load import load
from hcpdiff.config.schema import PreviewConfig
from hcpdiff.data import encoding, hashes, image, latent_cache, pack
from hcpdiff.data.dataset import build_train_data
from hcpdiff.families import detect
from hcpdiff.lora_tensors import LoraTensors
from hcpdiff.vis import attach, preview, request, run
from hcpdiff.vis.lora_files import LoraSource


@contextmanager
def counted(monkeypatch, *places):
    """Calls of functions while they do what they do: (holder, name) each -> {name: calls}."""
    calls = dict.fromkeys((name for _, name in places), 0)

    def counting(real, name):
        def call(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)
        return call

    with monkeypatch.context() as patch:
        for holder, name in places:
            patch.setattr(holder, name, counting(getattr(holder, name), name))
        yield calls


def reading(monkeypatch):
    """Images decoded (`load`: whatever of Pillow's reads pixels, several times an image), looked through, hashed, and their headers read."""
    return counted(monkeypatch, (image, "decode"), (image, "verify"), (ImageFile.ImageFile, "load"), (latent_cache, "read_content"), (image, "read_header"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_RACY_NS", 0)  # files just written count as settled
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(5):
        Image.new("L", (64, 64), 200).resize([(96, 64), (64, 96), (80, 80)][number % 3]).save(masks / f"{number:02}.png")
    return folder_of(tmp_path / "imgs", 5, captions=True)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_second_start_reads_headers_only(root, tmp_path, monkeypatch, skip_bad, masked):
    settings = {"skip_bad_images": skip_bad, "flip": True, "bucket": {"crop": "random"}} | ({"att_mask": str(tmp_path / "masks")} if masked else {})
    files = 10 if masked else 5
    with reading(monkeypatch) as first:
        _, calls = filled(root, tmp_path / "c", **settings)
    assert calls > 10 and first.pop("load") and first == {"decode": files, "verify": files * skip_bad, "read_content": files, "read_header": files}
    with reading(monkeypatch) as second:
        data, calls = filled(root, tmp_path / "c", **settings)
        assert len(epoch(data)) == data.steps_per_epoch
    assert calls == 0 and second == {"decode": 0, "verify": 0, "load": 0, "read_content": 0, "read_header": files}


def test_one_edited_image_is_the_only_one_that_is_read_again(root, tmp_path, monkeypatch):
    filled(root, tmp_path / "c")
    Image.new("RGB", (80, 80), "green").save(root / "02.png")
    with reading(monkeypatch) as again:
        data, calls = filled(root, tmp_path / "c")
    assert calls == 1 and (again["decode"], again["read_content"], again["read_header"]) == (1, 1, 5) and right(data)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_an_image_is_decoded_once_whatever_its_views(root, tmp_path, monkeypatch, mode):
    with reading(monkeypatch) as calls:
        data, encoded = filled(root, tmp_path / "c", mode=mode, flip=True, bucket={"crop": "random"})
    assert calls["decode"] == 5 and encoded == sum(len(data.datasets[0].views(number)) for number in range(5)) > 10


@pytest.mark.parametrize("mode", ["memory", "disk"])
@pytest.mark.parametrize("between,exchange", [(64, None), (1, None), (1, lambda mine: [mine])])
def test_images_are_decoded_while_the_vae_works_and_stored_while_it_works_on(root, tmp_path, monkeypatch, mode, between, exchange):
    """The VAE waits inside its second image until the third was decoded and the first was taken from it, which waits for the second to be with the VAE. Also where ranks meet."""
    monkeypatch.setattr(latent_cache, "_ROUND", between)
    decoded, second, stored, order = threading.Event(), threading.Event(), threading.Event(), []
    real_load, real_entry = latent_cache.load_views, encoding.Encoding.entry
    encode = Encoder()

    def load(*args):
        out = real_load(*args)
        order.append(out)
        if len(order) == 3:
            decoded.set()
        return out

    def entry(self):
        assert second.wait(30)
        stored.set()
        return real_entry(self)

    def waiting(pixels):
        if encode.calls == 1:
            second.set()
            assert decoded.wait(30) and stored.wait(30)
        return encode(pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_cache, "load_views", load)
        patch.setattr(encoding.Encoding, "entry", entry)
        data = build(cached(root, tmp_path / "c", mode=mode))
        data.cache_latents(waiting, "v", exchange=exchange)
    assert encode.calls == 5 and right(data)


def test_work_that_is_shared_out_comes_in_order_and_ends_soon_when_it_ends_early():
    """An error, or Ctrl+C, waits for one item a thread, not for all that a thread was given."""
    assert list(threads.mapped(lambda n: n * n, range(1000), 3)) == [n * n for n in range(1000)]
    done, go = [], threading.Event()

    def work(n):
        if n >= 32:
            go.wait(5)
        done.append(n)
        return n

    made = threads.mapped(work, range(1000), 3)
    assert next(made) == 0
    threading.Timer(0.2, go.set).start()
    made.close()
    assert len(done) <= 32 + 2 * 3


def test_what_is_prepared_is_in_order_and_not_far_ahead(monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)  # a test runner has one core, and one thread cannot come out of order
    others = threading.Event()

    def late(n):
        assert n or others.wait(30)  # the first is ready last
        if n == 6:
            others.set()
        return n * n

    class Items(list):
        taken = 0

        def __iter__(self):
            for item in super().__iter__():
                self.taken += 1
                yield item

    items = Items(range(50))
    made = threads.prepared(late, items, 3)
    assert next(made) == (0, 0) and items.taken == 2 * 3 + 1
    made.close()
    for ahead, most in ((1, 2), (0, 2), (99, 2 * 3 + 1)):  # what is taken is what is out and what waits
        items.taken = 0
        with closing(threads.prepared(lambda n: n * n, items, 3, ahead)) as made:
            assert next(made) == (0, 0) and items.taken == most
    others.clear()
    assert list(threads.prepared(late, range(50), 3)) == [(n, n * n) for n in range(50)]


@pytest.mark.parametrize("count", [10, 1000])
def test_a_look_into_the_cache_reads_one_file_once_and_parses_once_however_many_entries_there_are(tmp_path, monkeypatch, count):
    keys, entry = [number.to_bytes(2, "big") * 16 for number in range(count)], {name: torch.rand(4, 2, 2) for name in ("mean", "std")}
    folder = pack.PackFolder(tmp_path)
    with pack.PackWriter(folder) as writer:
        for key in keys:
            writer.add(key, save(entry))
    reader = pack.PackFolder(tmp_path)
    monkeypatch.setattr(pack, "open", open, raising=False)
    with counted(monkeypatch, (pack, "open"), (latent_cache, "deserialize")) as calls:
        found = reader.get(keys[count // 2], lambda payload: latent_cache.read_entry(payload, (4, 2, 2), False))
    assert calls == {"open": 1, "deserialize": 1} and found.keys() == entry.keys() and all(torch.equal(found[name], entry[name]) for name in entry)


def test_an_image_needs_less_than_1_kb(tmp_path):
    """Also at the worst moment of a start: the index of a folder of made-up names and headers, and then that of its entries in a cache."""
    count, config, place = 2000, tmp_path / "cfg.yaml", tmp_path.as_posix()
    words = data_scale.CONFIG.format(root=data_scale.ROOT.as_posix(), folder=place, captions=f"{place}/captions.jsonl", cache=place)
    config.write_text(words.replace("262144", "16384"), "utf-8")  # of latents nothing is looked at
    with ExitStack() as stack:
        data_scale.made_up(stack, tmp_path, count)
        settings = load(str(config)).config.data
        data_scale.fill_cache(build_train_data(settings, seed=1, micro_per_step=1), tmp_path)  # and all imports
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        data = build_train_data(settings, seed=1, micro_per_step=1)
        store, memo = latent_cache.DiskStore(tmp_path, data.datasets[0], "vae", 8, 4), hashes.HashMemo(tmp_path / "hashes-1.bin")
        assert tracemalloc.get_traced_memory()[1] / count < 1024 and memo.digest(data.datasets[0].sources[0].path(count - 1))
    assert data.images == len(store.packs) == count


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_no_more_images_are_decoded_ahead_than_their_pixels_may_take(root, tmp_path, monkeypatch, mode):
    seen, loaded, real = [], [], latent_cache.load_views
    monkeypatch.setattr(latent_cache, "load_views", lambda *args: (loaded.append(real(*args)), loaded[-1])[1])
    data = build(cached(root, tmp_path / "c", mode=mode))
    (made,) = data.datasets
    size = 3 * max(width * height for width, height in made.bucket_sizes) * max(len(made.views(image)) for image in range(len(made)))
    monkeypatch.setattr(latent_cache, "_WAITING", 2 * size - 1)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    encode = Encoder()

    def waiting(pixels):
        until = time.monotonic() + 30
        while len(loaded) - encode.calls < min(2, 5 - encode.calls) and time.monotonic() < until:  # the next is decoded meanwhile, whenever a thread gets to it
            time.sleep(0.002)
        time.sleep(0.05)  # and nothing beyond it
        seen.append(len(loaded) - encode.calls)
        return encode(pixels)

    data.cache_latents(waiting, "v")
    assert len(loaded) == 5 and max(seen) == 2 and right(data)  # the one with the VAE and the next


@pytest.mark.skipif(not hasattr(threads.os, "getpriority") or threads.sys.platform != "linux", reason="niceness of a thread is Linux's")
def test_threads_that_decode_give_way_and_the_main_one_does_not(root, tmp_path, monkeypatch):
    niceness = lambda: threads.os.getpriority(threads.os.PRIO_PROCESS, 0)  # noqa: E731
    before, found = niceness(), []
    real = latent_cache.load_views
    monkeypatch.setattr(latent_cache, "load_views", lambda *args: (found.append(niceness()), real(*args))[1])
    for mode in ("memory", "disk"):
        filled(root, tmp_path / "c", mode=mode)
    assert found == [min(19, before + 5)] * 10 and niceness() == before


@pytest.mark.parametrize("most", [0, 2])
def test_what_was_started_is_finished_before_an_error_goes_on(most):
    done, begun = [], []

    def started():
        for n in range(5):
            assert most or len(done) == n  # 0: each is finished before the next is begun
            begun.append(n)
            yield n
        raise KeyError

    with pytest.raises(KeyError):
        list(threads.behind(started(), done.append, most))
    assert done == begun == [0, 1, 2, 3, 4]


def test_what_is_made_ahead_ends_with_what_fails_behind_it():
    """At once: an error that is told later holds the frames that it went through, and threads of what was begun would go on until the end."""
    begun = []

    def started():
        with closing(threads.prepared(begun.append, range(100), 1)) as ready:
            for item, _ in ready:
                yield item

    def finish(item):
        if item == 3:
            raise KeyError

    with pytest.raises(KeyError) as caught:
        list(threads.behind(started(), finish, 1))
    assert not any(thread.name.startswith("hcpdiff-") for thread in threading.enumerate()) and len(begun) < 20 and caught.tb


# ---- drawing -----------------------------------------------------------------------------------------------------------------------------------------

class Calls:
    """Forward calls of modules and the samples in each."""

    def __init__(self, **modules):
        self.sizes = {name: [] for name in modules}
        self.hooks = [module.register_forward_pre_hook(self._note(name), with_kwargs=True) for name, module in modules.items()]

    def _note(self, name):
        return lambda module, args, kwargs: self.sizes[name].append(len(args[0] if args else next(iter(kwargs.values()))))


def drawn(folder, out, watch, **keys):
    """Draws as the visualizer does; `watch(models)` gives what counts."""
    cfg = InferConfig(**{"pretrained_model": str(folder), "infer_args": {"num_inference_steps": 2, "guidance_scale": 5.0}, "cpu_threads": 1, "out_dir": str(out), **keys})
    wish, seen = request.read(cfg), []
    real = run.encode_prompts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "encode_prompts", lambda wish, models, *rest: (seen.append(watch(models)), real(wish, models, *rest))[1])
        studio = run.prepare(wish, (), lambda line: None)
    return run.draw(wish, studio, lambda line: None), seen[0].sizes, studio


def test_equal_prompts_are_encoded_once_and_pictures_go_through_the_models_together(tiny_sd1, tmp_path):
    watch = lambda models: Calls(text=models.text_encoder, unet=models.unet, decoder=models.vae.decoder)  # noqa: E731
    paths, sizes, studio = drawn(tiny_sd1, tmp_path / "out", watch, prompt=["a cat", "a dog", "a cat"], neg_prompt="bad", seed=[1, 2, 3], bs=4)
    assert len(paths) == 9 and sizes["text"] == [1, 1, 1]  # a cat, a dog, bad
    steps = len(studio.pipe.scheduler.timesteps)
    assert sizes["unet"] == [8] * steps + [8] * steps + [2] * steps  # 4 + 4 + 1 pictures, each with and without its prompt
    assert sizes["decoder"] == [4, 4, 1]


def test_previews_encode_equal_prompts_once_and_the_negative_one_once_per_length(tiny_sd1):
    models = detect(tiny_sd1).load(tiny_sd1, "tiny")
    calls = Calls(text=models.text_encoder)
    long = " ".join(["cat"] * 80)
    made = preview.encode_preview_prompts(models, PreviewConfig(prompts=["a cat", long, "a cat", "a dog"], neg_prompt="bad"))
    assert [len(part.hidden[0]) for part in made.positive] == [len(part.hidden[0]) for part in made.negative] == [77, 154, 77, 77]
    assert len(calls.sizes["text"]) == 5  # three prompts, and bad in two lengths


def test_previews_of_one_length_go_through_the_models_together(tiny_sd1):
    models = detect(tiny_sd1).load(tiny_sd1, "tiny")
    cfg = PreviewConfig(prompts=["a cat", "a dog", "a cat"], num_inference_steps=1, width=64, height=64, bs=2)
    made, calls = preview.encode_preview_prompts(models, cfg), Calls(text=models.text_encoder, unet=models.unet, decoder=models.vae.decoder)
    assert len(preview.draw_previews(models, models.family, cfg, prompts=made)) == 3
    assert calls.sizes == {"text": [], "unet": [4, 2], "decoder": [2, 1]}


@pytest.mark.parametrize("dtype,beside", [("fp32", False), ("bf16", True)])
def test_an_fp32_picture_with_a_lora_asks_for_no_product_more_than_one_without(tiny_sd1, dtype, beside):
    models = detect(tiny_sd1).load(tiny_sd1, "tiny", ["unet"], devices.DTYPES[dtype])
    inputs = (torch.zeros(2, 4, 8, 8), torch.tensor(5), torch.zeros(2, 77, 32))
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = models.unet.get_submodule(path)
    lora = LoraTensors(torch.randn(1, layer.in_features), torch.randn(layer.out_features, 1), 1.0)
    before, plain = layer.weight, flops(models.unet, inputs)
    attach.attach_all(models, [attach.Loaded(LoraSource("one", None, None, True, 0.5, 1), {"unet": {path: lora}})])
    assert bool(adapted_layers(models.unet)) is beside and (flops(models.unet, inputs) == plain) is not beside
    if not beside:
        torch.testing.assert_close(layer.weight, before + 0.5 * lora.up @ lora.down)
        assert layer.weight is not before and not layer.weight.requires_grad  # the old one may be a file's pages


@torch.no_grad()
def flops(unet, inputs):
    """FLOPs of a forward pass."""
    with FlopCounterMode(display=False) as counter:
        unet(*(part.to(unet.dtype) if part.is_floating_point() else part for part in inputs))
    return counter.get_total_flops()


class Casts(TorchDispatchMode):
    """How often a tensor was cast."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **kwargs or {})


def test_a_half_precision_lora_is_cast_once_for_all_steps_and_changes_no_bit(tiny_sd1):
    models = detect(tiny_sd1).load(tiny_sd1, "tiny", ["unet"], torch.bfloat16)
    inputs = torch.randn(2, 4, 8, 8).bfloat16(), torch.tensor(5), torch.randn(2, 77, 32).bfloat16()

    @torch.no_grad()
    def predicted():
        with Casts() as casts:
            return models.unet(*inputs).sample, casts.count

    _, plain = predicted()
    layers = {path: LoraTensors(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2), 3.0)
              for path, layer in models.unet.named_modules() if path.endswith(("to_q", "ff.net.2"))}
    attach.attach_all(models, [attach.Loaded(LoraSource("one", None, None, True, 0.5, 1), {"unet": layers})])
    at_each_call, many = predicted()
    attach.shadow_half(models.unet)
    with attach.copied(models.unet):
        copied, few = predicted()
    assert torch.equal(copied, at_each_call) and many >= plain + 2 * len(layers) and few == plain
    assert predicted()[1] == many  # outside, copies count as old

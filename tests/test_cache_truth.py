"""Whatever is done to a cache's files, and whenever a run is killed, what comes out of it is what encoding afresh gives."""

import builtins
import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from data_help import Encoder, build, cached, filled, folder_of, means, picture, right
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data_cache_shared import on_ranks
from tiny import make_text_encoder, make_vae

from hcpdiff.data import hashes, latent_cache, pack
from hcpdiff.data.hashes import HashMemo, read_content
from hcpdiff.data.pack import PackFolder, PackWriter
from hcpdiff.data.prune import cache_info, prune
from hcpdiff.errors import ConfigError, DataError
from hcpdiff.families.base import Models, fingerprint
from hcpdiff.families.sd import StableDiffusion
from hcpdiff.train.conditioning import Encoder as TextEncoder
from hcpdiff.train.conditioning import FrozenText

PAYLOADS = {bytes([n]) * 32: os.urandom(20 + n) for n in range(1, 4)}


@pytest.fixture
def root(tmp_path):
    return folder_of(tmp_path / "imgs", 3)


def pack_of(folder):
    """A folder of one pack with the payloads; (contents of the pack, of the index)."""
    with PackWriter(PackFolder(folder)) as writer:
        for key, payload in PAYLOADS.items():
            writer.add(key, payload)
    return [next(folder.glob(pattern)) for pattern in ("*.pack", "*.idx")]


def served(folder):
    reader = PackFolder(folder)
    return [reader.get(key) for key in PAYLOADS]


# ---- damage ----------------------------------------------------------------------------------------------------------------------------------------

def test_a_file_cut_anywhere_serves_what_is_whole_and_nothing_else(tmp_path):
    for path in pack_of(tmp_path):
        raw = path.read_bytes()
        for length in range(len(raw)):
            path.write_bytes(raw[:length])
            found = served(tmp_path)
            whole = [path.suffix == ".pack" and end <= length for end in (21, 43, 66)]
            assert found == [payload if there else None for payload, there in zip(PAYLOADS.values(), whole)], (path.name, length)
        path.write_bytes(raw)
    assert served(tmp_path) == list(PAYLOADS.values())


@settings(max_examples=300, deadline=None)
@given(which=st.integers(0, 1), flips=st.lists(st.integers(0, 255 * 8 + 7), min_size=1, max_size=4), tail=st.binary(max_size=3))
def test_flipped_bits_and_bytes_behind_the_end_never_give_another_payload(tmp_path_factory, which, flips, tail):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        pack_of(folder)
    path = [next(folder.glob(pattern)) for pattern in ("*.pack", "*.idx")][which]
    raw = path.read_bytes()
    spoilt = bytearray(raw)
    for bit in flips:
        spoilt[bit // 8 % len(raw)] ^= 1 << bit % 8
    path.write_bytes(bytes(spoilt) + tail)
    try:
        assert all(found in (payload, None) for found, payload in zip(served(folder), PAYLOADS.values()))
    finally:
        path.write_bytes(raw)


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 300), flips=st.lists(st.integers(0, 3000), max_size=3))
def test_a_damaged_memo_of_hashes_remembers_rightly_or_not_at_all(tmp_path_factory, cut, flips):
    folder = tmp_path_factory.getbasetemp() / "memo"
    folder.mkdir(exist_ok=True)
    image, path = folder / "image", folder / "hashes-1.bin"
    if not path.exists():
        image.write_bytes(b"pixels")
        content, memo = read_content(image), HashMemo(path)
        memo.remember(image, content._replace(state=hashes._state(os.stat(image))))
        memo.save()
        (folder / "whole").write_bytes(path.read_bytes())
    raw = bytearray((folder / "whole").read_bytes()[:cut])
    for bit in flips if raw else ():
        raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    path.write_bytes(raw)
    assert HashMemo(path).digest(image) in (hashes.content_digest(b"pixels"), None)


@pytest.mark.parametrize("seed", range(12))
def test_a_cache_damaged_anyhow_gives_the_right_latents(tmp_path, seed):
    """Several packs, several files spoilt at once in ways drawn by chance; and once mended it stays so."""
    draw, root = random.Random(seed), folder_of(tmp_path / "imgs", 3)
    for _ in range(3):
        filled(root, tmp_path / "c")
        folder_of(root, {f"{draw.random()}.png": (64, 64)})
    files = sorted(path for path in (tmp_path / "c").rglob("*") if path.is_file())
    for path in draw.sample(files, draw.randint(1, 4)):
        raw = path.read_bytes()
        place = draw.randrange(len(raw))
        choices = [raw[:place], raw[:place] + bytes([raw[place] ^ 1 << draw.randrange(8)]) + raw[place + 1:], raw + b"x", b"", draw.randbytes(len(raw)),
                   raw[:place] + draw.randbytes(16) + raw[place:], draw.choice(files).read_bytes(), None]
        chosen = draw.choice(choices)
        path.unlink() if chosen is None else path.write_bytes(chosen)
    assert right(filled(root, tmp_path / "c")[0])
    data, calls = filled(root, tmp_path / "c")
    assert calls == 0 and right(data)


# ---- killed while filling --------------------------------------------------------------------------------------------------------------------------

def _killed_at(moment, root, cache):
    """Fills a cache and dies at its so-many-th call that changes the file system; a fork, so the patches are its own."""
    left = [moment]

    def count(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(call):
        def first_count(*args, **kwargs):
            count()
            return call(*args, **kwargs)
        return first_count

    class CountedFile:
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *error): self.file.close()
        def __getattr__(self, name): return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()  # half of it is on the disk when the kill comes
            count()
            self.file.write(data[len(data) // 2:])

    real = builtins.open
    builtins.open = lambda path, mode="r", *args, **kwargs: (count(), CountedFile(real(path, mode, *args, **kwargs)))[1] if mode == "wb" else real(path, mode, *args, **kwargs)
    os.fsync, os.replace, os.unlink = watched(os.fsync), watched(os.replace), watched(os.unlink)
    hashes._RACY_NS = 0
    pack.PackWriter.__init__.__defaults__ = (1, 0.0)  # each entry is published: more moments
    filled(root, cache)


def test_a_run_killed_at_any_call_leaves_a_cache_that_works(tmp_path):
    root, fork, moments = folder_of(tmp_path / "imgs", 2), multiprocessing.get_context("fork"), []
    for moment in range(1, 60):
        cache = tmp_path / f"c{moment}"
        child = fork.Process(target=_killed_at, args=(moment, root, cache))
        child.start()
        child.join(120)
        data, calls = filled(root, cache)
        assert right(data) and calls <= 2, moment
        assert filled(root, cache)[1] == 0 and cache_info(cache).damaged == 0
        moments.append(calls)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert moments[-1] == 0 and moments[0] == 2 and 1 in moments and len(moments) > 15


# ---- what a key must tell apart --------------------------------------------------------------------------------------------------------------------

class Vae:
    """A real autoencoder of the true architecture as an encoder, and its mark."""

    def __init__(self, change=lambda vae: None, dtype=torch.float32):
        torch.manual_seed(0)
        vae = make_vae().to(dtype).eval()
        change(vae)
        self.models, self.mark, self.dtype, self.calls = Models(StableDiffusion(), None, "tiny", {"vae": vae}, {}, {}), fingerprint(vae), dtype, 0

    @torch.no_grad()
    def __call__(self, pixels):
        self.calls += 1
        return self.models.family.posterior(self.models, pixels.to(self.dtype))


def _one_weight(vae):
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3


def _one_setting(vae):
    vae.encoder.conv_norm_out.eps = 0.5
    vae.register_to_config(norm_eps=0.5)


def test_a_vae_with_one_weight_or_setting_changed_or_in_another_dtype_is_another_vae(tmp_path):
    root = folder_of(tmp_path / "imgs", 2)
    kinds = [Vae(), Vae(_one_weight), Vae(_one_setting), Vae(dtype=torch.float64)]
    assert len({vae.mark for vae in kinds}) == 4
    for vae in kinds:
        data, calls = filled(root, tmp_path / "c", vae, vae.mark)
        fresh, _ = filled(root, tmp_path / "none", vae, vae.mark, mode="memory")
        assert calls == 2 and all(torch.equal(a, b) for a, b in zip(means(data).values(), means(fresh).values(), strict=True))
        assert filled(root, tmp_path / "c", Vae(), Vae().mark)[1] == 0
    assert Vae().mark == Vae().mark


def test_memory_is_of_one_vae_too(root, tmp_path):
    data = build(cached(root, tmp_path / "c", mode="memory"))
    data.cache_latents(Encoder(), "v")
    data.cache_latents(Encoder(3.0), "another")
    assert right(data, 3.0)


@pytest.mark.parametrize("what,value", [("PIL", SimpleNamespace(__version__="99.0")), ("PIXELS_VERSION", 99), ("FORMAT", 99)])
def test_another_pillow_pixel_code_or_format_encodes_again(root, tmp_path, monkeypatch, what, value):
    filled(root, tmp_path / "c")
    monkeypatch.setattr(latent_cache, what, value)
    data, calls = filled(root, tmp_path / "c")
    assert calls == 3 and right(data)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_an_image_turned_by_its_exif_mark_alone_is_encoded_again(tmp_path, mode):
    root = tmp_path / "imgs"
    root.mkdir()

    def save(turn):
        exif = Image.Exif()
        exif[0x0112] = turn
        picture(64, 64, 5).save(root / "a.jpg", exif=exif)

    save(1)
    before = os.stat(root / "a.jpg")
    first = means(filled(root, tmp_path / "c", mode=mode)[0])["d0/s0/a.jpg"]
    save(3)
    os.utime(root / "a.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(root / "a.jpg").st_size == before.st_size
    data, calls = filled(root, tmp_path / "c", mode=mode)
    assert calls == 1 and right(data) and not torch.equal(first, means(data)["d0/s0/a.jpg"])


def test_a_mask_edited_with_the_same_size_and_mtime_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_RACY_NS", 0)
    root, masks = folder_of(tmp_path / "imgs", {"00.png": (64, 64), "01.png": (64, 64), "02.png": (64, 64)}), tmp_path / "masks"
    masks.mkdir()
    for name in ("00", "01", "02"):
        Image.new("L", (64, 64), 255).save(masks / f"{name}.bmp")
    filled(root, tmp_path / "c", att_mask=str(masks))
    before = os.stat(masks / "01.bmp")
    time.sleep(0.02)
    Image.new("L", (64, 64), 51).save(masks / "01.bmp")
    os.utime(masks / "01.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    data, calls = filled(root, tmp_path / "c", att_mask=str(masks))
    found = {data.datasets[0].image_id(image): float(data._stores[0].get(image, 0)["mask"].mean()) for image in range(3)}
    assert calls == 1 and found == pytest.approx({"s0/00.png": 1.0, "s0/01.png": 0.2, "s0/02.png": 1.0})


# ---- full disks, ranks that wait, long runs --------------------------------------------------------------------------------------------------------

def _on_a_small_disk(root, cache, answer):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    pack.PackWriter.__init__.__defaults__ = (3000, 3600.0)
    real = PackWriter.add
    calls = []

    def add(self, key, payload):  # the third entry finds the disk full
        calls.append(key)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        real(self, key, payload)

    PackWriter.add = add
    try:
        filled(root, cache)
    except DataError as error:
        answer.put(str(error))


def test_a_disk_that_is_full_says_so_and_what_is_there_is_used(tmp_path):
    root, fork = folder_of(tmp_path / "imgs", 5), multiprocessing.get_context("fork")
    answer = fork.Queue()
    child = fork.Process(target=_on_a_small_disk, args=(root, tmp_path / "c", answer))
    child.start()
    said = answer.get(timeout=120)
    child.join(120)
    assert "cannot be written (File too large). What is in it stays" in said and str(tmp_path / "c") in said
    assert len(list((tmp_path / "c" / "latents-1").iterdir())) == 2  # a pack and its index, nothing half
    data, calls = filled(root, tmp_path / "c")
    assert 0 < calls < 5 and right(data)


def test_an_index_or_a_memo_that_finds_the_disk_full_leaves_nothing_useless(root, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hashes, "_RACY_NS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_whole", full)
        with pytest.raises(DataError, match="the disk is full"):
            filled(root, tmp_path / "c")
    assert list((tmp_path / "c" / "latents-1").iterdir()) == []
    with monkeypatch.context() as patch:  # hashes can be made again: no reason to stop
        patch.setattr(hashes, "write_whole", full)
        data, calls = filled(root, tmp_path / "c")
    assert calls == 3 and right(data)


@pytest.mark.parametrize("mode", ["memory", "disk"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_meet_after_each_piece_and_equally_often(tmp_path, monkeypatch, mode, world):
    """So none waits for long, however much more another has to do; a few images are begun before they meet."""
    monkeypatch.setattr(latent_cache, "_ROUND", 2)
    root = folder_of(tmp_path / "imgs", 11)
    meetings = [[] for _ in range(world)]
    ranks = [(build(cached(root, tmp_path / "c", mode=mode)), Encoder()) for _ in range(world)]

    def work(rank, exchange):
        def counted(item):
            meetings[rank].append(ranks[rank][1].calls)
            return exchange(item)
        ranks[rank][0].cache_latents(ranks[rank][1], "v", rank, world, counted)

    on_ranks(world, work)
    assert all(len(met) == -(-(-(-11 // world)) // 2) for met in meetings)
    assert all(calls <= 2 * number + latent_cache._BEHIND for met in meetings for number, calls in enumerate(met, 1))
    assert all(right(data) for data, _ in ranks) and len(list((tmp_path / "c").rglob("*.idx"))) == (world if mode == "disk" else 0)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_a_vae_that_gives_nan_ends_all_ranks_after_a_piece(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(latent_cache, "_ROUND", 2)
    root = folder_of(tmp_path / "imgs", 12)
    encoders = [Encoder(), Encoder(float("nan"))]
    ranks = [build(cached(root, tmp_path / "c", mode=mode)) for _ in range(2)]
    errors = on_ranks(2, lambda rank, exchange: ranks[rank].cache_latents(encoders[rank], "v", rank, 2, exchange))
    assert all("not finite" in str(error) for error in errors) and [encode.calls for encode in encoders] == [2 + latent_cache._BEHIND] * 2


def test_a_long_run_keeps_its_packs_from_being_pruned(root, tmp_path, monkeypatch):
    data, _ = filled(root, tmp_path / "c")
    [path] = (tmp_path / "c" / "latents-1").glob("*.pack")
    os.utime(path, (0, 0))
    means(data)
    assert path.stat().st_mtime == 0
    monkeypatch.setattr(pack, "TOUCH_SECONDS", 0.0)
    means(data)
    assert prune(tmp_path / "c", days=1) == ([], 0) and time.time() - path.stat().st_mtime < 60


def test_prune_takes_a_killed_memos_file_and_bears_files_that_vanish(root, tmp_path):
    filled(root, tmp_path / "c")
    for name, age in (("hashes-1.bin.1-ab.tmp", 10**6), ("hashes-1.bin.2-cd.tmp", 0), ("mine.tmp", 10**6)):
        (tmp_path / "c" / name).write_bytes(b"x")
        os.utime(tmp_path / "c" / name, (time.time() - age,) * 2)
    (tmp_path / "c" / "latents-1" / "gone.pack.tmp").symlink_to(tmp_path / "nowhere")  # seen in the folder, and not there when asked for
    info = cache_info(tmp_path / "c")
    assert info.leftover == ["hashes-1.bin.1-ab.tmp"] == prune(tmp_path / "c")[0] and info.entries == 3


# ---- text ------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def text():
    from tiny import TOKENIZER
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    return Models(StableDiffusion(), None, "tiny", {"text_encoder": make_text_encoder().eval()}, {"tokenizer": CLIPTokenizer.from_pretrained(TOKENIZER)}, {})


def ahead(*prompts: str) -> SimpleNamespace:
    """Data whose coming steps ask for these."""
    return SimpleNamespace(prompts_ahead=lambda *_: (list(prompts), True))


def test_kept_prompts_are_what_encoding_afresh_gives_under_each_setting(text):
    seen = {}
    for repeats, clip_skip in ((1, 0), (1, 1), (2, 0)):
        encode = TextEncoder(text, repeats, clip_skip)
        frozen = FrozenText(encode, ahead("a cat", "a dog"), torch.device("cpu"))
        frozen.on_epoch_begin(SimpleNamespace(state=SimpleNamespace(positions=None, step=0), total_steps=1), 0)
        with torch.no_grad():
            assert all(torch.equal(frozen([prompt]).hidden, encode([prompt]).hidden) for prompt in ("a dog", "a cat", "not of these steps"))
        seen[repeats, clip_skip] = frozen(["a cat"]).hidden
    assert seen[1, 0].shape != seen[2, 0].shape and not torch.allclose(seen[1, 0], seen[1, 1])


def test_every_prompt_that_is_encoded_is_counted(text):
    seen = []
    with torch.no_grad():
        FrozenText(TextEncoder(text, 1, 0), ahead("a cat", "a dog", "a hen"), torch.device("cpu")).ahead(None, 1, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)


def test_where_the_device_has_no_room_for_the_encoder_in_a_step_the_cpu_encodes_and_it_is_said(text):
    class Crowded(TextEncoder):
        failing = 1

        def __call__(self, prompts):
            self.failing -= 1
            if self.failing == 0:
                raise torch.OutOfMemoryError("no room")
            return super().__call__(prompts)

    said, encode = [], Crowded(text, 1, 0)
    frozen = FrozenText(encode, ahead("a cat", "a dog"), torch.device("cpu"), say=said.append)
    frozen.on_epoch_begin(SimpleNamespace(state=SimpleNamespace(positions=None, step=0), total_steps=1), 0)
    with torch.no_grad():
        assert torch.equal(frozen(["a dog"]).hidden, TextEncoder(text, 1, 0)(["a dog"]).hidden)
    [line] = said
    assert line.startswith("warning:") and "no room left for the text encoders" in line and "on the CPU" in line
    encode.failing = 1
    with pytest.raises(torch.OutOfMemoryError):  # before the first step nothing is lost
        FrozenText(encode, ahead("a cat"), torch.device("cpu")).ahead(None, 1)


def test_a_rank_that_is_asked_for_no_prompt_has_all_it_needs(text):
    frozen = FrozenText(TextEncoder(text, 1, 0), ahead(), torch.device("cpu"), share=(1, 2))
    frozen.ahead(None, 1)
    assert frozen.whole and not len(frozen.cache)


def test_a_prompt_whose_encoding_is_not_finite_is_named(text):
    class Broken(TextEncoder):
        def __call__(self, prompts):
            cond = super().__call__(prompts)
            cond.hidden[["bad" in prompt for prompt in prompts]] = float("nan")
            return cond

    frozen = FrozenText(Broken(text, 1, 0), ahead("a good one", "a bad one"), torch.device("cpu"))
    with pytest.raises(ConfigError, match="not finite for 'a bad one'.*mixed_precision: fp32"):
        frozen.ahead(None, 1)

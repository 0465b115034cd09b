"""Caches: never stale, never half, shared by processes; whatever happens to their files, the latents are right."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from data_help import Encoder, build, cached, dataset, filled, folder_of, means, picture, right, source
from PIL import Image
from safetensors.torch import save

from hcpdiff.data import hashes
from hcpdiff.data.pack import PackFolder, PackWriter
from hcpdiff.data.prune import cache_info, prune
from hcpdiff.data.text_cache import TextCache
from hcpdiff.errors import DataError


@pytest.fixture
def root(tmp_path):
    return folder_of(tmp_path / "imgs", 5)


def age(root, seconds=100):
    """Make files look old enough for their hashes to be remembered (ctime cannot be set, so the clock of the memo is told)."""
    for path in root.rglob("*.*"):
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_each_image_is_encoded_once_and_served_right(root, tmp_path, mode):
    data, calls = filled(root, tmp_path / "c", mode=mode)
    assert calls == 5 and right(data)
    again = Encoder()
    data.cache_latents(again, "v")
    assert again.calls == 0


def test_a_second_start_decodes_no_image_and_encodes_nothing(root, tmp_path, monkeypatch):
    filled(root, tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr("hcpdiff.data.image.decode", lambda *args: pytest.fail("an image was decoded"))
        data, calls = filled(root, tmp_path / "c")
    assert calls == 0 and right(data)


def test_moved_and_renamed_images_are_found_by_content(root, tmp_path):
    filled(root, tmp_path / "c")
    shutil.move(root, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "00.png").rename(tmp_path / "elsewhere" / "new.png")
    data, calls = filled(tmp_path / "elsewhere", tmp_path / "c")
    assert calls == 0 and right(data)


@pytest.mark.parametrize("racy_seconds", [2, 0])
def test_an_edit_that_keeps_size_and_mtime_is_seen(tmp_path, monkeypatch, racy_seconds):
    monkeypatch.setattr(hashes, "_RACY_NS", racy_seconds * 10**9)  # 0: every hash is remembered, so that only ctime tells
    root = tmp_path / "imgs"
    root.mkdir()
    for name, colour in (("1.bmp", "red"), ("2.bmp", "blue")):
        Image.new("RGB", (64, 64), colour).save(root / name)
    age(root)
    first, _ = filled(root, tmp_path / "c")
    before = os.stat(root / "1.bmp")
    time.sleep(0.02)
    Image.new("RGB", (64, 64), "green").save(root / "1.bmp")
    os.utime(root / "1.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(root / "1.bmp")
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    data, calls = filled(root, tmp_path / "c")
    assert calls == 1 and right(data)


def test_hashes_are_remembered_once_files_have_settled(root, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_RACY_NS", 0)
    filled(root, tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr("hcpdiff.data.latent_cache.read_content", lambda path: pytest.fail("a file was read again"))
        data, calls = filled(root, tmp_path / "c")
        assert calls == 0
    assert right(data)
    monkeypatch.setattr(hashes, "_RACY_NS", 10**13)
    shutil.rmtree(tmp_path / "c")
    filled(root, tmp_path / "c")
    assert not (tmp_path / "c" / "hashes-1.bin").exists()


def test_another_vae_size_crop_flip_background_or_mask_is_another_entry(root, tmp_path):
    cache = tmp_path / "c"
    filled(root, cache)
    data, calls = filled(root, cache, Encoder(2.0), vae="other")
    assert calls == 5 and right(data, 2.0)
    data, calls = filled(root, cache, area=2304)
    assert calls == 5 and right(data)
    data, calls = filled(root, cache, flip=True)
    assert calls == 5 and right(data)  # the unflipped half is there
    assert filled(root, cache, bg_color=[0, 0, 0])[1] == 5
    data, calls = filled(root, cache, bucket={"sizes": [[64, 64]], "crop": "random", "crop_variants": 3})
    assert calls == 4 * 3 and right(data)  # one of five is square and there
    shutil.copytree(root, tmp_path / "masks")
    assert filled(root, cache, att_mask=str(tmp_path / "masks"))[1] == 5
    picture(96, 64, 99).save(tmp_path / "masks" / "00.png")
    assert filled(root, cache, att_mask=str(tmp_path / "masks"))[1] == 1
    assert filled(root, cache)[1] == 0


def test_two_sources_with_one_stem_and_two_endings_are_told_apart(tmp_path):
    folder_of(tmp_path / "a", {"x.png": (64, 64), "x.bmp": (64, 64)})
    Image.new("RGB", (64, 64), "red").save(folder_of(tmp_path / "b", {"y.png": (64, 64)}) / "x.png")
    data = build(dataset(source(tmp_path / "a"), source(tmp_path / "b"), cache_latents="disk", cache_dir=str(tmp_path / "c")))
    data.cache_latents(Encoder(), "v")
    assert right(data) and len(means(data)) == 4


def test_equal_pictures_are_encoded_once(tmp_path):
    folder_of(tmp_path / "a", {"1.png": (64, 64)})
    shutil.copy(tmp_path / "a" / "1.png", tmp_path / "a" / "2.png")
    data, calls = filled(tmp_path / "a", tmp_path / "c")
    assert calls == 1 and right(data)


def one(cache, pattern):
    [path] = (cache / "latents-1").glob(pattern)
    return path


def spoil_byte(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


DAMAGE = {
    "a byte of the pack": (lambda cache: spoil_byte(one(cache, "*.pack")), 1),
    "the pack cut short": (lambda cache: os.truncate(one(cache, "*.pack"), 100), 5),
    "the pack empty": (lambda cache: os.truncate(one(cache, "*.pack"), 0), 5),
    "the pack gone": (lambda cache: one(cache, "*.pack").unlink(), 5),
    "a byte of the index": (lambda cache: spoil_byte(one(cache, "*.idx")), 5),
    "the index cut short": (lambda cache: os.truncate(one(cache, "*.idx"), 70), 5),
    "the index empty": (lambda cache: os.truncate(one(cache, "*.idx"), 0), 5),
    "the index gone": (lambda cache: one(cache, "*.idx").unlink(), 5),
    "a newer format": (lambda cache: one(cache, "*.idx").write_bytes(one(cache, "*.idx").read_bytes()[:8] + b"\x02" + one(cache, "*.idx").read_bytes()[9:]), 5),
    "the hashes": (lambda cache: (cache / "hashes-1.bin").write_bytes(b"HCPHASH1 nonsense"), 0),
    "a stranger's file": (lambda cache: (cache / "latents-1" / "zzz.idx").write_bytes(os.urandom(300)), 0),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_costs_encoding_again_and_nothing_else(root, tmp_path, what):
    spoil, again = DAMAGE[what]
    filled(root, tmp_path / "c")
    spoil(tmp_path / "c")
    data, calls = filled(root, tmp_path / "c")
    assert calls == again and right(data)
    assert filled(root, tmp_path / "c")[1] == 0


def foreign(dtype=torch.float32, **shapes):
    """A safetensors file's bytes."""
    return save({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()})


FOREIGN = {
    "no safetensors": b"not safetensors at all",
    "another name": foreign(latent=(4, 8, 8)),
    "a name too many": foreign(mean=(4, 8, 8), std=(4, 8, 8), mask=(8, 8)),
    "another size": foreign(mean=(4, 4, 8), std=(4, 4, 8)),
    "no channels": foreign(mean=(8, 8), std=(8, 8)),
    "other channels": foreign(mean=(16, 8, 8), std=(16, 8, 8)),
    "two types": save({"mean": torch.zeros(4, 8, 8), "std": torch.zeros(4, 8, 8).half()}),
    "whole numbers": foreign(torch.int32, mean=(4, 8, 8), std=(4, 8, 8)),
    "cut short": foreign(mean=(4, 8, 8), std=(4, 8, 8))[:-1],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_somebody_else_has_written_under_a_key_is_made_anew(tmp_path, what):
    """Its digest fits, so that only a look at it tells."""
    root = folder_of(tmp_path / "imgs", {f"{number}.png": (64, 64) for number in range(3)})
    store = filled(root, tmp_path / "c")[0]._stores[0]
    for folder in (PackFolder(tmp_path / "d" / "latents-1"), store.packs):
        with PackWriter(folder) as writer:
            for image in range(3):
                writer.add(store.keys(image)[0], FOREIGN[what])
    data, calls = filled(root, tmp_path / "d")
    assert calls == 3 and right(data) and filled(root, tmp_path / "d")[1] == 0
    data, calls = filled(root, tmp_path / "c")
    assert calls == 0 and right(data), "what was there before serves"


def test_damage_while_training_is_an_error_and_no_wrong_latent(root, tmp_path):
    data, _ = filled(root, tmp_path / "c")
    os.truncate(one(tmp_path / "c", "*.pack"), 10)
    with pytest.raises(DataError, match="damaged or removed while training"):
        means(data)


def test_all_images_that_cannot_be_read_are_named_while_caching(root, tmp_path):
    for mode in ("memory", "disk"):
        data = build(cached(root, tmp_path / "c", mode=mode))
        for name in ("01.png", "03.png"):
            raw = (root / name).read_bytes()
            (root / name).write_bytes(raw[:len(raw) // 2])
        with pytest.raises(DataError) as caught:
            data.cache_latents(Encoder(), "v")
        [fault] = caught.value.faults
        assert fault.startswith("2 images cannot be read") and "01.png: image file is truncated" in fault and "03.png" in fault and "00.png" not in fault
        folder_of(root, 5)


def test_latents_that_are_not_finite_are_never_kept(root, tmp_path):
    def broken(pixels):
        mean, std = Encoder()(pixels)
        return mean * float("nan"), std

    for mode in ("memory", "disk"):
        with pytest.raises(DataError, match="not finite"):
            build(cached(root, tmp_path / "c", mode=mode)).cache_latents(broken, "v")
    data, calls = filled(root, tmp_path / "c")
    assert calls == 5 and right(data)


def test_half_precision_latents_keep_their_dtype(root, tmp_path):
    def half(pixels):
        return tuple(part.to(torch.bfloat16) for part in Encoder()(pixels))

    for mode in ("memory", "disk"):
        data, _ = filled(root, tmp_path / "c", encode=Counted(half), mode=mode)
        assert {mean.dtype for mean in means(data).values()} == {torch.bfloat16}


class Counted:
    """Counts the calls of any encode."""

    def __init__(self, encode):
        self.encode, self.calls = encode, 0

    def __call__(self, pixels):
        self.calls += 1
        return self.encode(pixels)


def test_a_full_disk_says_so_and_leaves_nothing_half(root, tmp_path, monkeypatch):
    def full(self, key, payload):
        self.folder.folder.mkdir(parents=True, exist_ok=True)
        self._name, self._file = "x", open(self.folder.folder / "x.pack.tmp", "wb")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PackWriter, "add", full)
        with pytest.raises(DataError, match="disk is full.*cache_latents: memory"):
            filled(root, tmp_path / "c")
    assert not list((tmp_path / "c" / "latents-1").iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        filled(root, tmp_path / "file" / "c")


# ---- looking after the folder ---------------------------------------------------------------------------------------------------------------------

def test_info_counts_and_prune_removes_what_is_damaged_unused_or_left_over(root, tmp_path):
    cache = tmp_path / "c"
    filled(root, cache)
    info = cache_info(cache)
    assert (info.packs, info.entries, info.damaged, info.leftover) == (1, 5, 0, [])
    assert prune(cache) == ([], 0)
    old = cache / "latents-1" / "old.pack.tmp"
    old.write_bytes(b"x")
    (cache / "latents-1" / "new.pack.tmp").write_bytes(b"x")
    os.utime(old, (0, 0))
    assert prune(cache)[0] == ["old.pack.tmp"]
    spoil_byte(one(cache, "*.pack"))
    assert cache_info(cache).damaged == 1
    assert len(prune(cache, dry_run=True)[0]) == 2 and len(prune(cache)[0]) == 2
    data, calls = filled(root, cache)
    assert calls == 5
    os.utime(one(cache, "*.pack"), (0, 0))
    assert filled(root, cache)[1] == 0 and prune(cache, days=1)[0] == []  # using it keeps it
    os.utime(one(cache, "*.pack"), (0, 0))
    assert len(prune(cache, days=1)[0]) == 2


def test_many_small_packs_are_read_as_one(tmp_path):
    folder = PackFolder(tmp_path / "p")
    with PackWriter(folder, pack_bytes=1000) as writer:
        for n in range(50):
            writer.add(n.to_bytes(32, "little"), bytes([n]) * 300)
    other = PackFolder(tmp_path / "p")
    assert len(other) == 50 and len(list((tmp_path / "p").glob("*.idx"))) == 13
    assert all(other.get(n.to_bytes(32, "little")) == bytes([n]) * 300 for n in range(50))


# ---- text -----------------------------------------------------------------------------------------------------------------------------------------

def test_the_text_cache_encodes_each_prompt_once_in_batches_and_forgets_the_rest():
    asked = []

    def encode(prompts):
        asked.append(list(prompts))
        return [text.upper() for text in prompts]

    cache = TextCache(encode, batch_size=2)
    assert cache.fill(["a", "b", "a", "c"]) == 3 and asked == [["a", "b"], ["c"]]
    assert cache.get(["c", "a", "a"]) == ["C", "A", "A"] and len(asked) == 2
    assert cache.fill(["c", "d"]) == 1 and "a" not in cache and len(cache) == 2
    assert cache.get(["e"]) == ["E"] and "c" in cache


def test_the_memo_survives_a_stranger_and_is_bounded_by_what_was_hashed(tmp_path):
    memo = hashes.HashMemo(tmp_path / "h")
    (tmp_path / "x").write_bytes(b"x")
    content = hashes.read_content(tmp_path / "x")
    memo.remember(tmp_path / "x", content._replace(state=(1, 2, 3, 4, 5)))
    memo.save()
    assert hashes.HashMemo(tmp_path / "h").digest(tmp_path / "x") is None  # the file looks different from what was remembered
    assert np.frombuffer(content.digest, np.uint8).size == 32


@pytest.mark.parametrize("time", [-10**18, 2**63 + 10**18])
def test_the_memo_takes_times_before_1970_and_in_some_hundred_years(tmp_path, monkeypatch, time):
    state = (5, time, time, 2**64 - 1, 2**63)
    monkeypatch.setattr(hashes, "_state", lambda stat: state)
    memo = hashes.HashMemo(tmp_path / "memo")
    memo.remember(tmp_path, hashes.Content(b"", b"d" * 32, state))
    memo.save()
    assert hashes.HashMemo(tmp_path / "memo").digest(tmp_path) == b"d" * 32
    monkeypatch.setattr(hashes, "_state", lambda stat: (5, time + 1, *state[2:]))
    assert hashes.HashMemo(tmp_path / "memo").digest(tmp_path) is None


def test_of_several_entries_of_one_key_the_newest_whole_one_is_served(tmp_path):
    folder = PackFolder(tmp_path / "p")
    key = b"k" * 32
    for payload in (b"oldest", b"middle", b"newest"):
        with PackWriter(folder) as writer:
            writer.add(key, payload)
    packs = sorted((tmp_path / "p").glob("*.pack"))
    for pack, expected in ((None, b"newest"), (packs[2], b"middle"), (packs[1], b"oldest"), (packs[0], None)):
        if pack:
            spoil_byte(pack)
        reader = PackFolder(tmp_path / "p")
        assert reader.get(key) == expected and (key in reader) == (expected is not None)
        reader.refresh()
        assert reader.get(key) == expected

"""Safetensors files: written whole, byte for byte the same, readable by the safetensors package; damaged and hostile ones refused by name."""

import json
import mmap
import os
import struct
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hcpdiff.checkpoint import io
from hcpdiff.checkpoint.atomic import write_atomic
from hcpdiff.checkpoint.io import Scratch, payload_sha256, read_tensor, read_tensors, save_tensors
from hcpdiff.checkpoint.paths import beside, locate, missing, newest, split_name
from hcpdiff.checkpoint.safetensors_header import read_header
from hcpdiff.errors import CheckpointError


def some_tensors():
    g = torch.Generator().manual_seed(0)
    return {"a": torch.randn(3, 4, generator=g), "half.x": torch.randn(5, generator=g).half(), "b": torch.randn(2, 2, generator=g).bfloat16().t(),
            "alpha": torch.tensor(2.0), "count": torch.tensor([1, 2], dtype=torch.int64), "yes": torch.tensor([True]), "none": torch.zeros(0, 3)}


def raw_file(path, header, payload=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + payload)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_safetensors_package_reads_what_is_written_and_the_other_way(tmp_path):
    tensors = some_tensors()
    save_tensors(tmp_path / "a.safetensors", tensors, {"x": "é", "y": "1"})
    theirs = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert set(theirs) == set(tensors) and all(torch.equal(theirs[k], tensors[k]) and theirs[k].dtype == tensors[k].dtype for k in tensors)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"x": "é", "y": "1"}
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "b.safetensors", {"x": "é"})
    ours, metadata = read_tensors(tmp_path / "b.safetensors")
    assert metadata == {"x": "é"} and all(torch.equal(ours[k], tensors[k]) for k in tensors)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    for length in (0x80, 0x8080, 0x4B50):  # '\x80' begins a pickle, 'PK' a zip
        metadata = {"k": ""}
        save_tensors(tmp_path / "a", {"x": torch.ones(1)}, metadata)
        metadata["k"] = "v" * (length - read_header(tmp_path / "a").payload + 8)
        save_tensors(tmp_path / "a", {"x": torch.ones(1)}, metadata)
        assert int.from_bytes((tmp_path / "a").read_bytes()[:8], "little") == length
        assert read_tensors(tmp_path / "a")[1] == metadata


def test_equal_input_gives_equal_bytes_in_any_order(tmp_path):
    tensors, metadata = some_tensors(), {str(i): "v" for i in range(20)}
    save_tensors(tmp_path / "a", tensors, metadata)
    save_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_payload_hash_is_that_of_the_bytes_after_the_header(tmp_path):
    import hashlib

    save_tensors(tmp_path / "a", some_tensors(), {"x": "1"})
    raw = (tmp_path / "a").read_bytes()
    assert payload_sha256(some_tensors()) == hashlib.sha256(raw[read_header(tmp_path / "a").payload:]).hexdigest()


def test_long_names_in_any_script_are_written(tmp_path):
    save_tensors(tmp_path / ("猫" * 80), {"x": torch.ones(1)}, {})  # 240 of the 255 bytes that a name may have
    assert (tmp_path / ("猫" * 80)).is_file()


def test_read_tensors_do_not_depend_on_the_file_any_more(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.ones(4)}, {})
    tensors, _ = read_tensors(tmp_path / "a")
    save_tensors(tmp_path / "a", {"x": torch.zeros(4)}, {})
    tensors["x"] += 1
    assert tensors["x"].tolist() == [2, 2, 2, 2]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(1)}, {})
    before = path.read_bytes()

    def breaks(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="a.safetensors cannot be written: No space left"):
        write_atomic(path, breaks)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(CheckpointError, match="not right"):
        save_tensors(path, {"x": torch.zeros(1)}, {}, check=lambda written: (_ for _ in ()).throw(CheckpointError("not right")))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_write_makes_missing_folders_and_names_what_is_in_the_way(tmp_path):
    save_tensors(tmp_path / "new" / "deep" / "a", {"x": torch.ones(1)}, {})
    assert (tmp_path / "new" / "deep" / "a").is_file()
    with pytest.raises(CheckpointError, match="deep/a is a file, not a folder"):
        save_tensors(tmp_path / "new" / "deep" / "a" / "b" / "c", {"x": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="it is a folder"):
        save_tensors(tmp_path / "new", {"x": torch.ones(1)}, {})


BAD = {
    "empty": (b"", "is empty"),
    "short": (b"\x01\x02", "only 2 bytes"),
    "web page": (b"<!DOCTYPE html><html>", "text"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    "torch.save": (b"PK\x03\x04" + b"\0" * 60, "pickle"),
    "old torch.save": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "pickle"),
    "huge header": (struct.pack("<Q", 2**62) + b"{}", "not a safetensors file"),
    "header beyond the end": (struct.pack("<Q", 5000) + b"{}", "cut short"),
    "not JSON": (struct.pack("<Q", 4) + b"{a:1", "not JSON"),
    "not UTF-8": (struct.pack("<Q", 4) + b'{"\xff"', "not JSON"),
    "deep": (struct.pack("<Q", 200000) + b"[" * 200000, "not JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "not a map"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_safetensors_file_is_told(tmp_path, case):
    (tmp_path / "bad.safetensors").write_bytes(BAD[case][0])
    with pytest.raises(CheckpointError, match=BAD[case][1]) as caught:
        read_tensors(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value)


HOSTILE = {
    "offsets out of range": ({"x": entry(offsets=(0, 400), shape=(100,))}, b"\0" * 4, "cut short"),
    "wrong size": ({"x": entry(shape=(2,))}, b"\0" * 4, "4 bytes are set aside"),
    "negative": ({"x": entry(shape=(-1,), offsets=(0, -4))}, b"", "not a dtype"),
    "overlap": ({"x": entry(), "y": entry(offsets=(2, 6))}, b"\0" * 6, "gap or an overlap"),
    "same bytes twice": ({"x": entry(), "y": entry()}, b"\0" * 4, "gap or an overlap"),
    "gap": ({"x": entry(offsets=(4, 8))}, b"\0" * 8, "gap or an overlap"),
    "trailing": ({"x": entry()}, b"\0" * 9, "after its last tensor"),
    "unknown dtype": ({"x": entry(dtype="F3")}, b"\0" * 4, "'F3'"),
    "bool as size": ({"x": entry(shape=(True,))}, b"\0" * 4, "not a dtype"),
    "overflowing shape": ({"x": entry(shape=(2**62, 2**62, 4), offsets=(0, 0))}, b"", "set aside"),
    "metadata not text": ({"__metadata__": {"a": 1}}, b"", "not a map of text"),
    "lone surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4, "not valid text"),
    "key twice": (b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4, "'x' twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, case):
    header, payload, words = HOSTILE[case]
    with pytest.raises(CheckpointError, match=words):
        read_tensors(raw_file(tmp_path / "bad.safetensors", header, payload))


def test_every_truncation_of_a_file_is_refused(tmp_path):
    save_tensors(tmp_path / "whole", {"x": torch.ones(3), "y": torch.ones(2).half()}, {"k": "v"})
    raw = (tmp_path / "whole").read_bytes()
    for length in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="cut"):
            read_tensors(tmp_path / "cut")


_json = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)
                     | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"]), inner, max_size=4), max_leaves=12)
_number = st.integers(-4, 64) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
_entry = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "BF16", "U8", "F4", ""]), "shape": st.lists(_number, max_size=3),
                                "data_offsets": st.lists(_number, min_size=1, max_size=3)})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.sampled_from(["x", "y", "__metadata__"]), _entry | _json, max_size=3) | _json, payload=st.binary(max_size=16),
       length=st.none() | st.integers(0, 2**64 - 1))
def test_no_header_raises_anything_but_our_error(tmp_path, header, payload, length):
    raw = json.dumps(header).encode()
    (tmp_path / "fuzz").write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + payload)
    try:
        tensors, metadata = read_tensors(tmp_path / "fuzz")
    except CheckpointError as error:
        assert "fuzz" in str(error)
    else:
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == len(payload) and all(isinstance(v, str) for v in metadata.values())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64), st.integers(0, 200))
def test_no_damage_raises_anything_but_our_error(tmp_path, noise, where):
    save_tensors(tmp_path / "whole", {"x": torch.ones(3), "y": torch.ones(2).half()}, {"k": "v"})
    raw = bytearray((tmp_path / "whole").read_bytes())
    raw[where:where + len(noise)] = noise
    (tmp_path / "fuzz").write_bytes(raw)
    try:
        tensors, _ = read_tensors(tmp_path / "fuzz")
    except CheckpointError as error:
        assert "fuzz" in str(error)
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def test_a_missing_file_is_told_with_its_neighbours(tmp_path):
    run = tmp_path / "run" / "ckpts"
    for step in (100, 200):
        save_tensors(run / f"unet-{step}.safetensors", {"x": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=r"unet-300.safetensors does not exist. Nearest in .*ckpts: unet-[12]00.safetensors, unet-[12]00.safetensors"):
        read_tensors(run / "unet-300.safetensors")
    assert "Nearest" in missing(tmp_path / "rum" / "ckpts" / "x.safetensors") and "run" in missing(tmp_path / "rum" / "x.safetensors")
    assert "is a file, not a folder" in missing(run / "unet-100.safetensors" / "x")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_tensors(run)


def test_a_run_folder_stands_for_its_newest_step_with_all_parts(tmp_path):
    ckpts = tmp_path / "run" / "ckpts"
    for name in ("unet-900", "unet-1000", "text_encoder-1000", "text_encoder_2-1000", "text_encoder-2"):
        save_tensors(ckpts / f"{name}.safetensors", {"x": torch.ones(1)}, {})
    found = locate(tmp_path / "run")
    assert found.step == "1000" and list(found.parts) == ["unet", "text_encoder", "text_encoder_2"]
    assert newest(ckpts) == found and locate(ckpts / "unet-900.safetensors") == ckpts / "unet-900.safetensors"
    assert set(beside(ckpts / "unet-1000.safetensors")) == {"text_encoder", "text_encoder_2"} and beside(ckpts / "unet-900.safetensors") == {}
    assert split_name("text_encoder_2-5.safetensors") == ("text_encoder_2", "5") and split_name("mylora.safetensors") is None
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        locate("x" * 5000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no weight files"):
        locate(tmp_path / "empty")


@pytest.mark.parametrize("mapped", [True, False])
def test_scratch_shows_one_tensor_after_the_other(tmp_path, monkeypatch, mapped):
    """Equal to what is read into memory of its own, also where the file cannot be mapped safely (an older kernel); every tensor of a file fits, an empty one too."""
    if not mapped:
        monkeypatch.setattr(io, "_POPULATE_READ", 9999)
    tensors = {"large": torch.randn(40, 30), "half": torch.randn(7).half(), "empty": torch.zeros(0, 3), "scalar": torch.tensor(5), "flag": torch.tensor([True, False, True])}
    save_tensors(tmp_path / "t.safetensors", tensors, {})
    header, scratch = read_header(tmp_path / "t.safetensors"), Scratch()
    for name in [*tensors, *reversed(tensors)]:
        found = read_tensor(tmp_path / "t.safetensors", header, name, scratch)
        assert found.dtype == tensors[name].dtype and torch.equal(found, tensors[name])
    first = read_tensor(tmp_path / "t.safetensors", header, "large", scratch)
    shared = read_tensor(tmp_path / "t.safetensors", header, "half", scratch).data_ptr() == first.data_ptr()
    assert shared != (mapped and sys.platform == "linux")
    first.zero_()
    assert torch.equal(read_tensor(tmp_path / "t.safetensors", header, "large", scratch), tensors["large"]), "what is done to it does not reach the file"
    with open(tmp_path / "t.safetensors", "r+b") as file:
        file.truncate(header.payload + 100)
    with pytest.raises(CheckpointError):
        read_tensor(tmp_path / "t.safetensors", header, "large", scratch)


@pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux only")
def test_a_file_that_is_cut_after_it_was_mapped_is_an_error_and_no_dead_process(tmp_path, monkeypatch):
    """Looking at a page that is not there any more would be SIGBUS."""
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"large": torch.ones(300, 1000)}, {})
    header, real = read_header(path), mmap.mmap
    assert torch.equal(read_tensor(path, header, "large", Scratch()), torch.ones(300, 1000))

    def cut(*args, **keys):
        pages = real(*args, **keys)
        os.truncate(path, 5000)
        return pages

    monkeypatch.setattr(io.mmap, "mmap", cut)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        read_tensor(path, header, "large", Scratch())

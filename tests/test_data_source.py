"""Sources: every image is found, and everything wrong with a folder is in one message."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_help import Encoder, bomb, build, dataset, folder_of, picture, source
from PIL import Image
from rich.console import Console

from hcpdiff.data import image as pixels
from hcpdiff.data.source import check_sources, read_source
from hcpdiff.errors import DataError


def read(config, **extra):
    faults = []
    return read_source("s", config, "data.d.source.s", faults, **extra), faults


def test_images_are_found_in_folders_below_by_any_case_and_name(tmp_path):
    names = ["2.png", "1.JPG", "a b/猫 😀.webp", "a b/c/v1.0.jpeg", "é.gif", "x.bmp", "y.avif"]
    folder_of(tmp_path, {name: (40, 30) for name in names})
    found, faults = read(source(tmp_path))
    assert not faults and found.keys == sorted(names) and found.sizes.tolist() == [[40, 30]] * 7


def test_hidden_files_other_files_and_mask_folder_are_no_images(tmp_path):
    folder_of(tmp_path, {name: (40, 30) for name in ["1.png", "masks/1.png", ".hidden.png", ".git/2.png", "__MACOSX/3.png"]})
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "scan.tiff").write_text("x")
    found, faults = read(source(tmp_path, att_mask=str(tmp_path / "masks")))
    assert not faults and found.keys == ["1.png"] and found.masks == [os.path.join(tmp_path, "masks", "1.png")]
    assert found.notices[0] == "1 .tiff files are left out"


def test_a_folder_named_like_an_image_and_a_symlink_loop_do_no_harm(tmp_path):
    folder_of(tmp_path, {"trap.png/1.png": (40, 30)})
    (tmp_path / "trap.png" / "loop").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "pipe.png")
    found, faults = read(source(tmp_path))
    assert not faults and found.keys == ["trap.png/1.png"]


def test_a_link_to_nothing_or_to_itself_is_a_damaged_image(tmp_path):
    folder_of(tmp_path, {"1.png": (40, 30)})
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    _, [fault] = read(source(tmp_path))
    assert "2 of 3 images" in fault and "gone.png: the file is gone" in fault and "self.png" in fault


def test_names_that_are_not_utf8_work_everywhere(tmp_path):
    folder_of(tmp_path, {"1.png": (64, 64)})
    (tmp_path / "1.png").rename(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png").decode("utf-8", "surrogateescape"))
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"), "w") as file:
        file.write("coffee")
    data = build(dataset(source(tmp_path, caption_file=str(tmp_path)), cache_latents="disk", cache_dir=str(tmp_path / ".cache")))
    data.cache_latents(Encoder(), "v")
    [(_, _, [batch])] = list(data.batches(count=1))
    assert batch.prompts == ["coffee"] and batch.ids == ("d0/s0/caf\\udce9.png",)
    data.report(Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8")))
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        build(dataset(source(tmp_path), cache_latents="none"))
    assert str(caught.value).encode("utf-8")


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_may_not_be_listed_is_a_fault(tmp_path):
    folder_of(tmp_path, {"a/1.png": (64, 64), "b/1.png": (64, 64)})
    (tmp_path / "b").chmod(0)
    _, faults = read(source(tmp_path))
    (tmp_path / "b").chmod(0o755)
    assert "cannot be listed" in faults[0]


def test_images_that_were_decoded_for_a_disk_cache_are_not_verified_again(tmp_path, monkeypatch):
    folder_of(tmp_path, 3)
    monkeypatch.setattr("hcpdiff.data.hashes._RACY_NS", 0)
    config = dataset(source(tmp_path, skip_bad_images=True), cache_latents="disk", cache_dir=str(tmp_path / ".cache"))
    build(config).cache_latents(Encoder(), "v")
    monkeypatch.setattr("hcpdiff.data.image.verify", lambda path: pytest.fail("verified again"))
    assert build(config).images == 3


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_images_of_extreme_shape_are_trained_all_the_same(tmp_path, size):
    folder_of(tmp_path, {"x.png": size})
    [(_, _, [batch])] = list(build(dataset(source(tmp_path), area=64 * 64)).batches(count=1))
    assert batch.pixels.shape[2] * batch.pixels.shape[3] <= 64 * 64 and batch.pixels.isfinite().all()


def test_the_header_pass_decodes_no_pixels(tmp_path, monkeypatch):
    folder_of(tmp_path, 3)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    assert len(read(source(tmp_path))[0].keys) == 3


def damage(root: Path) -> list[str]:
    """Eight ways to be no image; returns their names."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        noise.save(root / name)
        raw = (root / name).read_bytes()
        (root / name).write_bytes(raw[:len(raw) // 2])
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpg").write_text("I am not an image")
    (root / "zeros.png").write_bytes(bytes(1000))
    (root / "bomb.png").write_bytes(bomb())
    raw = bytearray((root / "00.png").read_bytes())
    raw[raw.index(b"IDAT") + 8] ^= 0xFF
    (root / "flipped.png").write_bytes(raw)
    return ["cut.png", "cut.jpg", "cut.webp", "empty.png", "text.jpg", "zeros.png", "bomb.png", "flipped.png"]


def test_all_damaged_images_are_named_at_once_and_skip_bad_images_goes_on(tmp_path):
    folder_of(tmp_path, 3)
    names = damage(tmp_path)
    with pytest.raises(DataError) as caught:
        build(dataset(source(tmp_path)))
    [fault] = caught.value.faults
    assert fault.startswith("data.d0.source.s0: 8 of 11 images cannot be read") and "skip_bad_images" in fault
    assert all(f"\n  {name}: " in fault for name in names)
    assert "empty.png: the file is empty" in fault and "bomb.png: more than 178 megapixels" in fault and "text.jpg: is not an image" in fault

    data = build(dataset(source(tmp_path, skip_bad_images=True), cache_latents="memory"))
    assert data.images == 3 and len(data.datasets[0].sources[0].skipped) == 8


def test_captions_of_skipped_images_are_not_told_as_unused(tmp_path):
    folder_of(tmp_path, {"1.png": (40, 30)})
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "c.json").write_text('{"1": "one", "2": "two", "3": "three"}')
    found, faults = read(source(tmp_path, skip_bad_images=True, caption_file=str(tmp_path / "c.json")))
    assert not faults and found.keys == ["1.png"] and found.captions.texts == ["one"]
    assert found.notices == ["1 captions belong to no image: '3'"]


def test_a_caption_whose_name_is_misspelt_is_shown_beside_its_image(tmp_path):
    folder_of(tmp_path / "i", {name: (40, 30) for name in ("green_kite.png", "red_kite.png", "IMG_0001.png", "pic_1.png", "image_0001.png")})
    for name in ("grene_kite", "img-0001", "something", "red_kite", "pci_1", "image_0002"):
        (tmp_path / "i" / f"{name}.txt").write_text("a caption", "utf-8")
    found, faults = read(source(tmp_path / "i", caption_file=str(tmp_path / "i")))
    assert not faults and [line for line in found.notices if "nearly" in line] == ["3 of them nearly match: 'IMG_0001.png' ~ 'img-0001', 'green_kite.png' ~ 'grene_kite', 'pic_1.png' ~ 'pci_1'"]


def test_a_bad_image_is_the_only_fault_where_its_caption_is_the_only_one(tmp_path):
    """Without skip_bad_images; whatever the form of the captions, nothing is said of them."""
    folder_of(tmp_path / "i", {"1.png": (40, 30)})
    (tmp_path / "i" / "2.png").write_bytes(b"")
    (tmp_path / "c.json").write_text('{"2": "two"}')
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "2.txt").write_text("two")
    for file in ("c.json", "t"):
        found, faults = read(source(tmp_path / "i", caption_file=str(tmp_path / file)))
        assert len(faults) == 1 and "1 of 2 images cannot be read" in faults[0] and not found.captions.notices, file


def test_the_caption_of_a_skipped_image_may_lie_deeper(tmp_path):
    folder_of(tmp_path, {"1.png": (40, 30)})
    (tmp_path / "7.png").write_bytes(b"")
    deep = {"captions/part1/1": "one", "captions/part1/7.png": "seven"}
    (tmp_path / "c.json").write_text(json.dumps(deep))
    found, faults = read(source(tmp_path, skip_bad_images=True, caption_file=str(tmp_path / "c.json")))
    assert not faults and not found.notices and found.captions.texts == ["one"]
    (tmp_path / "c.json").write_text(json.dumps(deep | {"captions/part2/7.png": "seven"}))  # two keys with the tail are nobody's, of a whole image too
    found, faults = read(source(tmp_path, skip_bad_images=True, caption_file=str(tmp_path / "c.json")))
    assert not faults and found.notices == ["2 captions belong to no image: 'captions/part1/7.png', 'captions/part2/7.png'"]
    (tmp_path / "t" / "captions" / "part1").mkdir(parents=True)
    for name in "17":
        (tmp_path / "t" / "captions" / "part1" / f"{name}.txt").write_text(name)
    found, faults = read(source(tmp_path, skip_bad_images=True, caption_file=str(tmp_path / "t")))
    assert not faults and not found.notices and found.captions.texts == ["1"]


def test_skipped_images_take_no_caption_from_others(tmp_path):
    """A damaged image of the same name in another folder makes no key doubtful, and the captions that only skipped images have are not read."""
    folder_of(tmp_path / "i", {"a/x.png": (40, 30), "7.png": (40, 30)})
    (tmp_path / "i" / "b").mkdir()
    for name in ("b/x.png", "b/7.png", "bad.png"):
        (tmp_path / "i" / name).write_bytes(b"")
    (tmp_path / "c.json").write_text('{"x": "one", "deep/7": "seven"}')
    found, faults = read(source(tmp_path / "i", skip_bad_images=True, caption_file=str(tmp_path / "c.json")))
    assert not faults and dict(zip(found.keys, found.captions.texts)) == {"a/x.png": "one", "7.png": "seven"}
    (tmp_path / "c.json").write_text('{"x": "one", "b/7": "their own"}')  # of a whole b/7.png it would be
    found, faults = read(source(tmp_path / "i", skip_bad_images=True, caption_file=str(tmp_path / "c.json")))
    assert not faults and not found.notices and dict(zip(found.keys, found.captions.texts)) == {"a/x.png": "one", "7.png": None}
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x.txt").write_text("text")
    (tmp_path / "t" / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    found, faults = read(source(tmp_path / "i", skip_bad_images=True, caption_file=str(tmp_path / "t")))
    assert not faults and not found.notices and sorted(map(str, found.captions.texts)) == ["None", "text"]


@pytest.mark.parametrize("mode", ["none", "memory", "disk"])
def test_an_image_for_which_there_is_no_memory_is_not_skipped_and_not_called_damaged(tmp_path, monkeypatch, mode):
    folder_of(tmp_path / "i", 3)

    def full(function):
        def read(file, *more):
            if Path(file if isinstance(file, str) else tmp_path / "i" / "01.png").name == "01.png":
                raise MemoryError
            return function(file, *more)
        return read

    config = dataset(source(tmp_path / "i", skip_bad_images=mode == "none"), cache_latents=mode, cache_dir=str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        for name in ("decode", "verify"):
            patch.setattr(pixels, name, full(getattr(pixels, name)))
        with pytest.raises(DataError) as caught:
            build(config).cache_latents(Encoder(), "v")
    message = str(caught.value)
    assert "01.png: no main memory was left" in message and "cannot be read" not in message and "skip_bad_images" not in message
    assert "train.workers" not in message  # none of its processes read it
    assert build(config).images == 3


def test_an_image_under_another_ending_is_read_by_its_content(tmp_path):
    picture(40, 30).save(tmp_path / "really.jpg", "PNG")
    assert read(source(tmp_path), verify=True)[0].sizes.tolist() == [[40, 30]]


def test_a_missing_folder_names_the_near_one_and_an_empty_one_what_is_there(tmp_path):
    (tmp_path / "train_data").mkdir()
    (tmp_path / "train_data" / "a.txt").write_text("x")
    _, [fault] = read(source(tmp_path / "train_dat"))
    assert fault.startswith("data.d.source.s.img_root = ") and "Near it: train_data" in fault
    _, [fault] = read(source(tmp_path / "train_data"))
    assert "holds no image" in fault and "1 .txt" in fault
    _, [fault] = read(source(tmp_path / "train_data" / "a.txt"))
    assert "is a file, not a folder" in fault


def test_captions_matching_nothing_are_a_fault_that_shows_both_sides(tmp_path):
    folder_of(tmp_path, {"1.png": (40, 30)})
    (tmp_path / "c.json").write_text('{"001": "one"}')
    _, [fault] = read(source(tmp_path, caption_file=str(tmp_path / "c.json")))
    assert "has a caption for none of 1 images (1.png)" in fault and "'1.png' ~ '001'" in fault
    _, [fault] = read(source(tmp_path, caption_file=str(folder_of(tmp_path / "other", 1))))
    assert "caption for none" in fault


def test_all_missing_masks_and_masks_of_another_shape_are_listed(tmp_path):
    folder_of(tmp_path / "img", {"1.png": (40, 30), "2.png": (40, 30), "3.png": (40, 30)})
    folder_of(tmp_path / "mask", {"1.jpg": (20, 15)})
    _, [fault] = read(source(tmp_path / "img", att_mask=str(tmp_path / "mask")))
    assert "lacks the mask of 2 of 3 images" in fault and fault.endswith("\n  2.png\n  3.png")
    folder_of(tmp_path / "mask", {"1.jpg": (20, 15), "2.png": (30, 40), "3.png": (40, 30)})
    _, [fault] = read(source(tmp_path / "img", att_mask=str(tmp_path / "mask")))
    assert "2.png: 30 x 40 has another shape" in fault and "3.png" not in fault


def test_every_fault_of_all_sources_and_datasets_is_in_one_error(tmp_path):
    folder_of(tmp_path / "a", 2)
    (tmp_path / "a" / "x.json").write_text("{")
    (tmp_path / "t.txt").write_text("{who}")
    (tmp_path / "a" / "bad.png").write_bytes(b"")
    first = dataset(source(tmp_path / "nowhere"), source(tmp_path / "a", caption_file=str(tmp_path / "a")), step=12)
    second = dataset(source(tmp_path / "a", prompt_template=str(tmp_path / "t.txt"), skip_bad_images=True), area=100)
    with pytest.raises(DataError) as caught:
        build(first, second)
    text = "\n".join(caught.value.faults)
    for part in ("nowhere", "x.json: line 1 column 2", "bad.png", "d0.bucket.step_size = 12", "{who}", "d1.bucket.target_area = 100"):
        assert part in text


def test_the_quick_check_finds_paths_captions_and_templates(tmp_path):
    folder_of(tmp_path, 1)
    (tmp_path / "c.yaml").write_text("a: b: c")
    (tmp_path / "t.txt").write_text("{who} {pt1}")
    config = dataset(source(tmp_path / "no", caption_file=str(tmp_path / "c.yaml"), att_mask=str(tmp_path / "nomask"), prompt_template=str(tmp_path / "t.txt")))
    faults = check_sources({"d": config})
    assert [any(part in fault for fault in faults) for part in ("img_root", "c.yaml: line 1", "att_mask", "{who}", "{pt1}")] == [True] * 5


def test_indexing_imports_no_torch():
    code = ("import sys, hcpdiff.data.source, hcpdiff.data.bucket, hcpdiff.data.plan, hcpdiff.data.pack, hcpdiff.data.hashes, hcpdiff.data.prune\n"
            "assert not {'torch', 'diffusers', 'transformers', 'rich', 'hydra'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_links_to_images_are_images_and_a_dataset_without_a_source_is_a_fault(tmp_path):
    folder_of(tmp_path, 1)
    (tmp_path / "b.png").symlink_to(tmp_path / "00.png")
    found, faults = read(source(tmp_path))
    assert not faults and found.keys == ["00.png", "b.png"]
    with pytest.raises(DataError, match="there is no source"):
        build(dataset())

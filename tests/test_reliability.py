"""What docs/reliability.md says of bad input is what the commands really say, and good input of every kind gives the right pixels."""

import io
import os
import shutil
import tracemalloc
from pathlib import Path

import bad_inputs
import numpy as np
import pytest
from bad_inputs import DRAW, PAGES, ROWS, TRAIN
from data_help import dataset, source
from PIL import Image, ImageCms, ImageOps

from hcpdiff import cli, train_ac_single, visualizer
from hcpdiff.data.dataset import build_train_data
from hcpdiff.data.image import decode, fit
from hcpdiff.data.sample import load_views
from hcpdiff.errors import DataError

ROOT = Path(__file__).parents[1]
COMMANDS = {"train": (train_ac_single, "train.yaml"), "draw": (visualizer, "draw.yaml")}


@pytest.fixture
def place(tmp_path, tiny_sd1, monkeypatch):
    """A working folder with three captioned images, a model and both configs."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "images").mkdir()
    for number, name in enumerate("abc"):
        Image.effect_noise((64, 64), 20 + 9 * number).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text("a thing", encoding="utf-8")
    shutil.copytree(tiny_sd1, tmp_path / "model")
    (tmp_path / "train.yaml").write_text(TRAIN, encoding="utf-8")
    (tmp_path / "draw.yaml").write_text(DRAW, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.en)
def test_bad_input_is_told_as_the_page_says(place, row, capsys):
    arguments = (row.spoil() if callable(row.spoil) else row.spoil) or []
    before = set(place.rglob("*"))
    module, config = COMMANDS[row.command]
    own = [] if any(argument.startswith("--cfg") for argument in arguments) else ["--cfg", config]
    with pytest.raises(SystemExit) as ended:
        cli.run(module.main, module.parser, [*own, *(argument for argument in arguments if argument != "--cfg=")])
    told = capsys.readouterr().err
    assert ended.value.code == row.code and "Traceback" not in told, told
    position = 0
    for word in row.words:
        assert word in told[position:], f"{word!r} is not in: {told}"
        position = told.index(word, position)
    made = {path for path in set(place.rglob("*")) - before if path.name != "exps"}
    assert "\x1b" not in told and not made and not (place / "marker").exists()


@pytest.mark.parametrize("page, language", PAGES.items())
def test_the_pages_tables_are_those_of_the_rows(page, language):
    assert len(ROWS) >= 60 and len({row.en for row in ROWS}) == len(ROWS)
    assert (ROOT / page).read_text(encoding="utf-8") == bad_inputs.written(page, language), "python tests/bad_inputs.py writes them"


# -- good input that other programs stumble over -------------------------------------------------------------------------------------

BASE = ImageOps.flip(Image.linear_gradient("L")).resize((64, 48))
RGB = Image.merge("RGB", (BASE, BASE.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("L", (64, 48), 90)))


def other_profile() -> bytes:
    """sRGB with red and green exchanged."""
    raw = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    raw = raw.replace("sRGB built-in".encode("utf-16-be"), "Swap built-in".encode("utf-16-be"))
    return raw.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)


def see_through(mode: str) -> Image.Image:
    image = RGB.convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 32, 48))
    return image.quantize(64) if mode == "P" else image.convert(mode)


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


EXIF = Image.Exif()
EXIF[0x0112] = 6
GREY16 = Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16))
SECOND = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "red")]}
KINDS = {  # ending, image, options of save, what is trained on, mean difference allowed
    "gif of several frames": ("gif", RGB.quantize(128), SECOND, RGB.quantize(128).convert("RGB"), 3), "animated webp": ("webp", RGB, SECOND | {"lossless": True}, RGB, 1), "animated png": ("png", RGB, SECOND, RGB, 0),
    "CMYK jpeg": ("jpg", RGB.convert("CMYK"), {"quality": 98}, RGB, 6), "16-bit png": ("png", GREY16, {}, None, 1),
    "1-bit png": ("png", BASE.convert("1"), {}, BASE.convert("1").convert("RGB"), 0), "palette with transparency": ("png", see_through("P"), {}, on_white(see_through("P")), 0),
    "grey with transparency": ("png", see_through("LA"), {}, on_white(see_through("LA")), 0), "turned by EXIF": ("jpg", RGB, {"exif": EXIF, "quality": 98}, RGB.transpose(Image.Transpose.ROTATE_270), 4),
    "another colour profile": ("png", RGB, {"icc_profile": other_profile()}, Image.merge("RGB", (RGB.getchannel(1), RGB.getchannel(0), RGB.getchannel(2))), 2),
    "damaged colour profile": ("png", RGB, {"icc_profile": b"junk"}, RGB, 0), "one pixel": ("png", Image.new("RGB", (1, 1), (9, 99, 199)), {}, Image.new("RGB", (1, 1), (9, 99, 199)), 0),
    "1 x 5000": ("png", Image.new("RGB", (1, 5000), (9, 99, 199)), {}, Image.new("RGB", (1, 5000), (9, 99, 199)), 0), "wrong ending": ("gif", RGB, {"format": "PNG"}, RGB, 0),
    "spaces, 中文 and 😀": ("png", RGB, {}, RGB, 0), "a\nnewline": ("png", RGB, {}, RGB, 0),
}


@pytest.mark.parametrize("name", KINDS)
def test_images_of_every_kind_are_trained_with_the_pixels_that_a_viewer_shows(tmp_path, name):
    ending, image, options, expected, tolerance = KINDS[name]
    path = tmp_path / f"{name}.{ending}"
    image.save(path, **options)
    data = build_train_data({"d": dataset(source(tmp_path), area=1024, step=8)}, seed=1, micro_per_step=1, workers=0)
    view = data.datasets[0].views(0)[0]
    rgb = load_views(data.datasets[0], 0, [view], 8)[0][0]
    if expected is None:  # Pillow has no conversion of 16 bits that keeps the brightness
        expected = Image.fromarray((np.asarray(image, np.float64) / 257).round().astype(np.uint8)).convert("RGB")
    assert np.abs(rgb.astype(int) - fit(expected, view).astype(int)).mean() <= tolerance


def test_what_only_looks_like_an_image_is_passed_over(tmp_path):
    """A folder of that name, a pipe, a link to the folder above, macOS' and Windows' own files; the two images are found once each."""
    RGB.save(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    RGB.save(tmp_path / "folder.png" / "b.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    data = build_train_data({"d": dataset(source(tmp_path), area=1024, step=8)}, seed=1, micro_per_step=1, workers=0)
    assert data.datasets[0].sources[0].keys == ["a.png", "folder.png/b.png"]


@pytest.mark.parametrize("raw, prompt", [("\ufeffa cat".encode(), "a cat"), (b"", ""), (b"  \r\n", ""), ("a\r\nb\n".encode(), "a b"), (b"word " * 10_000, ("word " * 10_000).strip())], ids=["BOM", "empty", "blank", "lines", "long"])
def test_captions_of_every_kind_are_read(tmp_path, raw, prompt):
    RGB.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(raw)
    data = build_train_data({"d": dataset(source(tmp_path, caption_file=str(tmp_path)), area=1024, step=8)}, seed=1, micro_per_step=1, workers=0)
    assert next(iter(data.batches(count=1)))[2][0].prompts == [prompt]


def test_skip_bad_images_trains_the_others_and_equal_images_are_two(tmp_path):
    for name in ("a", "b"):
        RGB.save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "d.png").symlink_to("nowhere")
    data = build_train_data({"d": dataset(source(tmp_path, skip_bad_images=True), area=1024, step=8)}, seed=1, micro_per_step=1, workers=0)
    assert data.datasets[0].sources[0].keys == ["a.png", "b.png"] and len(data.datasets[0].sources[0].skipped) == 2


@pytest.mark.parametrize("change", ["gone", "cut", "resized", "folder"])
def test_an_image_that_changes_after_the_start_is_named(tmp_path, change):
    RGB.save(tmp_path / "a.png")
    data = build_train_data({"d": dataset(source(tmp_path), area=1024, step=8)}, seed=1, micro_per_step=1, workers=0)
    raw = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").unlink()
    if change == "cut":
        (tmp_path / "a.png").write_bytes(raw[:len(raw) // 2])
    elif change == "resized":
        RGB.resize((20, 90)).save(tmp_path / "a.png")
    elif change == "folder":
        (tmp_path / "a.png").mkdir()
    with pytest.raises(DataError, match="a.png"):
        next(iter(data.batches(count=1)))


def test_a_bomb_is_refused_without_its_memory(tmp_path):
    (tmp_path / "a.png").write_bytes(bad_inputs.bomb())
    tracemalloc.start()
    with pytest.raises(DataError, match="megapixels"):
        build_train_data({"d": dataset(source(tmp_path), area=1024, step=8)}, seed=1, micro_per_step=1, workers=0)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    with pytest.raises(Image.DecompressionBombError):
        decode(io.BytesIO(bad_inputs.bomb()))

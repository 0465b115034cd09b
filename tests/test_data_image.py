"""Pixels: every kind of image becomes the upright RGB that a viewer shows, resized and cropped where the numbers say."""

import io

import numpy as np
import pytest
from data_help import bomb, picture
from PIL import Image

from hcpdiff.data.image import READ_FAULTS, View, crop_box, crop_offset, decode, decode_mask, fit, fit_mask, has_slack, read_header, verify

SIZE = (48, 32)


def stored(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def close(image, expected, tolerance):
    assert image.mode == "RGB" and image.size == expected.size
    return np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() <= tolerance


@pytest.mark.parametrize("form, tolerance, options", [
    ("PNG", 0, {}), ("JPEG", 4, {"quality": 95}), ("WEBP", 0, {"lossless": True}), ("BMP", 0, {}), ("AVIF", 6, {"quality": 95}),
])
def test_each_format_gives_its_picture(form, tolerance, options):
    assert close(decode(stored(picture(*SIZE), form, **options)), picture(*SIZE), tolerance)


@pytest.mark.parametrize("mode, tolerance", [("L", 0), ("1", 128), ("CMYK", 0), ("YCbCr", 3), ("P", 40)])
def test_each_mode_becomes_rgb(mode, tolerance):
    image = picture(*SIZE).convert(mode)
    form = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    reference = picture(*SIZE).convert("L").convert("RGB") if mode in "L1" else picture(*SIZE)
    assert close(decode(stored(image, form, **({"quality": 98} if form == "JPEG" else {}))), reference, tolerance + 5 * (form == "JPEG"))


def test_sixteen_bit_grey_keeps_its_brightness():
    grey = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    out = np.asarray(decode(stored(Image.fromarray(grey))))
    assert np.abs(out[..., 0].astype(float) - grey / 257).max() <= 0.51 and (out[..., 0] == out[..., 2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_shows_the_background(mode):
    image = Image.new("RGBA", SIZE, (200, 200, 200, 255))
    image.paste((0, 0, 0, 0), (0, 0, 24, 32))
    if mode == "P":
        file = stored(image.quantize(8), "PNG")
    elif mode == "PA":
        file = stored(image, "WEBP", lossless=True)
    else:
        file = stored(image.convert(mode))
    out = np.asarray(decode(file, (10, 20, 30)))
    assert out[5, 5].tolist() == [10, 20, 30] and out[5, 40].tolist() == [200, 200, 200]


def test_half_transparent_pixels_are_blended():
    out = decode(stored(Image.new("RGBA", (2, 2), (0, 0, 0, 128))), (255, 255, 255))
    assert abs(out.getpixel((0, 0))[0] - 127) <= 1


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(form):
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    out = decode(stored(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert out.getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied_and_the_header_says_the_upright_size(form, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    file = stored(picture(*SIZE), form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    reference = Image.open(file)
    from PIL import ImageOps
    upright = ImageOps.exif_transpose(reference).convert("RGB")
    file.seek(0)
    assert read_header(file) == upright.size == (SIZE if turn < 5 else SIZE[::-1])
    file.seek(0)
    assert close(decode(file), upright, 0)


def test_an_exif_chunk_behind_the_pixels_of_a_png_counts_in_header_and_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = stored(picture(*SIZE), exif=exif).read()
    start = raw.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(raw[start:start + 4], "big")
    moved = raw[:start] + raw[end:-12] + raw[start:end] + raw[-12:]
    (tmp_path / "late.png").write_bytes(moved)
    assert read_header(tmp_path / "late.png") == SIZE[::-1]
    assert decode(tmp_path / "late.png").size == SIZE[::-1]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncation_is_found_by_verify_and_by_decode(form):
    rng = np.random.default_rng(0)
    raw = stored(Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)), form).read()
    for work in (verify, decode):
        with pytest.raises(READ_FAULTS):
            work(io.BytesIO(raw[:len(raw) * 2 // 3]))


@pytest.mark.parametrize("form, options", [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("BMP", {}), ("AVIF", {})])
def test_the_quick_check_finds_what_decoding_would_find_wherever_a_file_is_cut(form, options):
    rng = np.random.default_rng(0)
    raw = stored(Image.fromarray(rng.integers(0, 255, (48, 40, 3), dtype=np.uint8)), form, **options).read()

    def works(work, cut):
        try:
            work(io.BytesIO(raw[:len(raw) - cut]))
        except READ_FAULTS:
            return False
        return True

    cuts = [0, *range(1, 30, 3), *(len(raw) * part // 10 for part in range(1, 10))]
    found = [works(verify, cut) for cut in cuts]
    assert found == [works(decode, cut) for cut in cuts] and found[0] and not any(found[-9:])


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    with pytest.raises(Image.DecompressionBombError):
        read_header(tmp_path / "bomb.png")


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (1, 1), (1, 5000), (4000, 3)])
@pytest.mark.parametrize("target", [(64, 64), (96, 64), (32, 128)])
@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_the_crop_lies_inside_has_the_targets_ratio_and_touches_two_sides(size, target, position):
    left, top, right, bottom = crop_box(size, View(*target, position))
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert (right - left) / (bottom - top) == pytest.approx(target[0] / target[1], rel=1e-6)
    assert right - left == pytest.approx(size[0]) or bottom - top == pytest.approx(size[1])
    assert fit(Image.new("RGB", size), View(*target, position)).shape == (target[1], target[0], 3)


def test_fit_equals_resizing_the_whole_and_cropping_then():
    image = picture(300, 200)
    whole = np.asarray(image.resize((96, 64), Image.Resampling.LANCZOS), int)
    for position, start in ((0.0, 0), (0.5, 16), (1.0, 32)):
        out = fit(image, View(64, 64, position)).astype(int)
        assert np.abs(out - whole[:, start:start + 64]).max() <= 2  # Lanczos sees beyond the crop's edge only when the whole is resized
        assert crop_offset((300, 200), View(64, 64, position)) == (0, start)
        assert crop_offset((300, 200), View(64, 64, position, True)) == (0, 32 - start)


def test_flip_mirrors_the_crop():
    image = picture(300, 200)
    assert (fit(image, View(64, 64, 0.25, True)) == fit(image, View(64, 64, 0.25))[:, ::-1]).all()


def test_slack_is_asked_of_the_resized_image():
    assert has_slack((300, 200), (64, 64)) and not has_slack((300, 200), (96, 64)) and not has_slack((301, 200), (96, 64))


@pytest.mark.parametrize("mask_size", [(300, 200), (150, 100), (600, 400)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_follows_resize_crop_and_flip(mask_size, flip):
    mask = Image.new("L", mask_size)
    mask.paste(255, (mask_size[0] // 2, 0, *mask_size))  # right half counts
    grid = fit_mask(mask, (300, 200), View(64, 64, 0.5, flip), 8)
    assert grid.shape == (8, 8) and grid.dtype == np.float32
    expected = np.repeat([[0, 0, 0, 0, 1, 1, 1, 1]], 8, axis=0)
    assert np.abs(grid - (expected[:, ::-1] if flip else expected)).max() < 0.02


def test_a_mask_cell_is_the_mean_of_its_pixels():
    checker = np.indices((64, 64)).sum(axis=0) % 2 * 255
    grid = fit_mask(Image.fromarray(checker.astype(np.uint8)), (64, 64), View(64, 64), 8)
    assert np.abs(grid - 0.5).max() < 0.01


def test_a_coloured_transparent_mask_is_grey_and_black_where_transparent():
    image = Image.new("RGBA", (4, 4), (255, 255, 255, 255))
    image.paste((255, 255, 255, 0), (0, 0, 2, 4))
    assert [decode_mask(stored(image)).getpixel((x, 0)) for x in (0, 3)] == [0, 255]


def test_a_phones_multi_picture_jpeg_gives_its_first_picture():
    file = stored(picture(*SIZE), "MPO", save_all=True, append_images=[Image.new("RGB", SIZE)])
    assert read_header(file) == SIZE and close(decode(file), picture(*SIZE), 8)


@pytest.mark.parametrize("size,view,most", [((1600, 1200), View(128, 96), 2), ((1601, 900), View(96, 96, 1.0), 2), ((1000, 3000), View(64, 192, 0.0, True), 2),
                                            ((1600, 1200), View(288, 216), 0)])  # less than six times as large: one pass it is
@pytest.mark.parametrize("noisy", [False, True])
def test_a_large_photograph_shrinks_to_what_one_pass_of_lanczos_gives(size, view, most, noisy):
    """Averaging first is a matter of speed: within 2 of 255, and within 3 where every pixel is noise, which no photograph is."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    whole = Image.blend(Image.fromarray(noise), picture(*size, 1), 0.5) if noisy else picture(*size, 1)
    want = np.asarray(whole.resize((view.width, view.height), Image.Resampling.LANCZOS, box=crop_box(size, view))).astype(int)
    got = fit(whole, view).astype(int)
    far = np.abs(got - (want[:, ::-1] if view.flip else want))
    assert far.max() <= most + (noisy and most > 0) and far.mean() <= 0.7

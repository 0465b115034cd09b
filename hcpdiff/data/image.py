"""Pixels of an image file: header, upright RGB, resize and crop, loss masks. Pillow and numpy only.

Functions raise READ_FAULTS for a file that is damaged or not an image; callers name the file. MemoryError is none of them: it says nothing of the file.
"""

import functools
import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".gif"})
HEIF_EXTENSIONS = frozenset({".heic", ".heif"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF", "HEIF")  # by content, whatever the ending; no plugin that starts programs (EPS) is ever tried
READ_FAULTS = (OSError, RuntimeError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error,
               Image.DecompressionBombError)
PIXELS_VERSION = 3  # part of every cache key: raise it when decode, fit or fit_mask change what they return

_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}  # EXIF tag 0x0112 -> how to make it upright
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_ORIENTATION = 0x0112
_MOST_EXIF = 1 << 24  # bytes; a damaged length would ask for 4 GiB
_GAP = 3.0  # a side that shrinks to a sixth or less is halved (or more) by averaging first, down to three times its target: thrice as fast, within 2 of 255

# Pillow warns from 89 megapixels and refuses from 179; the refusal is the answer we pass on, the warning says nothing a user can act on.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class View:
    """How an image becomes training pixels: target size, crop position (0 = left or top edge, 0.5 = centre, 1 = right or bottom), mirrored or not."""

    width: int
    height: int
    position: float = 0.5
    flip: bool = False


@functools.cache
def _heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def readable_extensions() -> frozenset[str]:
    """Endings (lower case, with dot) of the files that are taken as images; heic only where pillow-heif is installed."""
    return EXTENSIONS | HEIF_EXTENSIONS if _heif() else EXTENSIONS


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    from PIL import AvifImagePlugin, WebPImagePlugin  # noqa: F401 - importing registers them

    Image.preinit()
    _heif()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(source: str | Path | BinaryIO) -> Image.Image:
    return Image.open(source, formats=_formats())


def read_header(path: str | Path) -> tuple[int, int]:
    """(width, height) of the upright image, from the header only."""
    with _open(path) as image:
        width, height = image.size
        turned = _orientation(image) >= 5
    if width < 1 or height < 1:
        raise ValueError("the image has no pixels")
    return (height, width) if turned else (width, height)


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        image.info["exif"] = _late_png_exif(image.fp)  # Pillow would decode all pixels to find a chunk behind them
    exif = Image.Image.getexif(image)
    turn = exif.get(_EXIF_ORIENTATION, 1)
    return turn if turn in _TURNS else 1


def _late_png_exif(file: BinaryIO) -> bytes:
    """The eXIf chunk of a PNG wherever it stands, found by skipping over the others; the file position is kept. Raises OSError if truncated."""
    here = file.tell()
    file.seek(0)
    found = b""
    if file.read(8) == _PNG_SIGNATURE:
        while True:
            head = file.read(8)
            if len(head) < 8:
                raise OSError("image file is truncated (no end mark)")
            length, name, start = int.from_bytes(head[:4], "big"), head[4:], file.tell()
            if name == b"IEND":
                break
            if name == b"eXIf":
                found = b"Exif\x00\x00" + file.read(min(length, _MOST_EXIF))
            file.seek(start + length + 4)
    file.seek(here)
    return found


def decode(source: str | Path | BinaryIO, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The whole image (its first frame), upright, as 8-bit RGB; transparent places show the background."""
    with _open(source) as image:
        turn = _orientation(image)
        image.load()
        rgb = _to_rgb(_to_srgb(image), tuple(background))
    return rgb.transpose(_TURNS[turn]) if turn in _TURNS else rgb


def _to_srgb(image: Image.Image) -> Image.Image:
    """The image in the colours of sRGB, as a viewer shows it, where it carries another colour profile (a phone's Display P3, a print's CMYK).

    A profile that is damaged, or for another kind of pixels, is left aside: the numbers then count as sRGB.
    """
    raw = image.info.get("icc_profile")
    if not raw:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    flat = image if image.mode in ("L", "CMYK") else image.convert("L" if image.mode in ("LA", "1") else "RGB")
    if image.mode.startswith("I") or (change := _colour_change(bytes(raw), flat.mode)) is None:
        return image
    out = change.apply(flat)
    if alpha is not None:
        out.putalpha(alpha)
    return out


@functools.lru_cache(maxsize=16)
def _colour_change(raw: bytes, mode: str):
    """From a colour profile and pixel mode to sRGB as RGB; None where nothing is to be done or can be."""
    try:
        from PIL import ImageCms

        profile = ImageCms.ImageCmsProfile(io.BytesIO(raw))
        space = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[mode]
        if profile.profile.xcolor_space.strip() != space or "sRGB" in (profile.profile.profile_description or ""):
            return None
        return ImageCms.ImageCmsTransform(profile, _srgb(), mode, "RGB", ImageCms.Intent.PERCEPTUAL, flags=ImageCms.Flags.NOCACHE)  # no cache: threads share it
    except (ImportError, OSError, ValueError, TypeError):  # ImageCms raises OSError for profiles that it cannot read or combine
        return None


@functools.cache
def _srgb():
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, whichever byte order; Pillow's own conversion would clip it
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def verify(path: str | Path) -> None:
    """Decode everything once, as cheaply as the format allows; raises READ_FAULTS where a training step would."""
    with _open(path) as image:
        _orientation(image)
        image.draft("L", (1, 1))  # JPEG: still reads every byte, but transforms an eighth
        image.load()


def crop_box(size: tuple[int, int], view: View) -> tuple[float, float, float, float]:
    """The part (left, top, right, bottom) of an image of `size` (W, H) that fills the view's target, in the image's own pixels."""
    width, height = size
    scale = max(view.width / width, view.height / height)
    wide, high = min(width, view.width / scale), min(height, view.height / scale)
    left, top = (width - wide) * view.position, (height - high) * view.position
    return left, top, min(width, left + wide), min(height, top + high)


def crop_offset(size: tuple[int, int], view: View) -> tuple[int, int]:
    """(top, left) of the crop in the resized image's pixels, mirrored with it, as SDXL's micro-conditioning counts it."""
    left, top, right, _ = crop_box(size, view)
    scale = max(view.width / size[0], view.height / size[1])
    return round(top * scale), round((size[0] - right if view.flip else left) * scale)


def has_slack(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether resizing an image to cover the target leaves at least a pixel to crop, so that crop positions differ."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(size[0] * scale - target[0], size[1] * scale - target[1]) >= 1


def fit(image: Image.Image, view: View) -> np.ndarray:
    """Resize to cover and crop in one pass -> uint8 (H, W, 3)."""
    shrinks = view.width <= image.width and view.height <= image.height
    method = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC  # Lanczos rings where it enlarges
    out = image.resize((view.width, view.height), method, box=crop_box(image.size, view), reducing_gap=_GAP)
    return np.asarray(out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else out)


def decode_mask(source: str | Path | BinaryIO) -> Image.Image:
    """A loss mask as 8-bit grey, upright; transparent places are black (weight 0)."""
    return decode(source, (0, 0, 0)).convert("L")


def fit_mask(mask: Image.Image, size: tuple[int, int], view: View, factor: int) -> np.ndarray:
    """Mean mask value of each latent cell -> float32 (H/factor, W/factor) in [0, 1]; the mask covers the image of `size` whatever its own size."""
    sx, sy = mask.width / size[0], mask.height / size[1]
    left, top, right, bottom = crop_box(size, view)
    box = (left * sx, top * sy, min(mask.width, right * sx), min(mask.height, bottom * sy))
    out = mask.resize((view.width // factor, view.height // factor), Image.Resampling.BOX, box=box)
    grid = np.asarray(out, dtype=np.float32) / 255
    return np.ascontiguousarray(grid[:, ::-1] if view.flip else grid)

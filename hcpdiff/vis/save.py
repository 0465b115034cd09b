"""Pictures on disk: numbered, whole or not at all, with their settings inside and beside. Nothing here imports torch."""

import io
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

USER_COMMENT, EXIF_IFD, DESCRIPTION = 0x9286, 0x8769, 0x010E  # EXIF 2.3 tag numbers
SUFFIX = {"png": ".png", "webp": ".webp", "jpg": ".jpg", "jpeg": ".jpg"}
NUMBERED = re.compile(r"(\d+)-")


@dataclass(frozen=True)
class Settings:
    """What is told about one picture: `text` as A1111 writes it, `inside` (no local paths) and `beside` (a config for --cfg)."""

    text: str
    inside: dict
    beside: str


def check_folder(folder: Path, key: str = "out_dir") -> list[str]:
    """Faults of a folder that is to be written to, found without making it: a file is tried in the part of the path that is there."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            return []
    except OSError as error:
        reason = f"{there} is no folder" if not there.is_dir() else error.strerror or str(error)
        return [f"{key} = {str(folder)!r} cannot be written to: {reason}."]


def save(image, folder: Path, seed: int, settings: Settings, image_type: str = "png", quality: int = 95, where: str = "both") -> Path:
    """Writes a PIL image as `<number>-<seed>.<type>` and returns its path; the number is the first free one. Two programs may share a folder.

    where: 'both', 'inside', 'beside' or 'none', of the settings. Raises ConfigError where the disk refuses.
    """
    inside = settings if where in ("both", "inside") else None
    data = encode(image, image_type, quality, inside)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = next_number(folder)
        while True:
            path = folder / f"{number:05d}-{seed}{SUFFIX[image_type]}"
            if claim(path, data):
                break
            number += 1
        if where in ("both", "beside"):
            claim(path.with_suffix(".yaml"), settings.beside.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"a picture cannot be written to {str(folder)!r}: {error.strerror or error}.") from error
    return path


def next_number(folder: Path) -> int:
    """One more than the largest number that a file of the folder begins with."""
    return max((int(m.group(1)) for p in folder.iterdir() if (m := NUMBERED.match(p.name))), default=-1) + 1


def claim(path: Path, data: bytes) -> bool:
    """Makes `path` with `data`, whole or not at all; False when a file of that name (or a picture of that number) is there."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp's 0600 would hide the picture from other users
        return publish(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def publish(temporary: str, path: Path) -> bool:
    """Gives the file its name, unless it is taken: a hard link fails then, a rename on Windows too."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.rename(temporary, path)
    return True


def umask() -> int:
    """The process's umask; it can only be read by setting it."""
    value = os.umask(0)
    os.umask(value)
    return value


def encode(image, image_type: str, quality: int, settings: Settings | None) -> bytes:
    """The bytes of an image file. PNG holds the settings as text chunks `parameters` and `hcpdiff`, the others as EXIF."""
    out = io.BytesIO()
    if image_type == "png":
        image.save(out, "PNG", pnginfo=png_text(settings) if settings else None)
    else:
        extra = {"exif": exif(settings)} if settings else {}
        if image_type == "webp":
            image.save(out, "WEBP", quality=quality, lossless=quality == 100, method=6, **extra)
        else:
            image.save(out, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2, **extra)
    return out.getvalue()


def png_text(settings: Settings):
    """PNG text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("parameters", settings.text) if not settings.text.isascii() else info.add_text("parameters", settings.text)
    info.add_text("hcpdiff", json.dumps(settings.inside, ensure_ascii=True))
    return info


def exif(settings: Settings):
    """EXIF of a JPEG or WebP: A1111's text as UserComment (UTF-16 after its 8-byte code name), ours as ImageDescription (ASCII JSON)."""
    from PIL import Image

    data = Image.Exif()
    data[DESCRIPTION] = json.dumps(settings.inside, ensure_ascii=True)
    data.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + settings.text.encode("utf-16-be")
    return data


def read_settings(path: Path) -> tuple[str | None, dict | None]:
    """(A1111's text, our settings) of a picture, None for what it does not hold."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        if image.format == "PNG":
            text, ours = image.info.get("parameters"), image.info.get("hcpdiff")
        else:
            data = image.getexif()
            comment, ours = data.get_ifd(EXIF_IFD).get(USER_COMMENT), data.get(DESCRIPTION)
            text = comment[8:].decode("utf-16-be") if comment else None
    return text, json.loads(ours) if ours else None

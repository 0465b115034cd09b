"""Latents encoded once and kept: in memory, or on disk under keys made of content (see pack.py for the files).

An entry is what one view of one image encodes to: {"mean": (C,h,w), "std": (C,h,w)} of the VAE's posterior in the dtype that `encode` returns, and
{"mask": (h,w) fp32} where the source has loss masks. Images are encoded one by one, so that an entry never depends on what was encoded beside it. Around
the VAE images are decoded ahead, by threads that give way to it, and entries are checked and stored behind it.
"""

import errno
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import safetensors.torch
from safetensors import SafetensorError

from ..errors import DataError
from ..threads import behind, give_way, prepared
from .encoding import Encode, Encoding, Entry
from .files import shown
from .hashes import Content, HashMemo, read_content
from .image import PIXELS_VERSION, View
from .pack import FORMAT, PackFolder, PackWriter
from .sample import TrainDataset, load_views
from .source import reason

Loaded = list[tuple[np.ndarray, np.ndarray | None]]  # pixels and mask of each view
Exchange = Callable[[Any], list[Any]]  # one object of every rank, in rank order (torch.distributed.all_gather_object)
Tick = Callable[[int], None]  # told how many images were done
_THREADS = 16  # that decode; each with a large photograph takes some 100 MB
_BEHIND = 2  # images encoded and not yet stored
_ROUND = 64  # images that a rank encodes between two exchanges
_HASHES = "hashes-1.bin"
_LOOK_SECONDS = 5.0  # how often to look for what other processes have put into the cache


class MemoryStore:
    """Entries of one dataset by (image, view), of one VAE."""

    def __init__(self, data: TrainDataset, vae_id: str, factor: int) -> None:
        self.data, self.vae_id, self.factor = data, vae_id, factor
        self.entries: dict[tuple[int, int], Entry] = {}

    def get(self, image: int, view: int) -> Entry:
        """One entry; KeyError if it was never filled in."""
        return self.entries[image, view]

    def fill(self, encode: Encode, rank: int, world: int, exchange: Exchange | None, tick: Tick) -> None:
        """Encode what is missing. With `exchange`, each rank encodes its share and gets the others'; without, each encodes everything."""
        images = [image for image in range(len(self.data)) if (image, 0) not in self.entries]
        faults = Faults()
        for share in rounds(images, rank, world if exchange else 1):
            made = self._made(share, encode, faults, tick)
            for part, others in exchange((made, faults)) if exchange else [(made, faults)]:
                self.entries.update(part)
                faults.add(others)
            if faults.others:
                break
        faults.check()

    def _made(self, images: Sequence[int], encode: Encode, faults: "Faults", tick: Tick) -> dict[tuple[int, int], Entry]:
        def begun() -> Iterator[tuple[int, list[Encoding]]]:
            for image, loaded in prepared(self._load, images, _THREADS):
                if isinstance(loaded, DataError):
                    faults.images += loaded.faults
                else:
                    yield image, [Encoding(name_of(self.data, image), rgb, mask, encode) for rgb, mask in loaded]

        def finish(item: tuple[int, list[Encoding]]) -> tuple[int, list[Entry] | DataError]:
            try:
                return item[0], [view.entry() for view in item[1]]
            except DataError as error:
                return item[0], error

        made = {}
        with closing(behind(begun(), finish, _BEHIND)) as done:
            for image, views in done:
                if isinstance(views, DataError):
                    faults.others += views.faults
                else:
                    made.update({(image, number): entry for number, entry in enumerate(views)})
                    tick(1)
        return made

    def _load(self, image: int) -> Loaded | DataError:
        give_way()
        try:
            return load_views(self.data, image, self.data.views(image), self.factor)
        except DataError as error:
            return error


def rounds(images: Sequence[int], rank: int, world: int) -> Iterator[Sequence[int]]:
    """A rank's share of the images in pieces, as many as every other rank's; between two, ranks exchange what they have, so that none waits for another
    for longer than a piece takes (a collective that waits too long ends the run)."""
    mine = images[rank::world]
    for start in range(0, -(-len(images) // world), _ROUND):
        yield mine[start:start + _ROUND]


@dataclass
class Faults:
    """What went wrong while caching; collected, so that one rank's fault is told by all and no rank waits for another that has left."""

    images: list[str] = field(default_factory=list)  # those that cannot be read
    others: list[str] = field(default_factory=list)

    def add(self, more: "Faults") -> None:
        """Take in another rank's (or our own, once more)."""
        self.images = list(dict.fromkeys(self.images + more.images))
        self.others = list(dict.fromkeys(self.others + more.others))

    def check(self) -> None:
        """Raise one DataError about all of them, if there are any."""
        lines = "".join(f"\n  {line}" for line in sorted(self.images))
        images = [f"{len(self.images)} images cannot be read. Repair or remove them, or set skip_bad_images: true to go on without them:{lines}"]
        if self.images or self.others:
            raise DataError(images[:len(self.images)] + self.others)


def name_of(data: TrainDataset, image: int) -> str:
    """What an image is called in messages."""
    return f"{data.name}/{data.image_id(image)}"


def entry_key(image: bytes, mask: bytes | None, view: View, background: Sequence[int], vae_id: str) -> bytes:
    """Name of an entry: everything that its content depends on, and nothing else, so it cannot be stale."""
    parts = {"format": FORMAT, "pixels": PIXELS_VERSION, "pillow": PIL.__version__, "image": image.hex(), "mask": mask.hex() if mask else None, "vae": vae_id,
             "size": [view.width, view.height], "position": round(view.position, 6), "flip": view.flip, "background": list(background)}
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode("utf-8"), digest_size=32).digest()


Digests = tuple[bytes, bytes | None]  # of an image, of its mask


class DiskStore:
    """Entries of one dataset in a folder that any number of runs and processes share."""

    def __init__(self, folder: str | Path, data: TrainDataset, vae_id: str, factor: int):
        self.data, self.vae_id, self.factor = data, vae_id, factor
        self.packs = PackFolder(Path(folder) / f"latents-{FORMAT}")
        self.memo = HashMemo(Path(folder) / _HASHES)
        self.digests: dict[int, Digests] = {}
        self.encoded = 0  # images encoded by this process, for tests and the log
        self._begun: set[bytes] = set()  # keys that this process is at or has made, while filling
        self._looked = time.monotonic()

    def keys(self, image: int) -> list[bytes]:
        """Key of each view of an image."""
        return [self.key(image, view) for view in self.data.views(image)]

    def key(self, image: int, view: View) -> bytes:
        """Key of one view; the image's content must be known."""
        return entry_key(*self.digests[image], view, self.data.source_of(image)[0].bg_color, self.vae_id)

    def get(self, image: int, view: int) -> Entry:
        """One entry. Every read is checked against the entry's digest."""
        entry = self._entry(self.key(image, self.data.views(image)[view]))
        if entry is None:
            raise DataError(f"{self.packs.folder}: the latents of {self.data.image_id(image)} were damaged or removed while training. Start again: they are made anew.")
        return entry

    def _entry(self, key: bytes) -> Entry | None:
        payload = self.packs.get(key)
        if payload is None:
            return None
        try:
            return safetensors.torch.load(payload)
        except SafetensorError:
            return None

    def fill(self, encode: Encode, rank: int, world: int, exchange: Exchange | None, tick: Tick) -> None:
        """Encode what is missing or damaged. With `exchange` each rank does its share; what another could not leave in this folder is made here."""
        images, faults = list(range(len(self.data))), Faults()
        pieces = list(rounds(images, rank, world if exchange else 1))
        with PackWriter(self.packs) as writer:
            for number, share in enumerate(pieces, 1):
                self._fill(share, encode, writer, faults, tick, publish=number == len(pieces))
                for digests, others in exchange(({image: self.digests[image] for image in share if image in self.digests}, faults)) if exchange else ():
                    self.digests.update(digests)
                    faults.add(others)
                if faults.others:  # the disk is full, or the VAE gives NaN: every rank knows by now, and none goes on for hours
                    break
            self.memo.save()
            faults.check()
            self.packs.refresh()
            self._begun.clear()
            others = [image for image in images if image % world != rank] if exchange else []
            absent = [image for image in others if any(key not in self.packs for key in self.keys(image))]  # only where ranks do not share a file system
            self._fill(absent, encode, writer, faults, lambda count: None, publish=True)
        faults.check()
        self._begun.clear()
        self.packs.touch_used()

    def _fill(self, images: Sequence[int], encode: Encode, writer: PackWriter, faults: Faults, tick: Tick, publish: bool) -> None:
        try:
            with closing(behind(self._encodings(images, encode, faults), lambda made: _store(made, writer), _BEHIND)) as stored:
                for wrong in stored:
                    faults.others += wrong
                    tick(1)
            if publish:
                writer.publish()
        except OSError as error:
            writer.discard()
            faults.others.append(f"cache_dir = {str(self.packs.folder.parent)!r} cannot be written ({_why(error)}). What is in it stays. Free some space and start again, give "
                                 f"another cache_dir, or cache_latents: memory.")

    def _encodings(self, images: Sequence[int], encode: Encode, faults: Faults) -> Iterator[list[tuple[bytes, Encoding]]]:
        """What each image lacks, with the VAE."""
        for image, found in prepared(self._look, images, _THREADS):
            if isinstance(found, DataError):
                faults.images += found.faults
            else:
                yield self._missing(image, *found, encode)

    def _look(self, image: int) -> tuple[Digests, Loaded] | DataError:
        """(digests, pixels of each view, or none if all its entries are there and whole). Runs in threads."""
        source, number = self.data.source_of(image)
        paths = [source.path(number)] + ([source.masks[number]] if source.masks else [])
        known = [self.memo.digest(path) for path in paths]
        if all(known) and self._whole(image, (*known, None)[:2]):
            return (*known, None)[:2], []
        contents: list[Content] = []
        for path in paths:
            try:
                contents.append(read_content(path))
            except OSError as error:
                return DataError(f"{shown(path)}: {reason(error, path)}")
        digests = (*(content.digest for content in contents), None)[:2]
        loaded = []
        if not self._whole(image, digests):
            give_way()  # only now: where nothing is decoded there is no VAE at work
            try:
                loaded = load_views(self.data, image, self.data.views(image), self.factor, *(io.BytesIO(content.raw) for content in contents))
            except DataError as error:
                return error
        for path, content in zip(paths, contents):  # only now: a remembered file is one that could be decoded
            self.memo.remember(path, content)
        return digests, loaded

    def _whole(self, image: int, digests: Digests) -> bool:
        background = self.data.source_of(image)[0].bg_color
        return all(self.packs.get(entry_key(*digests, view, background, self.vae_id)) is not None for view in self.data.views(image))

    def _missing(self, image: int, digests: Digests, loaded: Loaded, encode: Encode) -> list[tuple[bytes, Encoding]]:
        """Encode what was found missing, unless another image or process has brought it meanwhile."""
        self.digests[image] = digests
        if loaded and time.monotonic() - self._looked > _LOOK_SECONDS:
            self.packs.refresh()
            self._looked = time.monotonic()
        missing = [(key, *pair) for key, pair in zip(self.keys(image), loaded) if key not in self._begun and key not in self.packs]
        self._begun.update(key for key, *_ in missing)
        self.encoded += bool(missing)
        return [(key, Encoding(name_of(self.data, image), rgb, mask, encode)) for key, rgb, mask in missing]


def _store(made: list[tuple[bytes, Encoding]], writer: PackWriter) -> list[str]:
    """Write an image's entries; faults of those that cannot be used."""
    try:
        for key, view in made:
            writer.add(key, safetensors.torch.save(view.entry()))
    except DataError as error:
        return error.faults
    return []


def decoded_before(folder: str | Path) -> Callable[[str], bool]:
    """Tells of a file whether an earlier run could decode it and it is unchanged: only such files are in the memo of hashes."""
    memo = HashMemo(Path(folder) / _HASHES)
    return lambda path: memo.digest(path) is not None


def _why(error: OSError) -> str:
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)

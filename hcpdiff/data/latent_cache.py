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
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import safetensors.torch
import torch
from safetensors import SafetensorError, deserialize

from ..errors import DataError, ImageMemoryError
from ..threads import behind, give_way, prepared
from .encoding import Encode, Encoding, Entry
from .files import shown
from .hashes import Content, HashMemo, read_content
from .image import PIXELS_VERSION, View
from .pack import FORMAT, PackFolder, PackWriter
from .sample import TrainDataset, load_views
from .source import no_memory, reason

Loaded = list[tuple[np.ndarray, np.ndarray | None]]  # pixels and mask of each view
Exchange = Callable[[Any], list[Any]]  # one object of every rank, in rank order (torch.distributed.all_gather_object)
Tick = Callable[[int], None]  # told how many images were done
_THREADS = 16  # that decode; each with a large photograph takes some 100 MB
_WAITING = 256 << 20  # bytes of pixels that wait for the VAE, about: many cores and many views of an image would make gigabytes of them
_BEHIND = 2  # images encoded and not yet stored
_ROUND = 64  # images that a rank encodes between two exchanges
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of entries, as safetensors calls them
_HASHES = "hashes-1.bin"
_LOOK_SECONDS = 5.0  # how often to look for what other processes have put into the cache


class MemoryStore:
    """Entries of one dataset by (image, view), of one VAE."""

    def __init__(self, data: TrainDataset, vae_id: str, factor: int) -> None:
        self.data, self.vae_id, self.factor = data, vae_id, factor
        self.entries: dict[tuple[int, int], Entry] = {}
        self.encoded = 0  # images encoded by this process in the last `fill`

    def get(self, image: int, view: int) -> Entry:
        """One entry; KeyError if it was never filled in."""
        return self.entries[image, view]

    def fill(self, encode: Encode, rank: int, world: int, exchange: Exchange | None, tick: Tick) -> None:
        """Encode what is missing. With `exchange`, each rank encodes its share and gets the others'; without, each encodes everything."""
        images = [image for image in range(len(self.data)) if (image, 0) not in self.entries]
        self.encoded = 0
        (rank, world), faults = (rank, world) if exchange else (0, 1), Faults()
        with closing(self._made(images[rank::world], encode, faults)) as made:
            for _ in range(meetings(len(images), world)):
                taken = self._take(made, faults, tick)
                self.encoded += len({image for image, _ in taken})
                for part, others in exchange((taken, faults)) if exchange else [(taken, faults)]:
                    self.entries.update(part)
                    faults.add(others)
                if faults.others:
                    break
        faults.check()

    def _made(self, images: Sequence[int], encode: Encode, faults: "Faults") -> Iterator[tuple[int, list[Entry] | DataError]]:
        """(image, its entries or what is wrong with them) of each; none of one that cannot be read."""
        def begun() -> Iterator[tuple[int, list[Encoding]]]:
            with closing(prepared(self._load, images, _THREADS, _ahead(self.data))) as ready:
                for image, loaded in ready:
                    if isinstance(loaded, DataError):
                        faults.unread(loaded)
                        loaded = []
                    yield image, [Encoding(name_of(self.data, image), rgb, mask, encode) for rgb, mask in loaded]

        def finish(item: tuple[int, list[Encoding]]) -> tuple[int, list[Entry] | DataError]:
            try:
                return item[0], [view.entry() for view in item[1]]
            except DataError as error:
                return item[0], error

        return behind(begun(), finish, _BEHIND)

    @staticmethod
    def _take(made: Iterator[tuple[int, list[Entry] | DataError]], faults: "Faults", tick: Tick) -> dict[tuple[int, int], Entry]:
        """The entries of the coming images, as many as there are between two meetings."""
        taken = {}
        for image, views in islice(made, _ROUND):
            if isinstance(views, DataError):
                faults.others += views.faults
            else:
                taken.update({(image, number): entry for number, entry in enumerate(views)})
                tick(1)
        return taken

    def _load(self, image: int) -> Loaded | DataError:
        give_way()
        try:
            return load_views(self.data, image, self.data.views(image), self.factor)
        except DataError as error:
            return error


def _ahead(data: TrainDataset) -> int:
    """How many images may wait for the VAE, by the largest and most that any has in pixels."""
    views = len(data.positions) * (2 if any(source.flip for source in data.sources) else 1)
    return _WAITING // (3 * views * max(width * height for width, height in data.bucket_sizes))


def meetings(images: int, world: int) -> int:
    """How often ranks exchange what they have while they encode their shares: as often as the rank with the largest share needs, so that none waits for another
    for longer than _ROUND images take (a collective that waits too long ends the run). Nothing stands still around them: later images are decoded and
    encoded meanwhile. One process alone looks then whether it goes on."""
    return -(-images // (world * _ROUND))


@dataclass
class Faults:
    """What went wrong while caching; collected, so that one rank's fault is told by all and no rank waits for another that has left."""

    images: list[str] = field(default_factory=list)  # those that cannot be read
    others: list[str] = field(default_factory=list)

    def unread(self, error: DataError) -> None:
        """Take in why an image could not be read."""
        if isinstance(error, ImageMemoryError):
            self.others += error.faults
        else:
            self.images += error.faults

    def add(self, more: "Faults") -> None:
        """Take in another rank's (or our own, once more)."""
        self.images = list(dict.fromkeys(self.images + more.images))
        self.others = list(dict.fromkeys(self.others + more.others))

    def check(self) -> None:
        """Raise one DataError about all of them, if there are any."""
        lines = "".join(f"\n  {line}" for line in sorted(self.images))
        images = [f"{len(self.images)} image{'s' if len(self.images) > 1 else ''} cannot be read. Repair or remove them, or set skip_bad_images: true to go on without them:{lines}"]
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


def read_entry(payload: bytes, shape: Sequence[int], masked: bool) -> Entry | None:
    """The entry that a payload holds, for latents of `shape` (C, h, w); None if it is another or none. A digest that fits says only that it is as somebody has
    written it."""
    try:
        parts = dict(deserialize(payload))
    except SafetensorError:
        return None
    shapes = {"mean": list(shape), "std": list(shape)} | ({"mask": list(shape[1:])} if masked else {})
    kinds = {name: part["dtype"] for name, part in parts.items()}
    if {name: part["shape"] for name, part in parts.items()} != shapes or kinds["mean"] != kinds["std"] or kinds["mean"] not in _DTYPES or kinds.get("mask", "F32") != "F32":
        return None
    return {name: torch.frombuffer(part["data"], dtype=_DTYPES[part["dtype"]]).reshape(part["shape"]) for name, part in parts.items()}


Digests = tuple[bytes, bytes | None]  # of an image, of its mask


class DiskStore:
    """Entries of one dataset in a folder that any number of runs and processes share."""

    def __init__(self, folder: str | Path, data: TrainDataset, vae_id: str, factor: int, channels: int):
        """factor, channels: pixels a side of one latent, and numbers of it."""
        self.data, self.vae_id, self.factor, self.channels = data, vae_id, factor, channels
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
        entry = self._entry(image, self.data.views(image)[view], self.digests[image])
        if entry is None:
            raise DataError(f"{self.packs.folder}: the latents of {self.data.image_id(image)} were damaged or removed while training. They are made anew at the next start.")
        return entry

    def _entry(self, image: int, view: View, digests: Digests) -> Entry | None:
        """An entry that is whole and what its key says; None if there is none."""
        shape = [self.channels, view.height // self.factor, view.width // self.factor]
        key = entry_key(*digests, view, self.data.source_of(image)[0].bg_color, self.vae_id)
        return self.packs.get(key, partial(read_entry, shape=shape, masked=digests[1] is not None))

    def fill(self, encode: Encode, rank: int, world: int, exchange: Exchange | None, tick: Tick) -> None:
        """Encode what is missing or damaged. With `exchange` each rank does its share; what another could not leave in this folder is made here."""
        images, faults = range(len(self.data)), Faults()
        rank, world = (rank, world) if exchange else (0, 1)
        with PackWriter(self.packs) as writer:
            with closing(self._stored(images[rank::world], encode, writer, faults)) as stored:
                for left in reversed(range(meetings(len(images), world))):
                    done = self._take(stored, _ROUND, writer, faults, tick, publish=not left)
                    for digests, others in exchange(({image: self.digests[image] for image in done if image in self.digests}, faults)) if exchange else ():
                        self.digests.update(digests)
                        faults.add(others)
                    if faults.others:  # the disk is full, or the VAE gives NaN: every rank knows by now, and none goes on for hours
                        break
            self.memo.save()
            faults.check()
            self.packs.refresh()
            self._begun.clear()
            others = [image for image in images if image % world != rank]
            absent = [image for image in others if any(key not in self.packs for key in self.keys(image))]  # only where ranks do not share a file system
            with closing(self._stored(absent, encode, writer, faults)) as stored:
                self._take(stored, None, writer, faults, lambda count: None, publish=True)
        faults.check()
        self._begun.clear()
        self.packs.touch_used()

    def _stored(self, images: Sequence[int], encode: Encode, writer: PackWriter, faults: Faults) -> Iterator[tuple[int, list[str]]]:
        """(image, what is wrong with its latents) of each, once all that it lacked is with the writer."""
        return behind(self._encodings(images, encode, faults), lambda item: (item[0], _store(item[1], writer)), _BEHIND)

    def _take(self, stored: Iterator[tuple[int, list[str]]], most: int | None, writer: PackWriter, faults: Faults, tick: Tick, publish: bool) -> list[int]:
        """Go on by `most` images; which they were comes back."""
        done = []
        try:
            for image, wrong in islice(stored, most):
                done.append(image)
                faults.others += wrong
                tick(1)
            if publish:
                writer.publish()
        except OSError as error:
            stored.close()  # nobody else is at the writer then
            writer.discard()
            faults.others.append(f"cache_dir = {str(self.packs.folder.parent)!r} cannot be written ({_why(error)}). What is in it stays. Free some space and start again, give "
                                 f"another cache_dir, or cache_latents: memory.")
        return done

    def _encodings(self, images: Sequence[int], encode: Encode, faults: Faults) -> Iterator[tuple[int, list[tuple[bytes, Encoding]]]]:
        """What each image lacks, with the VAE; nothing of one that cannot be read."""
        with closing(prepared(self._look, images, _THREADS, _ahead(self.data))) as ready:
            for image, found in ready:
                if isinstance(found, DataError):
                    faults.unread(found)
                    yield image, []
                else:
                    yield image, self._missing(image, *found, encode)

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
            except MemoryError:
                return ImageMemoryError(no_memory(path))
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
        return all(self._entry(image, view, digests) is not None for view in self.data.views(image))

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

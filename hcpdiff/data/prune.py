"""Looking after a cache folder: how much is in it, and what can go. No torch here."""

import time
from dataclasses import dataclass
from pathlib import Path

from .pack import FORMAT, PackFolder, leftovers, read_index

_DAY = 86400.0


@dataclass(frozen=True)
class CacheInfo:
    """Contents of a cache folder; sizes in bytes. `damaged`: entries whose payload does not match its digest."""

    packs: int
    entries: int
    size: int
    damaged: int
    unreadable: list[str]
    leftover: list[str]


def packs_folder(cache_dir: str | Path) -> Path:
    """Where the packs of a cache_dir lie."""
    return Path(cache_dir) / f"latents-{FORMAT}"


def cache_info(cache_dir: str | Path) -> CacheInfo:
    """Read everything and count."""
    folder = packs_folder(cache_dir)
    packs = PackFolder(folder)
    damaged = sum(packs.get(key) is None for key in packs.keys())
    files = list(folder.glob("*")) if folder.is_dir() else []
    return CacheInfo(sum(path.suffix == ".idx" for path in files) - len(packs.foreign), len(packs) + damaged, sum(map(_size, files)), damaged,
                     packs.foreign, [path.name for path in _leftovers(cache_dir, time.time())])


def _leftovers(cache_dir: str | Path, now: float) -> list[Path]:
    """Beside the packs, the memos of hashes may have left a temporary file of a killed writer."""
    memos = [path for path in leftovers(Path(cache_dir), now) if path.name.startswith(("hashes-", "vaes-"))]
    return [*leftovers(packs_folder(cache_dir), now), *memos]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process has removed it
        return 0


def prune(cache_dir: str | Path, days: float | None = None, dry_run: bool = False) -> tuple[list[str], int]:
    """(names, bytes) of the files removed: leftovers of killed writers, packs with a damaged index or a damaged entry, packs unused for `days`.

    Entries of a removed pack are made again when they are wanted. A pack that a running process still reads is in use today, so it stays.
    """
    folder = packs_folder(cache_dir)
    if not folder.is_dir():
        return [], 0
    now = time.time()
    doomed = dict.fromkeys(_leftovers(cache_dir, now))
    for index in sorted(folder.glob("*.idx")):
        pack = index.with_suffix(".pack")
        unused = days is not None and _unused_days(pack, now) > days
        if unused or read_index(index) is None or _damaged(folder, index):
            doomed.update(dict.fromkeys([index, pack]))
    found = [path for path in doomed if path.exists()]
    size = sum(map(_size, found))
    for path in [] if dry_run else found:  # an index goes before its pack, so that no reader finds one without the other
        path.unlink(missing_ok=True)
    return [path.name for path in found], size


def _unused_days(pack: Path, now: float) -> float:
    try:
        return (now - pack.stat().st_mtime) / _DAY
    except FileNotFoundError:
        return 0.0


def _damaged(folder: Path, index: Path) -> bool:
    packs = PackFolder(folder, only=index.name)
    return any(packs.get(key) is None for key in packs.keys())

"""`python -m hcpdiff.tools.cache info|prune [FOLDER]`: look after the folder of the latents' disk cache."""

import argparse
from pathlib import Path

from .. import cli
from ..errors import DataError


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m hcpdiff.tools.cache", description="Look into the disk cache of latents (data.<name>.cache_dir), or remove from it.")
    parser.add_argument("command", choices=["info", "prune"], help="info: count and check the entries; prune: remove what is damaged, left over or long unused")
    parser.add_argument("folder", nargs="?", type=cli.place, default=".hcp-cache", help="the cache_dir (default: .hcp-cache)")
    parser.add_argument("--days", type=float, default=None, metavar="N", help="prune: also what no run has used for N days (0: everything)")
    parser.add_argument("--dry-run", action="store_true", help="prune: only say what would go")
    return parser


def _main(args: argparse.Namespace) -> None:
    from ..data.prune import cache_info, packs_folder, prune

    if not packs_folder(args.folder).is_dir():
        raise DataError(f"{args.folder!r} is not a cache of latents (there is no {packs_folder(args.folder).name} in it)")
    if args.command == "info":
        info = cache_info(args.folder)
        print(f"{Path(args.folder)}: {info.entries} entries in {info.packs} packs, {info.size / 2**20:.1f} MiB")
        print(f"damaged entries: {info.damaged}; unreadable indexes: {len(info.unreadable)}; left over: {len(info.leftover)}")
        return
    names, size = prune(args.folder, args.days, args.dry_run)
    print(f"{'would remove' if args.dry_run else 'removed'} {len(names)} files, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run(_main, _parser)

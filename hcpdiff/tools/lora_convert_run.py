"""What lora_convert does once its options are in order: read, find the family, write with the check, say what was done."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..checkpoint.convert import DTYPES, Found, Layers, find_family, join, with_word
from ..checkpoint.export import our_path, payload_hash, replaceable, source_mark, write_diffusers, write_ours, write_peft, write_webui
from ..checkpoint.format import META_BASE_VERSION, META_FORMAT, LoraFile, load_lora
from ..checkpoint.metadata import META_SOURCE, carried
from ..checkpoint.paths import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, STEMS, SUFFIX, split_name
from ..checkpoint.peft_form import CONFIG
from ..checkpoint.spellings import ANCESTOR, OURS, WEBUI, WEBUI_LDM
from ..errors import CheckpointError
from ..lora_tools.output import said

Files = list[tuple[Path, LoraFile]]


def run(args: argparse.Namespace, sources: Mapping[Path, str], lines: list[str]) -> int:
    """Converts `sources` (file -> the option that named it) as `args` say; 0. Mistakes are CheckpointErrors, all of reading at once."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    files = _read(sources)
    for path, file in files:
        console.print(f"{path}: {file.spelling} spelling, {', '.join(f'{component} {len(named)} layers' for component, named in file.layers.items())}")
    direction = _direction(args, files, console)
    for line in [*lines, *(f"{path}: {notice}" for path, file in files for notice in file.notices)]:
        console.print(line)
    layers = join(files)
    metadata, dropped = _metadata(files, args.keep_metadata)
    found = with_word(find_family(layers, metadata, args.family or ("sdxl" if args.sdxl else None), any(WEBUI_LDM in file.spelling for _, file in files)), said(args))
    console.print(f"family: {found}")
    if dropped:
        console.print(f"metadata left out (--keep_metadata keeps it): {', '.join(sorted(set(dropped)))}")
    write = {"to_webui": _to_webui, "from_webui": _from_webui, "to_diffusers": _to_diffusers, "to_peft": _to_peft}[direction]
    write(args, console, files, layers, found, metadata)
    if args.auto_scale_alpha:
        console.print("--auto_scale_alpha: nothing was left for it to do, alpha / rank is the trained strength with and without it")
    return 0


def _direction(args: argparse.Namespace, files: Files, console: Console) -> str:
    """What the user says, else what the files are: hcpdiff's (of any generation) become webui's, others hcpdiff's; where --dump_path names one file, PEFT's,
    diffusers' and LyCORIS' become webui's. CheckpointError where that leaves nothing to do."""
    told = next((way for way in ("to_webui", "from_webui", "to_diffusers", "to_peft") if getattr(args, way)), None)
    if told:
        return told
    spellings = {spelling for _, file in files for spelling in file.spelling.split("+")}
    if spellings <= {OURS, ANCESTOR}:
        way, why = "to_webui", "a LoRA of hcpdiff"
    elif Path(args.dump_path).suffix != SUFFIX:
        way, why = "from_webui", "another program's LoRA, and a folder to write into"
    elif spellings & {WEBUI, WEBUI_LDM}:
        raise CheckpointError(f"which way? {', '.join(str(path) for path, _ in files)} is a webui file and --dump_path {args.dump_path} names one file: --to_webui writes it anew, "
                              f"--to_diffusers for diffusers; --from_webui and --to_peft want a folder.")
    else:
        way, why = "to_webui", "another program's LoRA, and one file to write"
    console.print(f"direction: --{way} ({why})")
    return way


def _read(sources: Mapping[Path, str]) -> Files:
    files, faults = [], []
    for path, option in sources.items():
        try:
            file = load_lora(path)
        except CheckpointError as error:
            faults += error.faults
            continue
        if option == "--lora_path_TE" and "unet" in file.layers:
            faults.append(f"--lora_path_TE {path} holds layers of the UNet; that file belongs to --lora_path.")
        files.append((path, file))
    versions = {file.metadata[META_BASE_VERSION]: path for path, file in files if META_BASE_VERSION in file.metadata}
    if len(versions) > 1:
        faults.append("the files are for different base models: " + ", ".join(f"{path} for {version}" for version, path in versions.items()) + ".")
    if faults:
        raise CheckpointError(faults)
    return files


def _metadata(files: Files, keep_all: bool) -> tuple[dict[str, str], list[str]]:
    """What the sources' headers say, the first file's word first; and the names of entries left out."""
    merged, dropped = {}, []
    for _, file in reversed(files):
        kept, left = carried(file.metadata, keep_all)
        merged.update(kept)
        dropped += left
    return merged, dropped


def _to_webui(args: argparse.Namespace, console: Console, files: Files, layers: Layers, found: Found, metadata: Mapping[str, str]) -> None:
    path = _file_path(args, args.name or _stem(args, files))
    if path != Path(args.dump_path):
        console.print(f"--dump_path {args.dump_path} is taken for {path}")
    _may_write([path], files, args.overwrite)
    lora = write_webui(path, layers, found.family, found.version, name=args.name or path.stem, kept=metadata,
                       dtype=DTYPES.get(args.save_dtype), extra=_extra(args, files))
    _print_table(console, lora.layers)
    if lora.completed:
        console.print(f"{len(lora.completed)} attention layers were added with zero effect, since webui passes over a text-encoder attention of "
                      f"{found.family.title} in which q, k, v or out_proj is missing: {', '.join(lora.completed[:2])}{' …' if len(lora.completed) > 2 else ''}")
    _print_result(console, path, layers, f"; every name is one that webui knows; AutoV3 {payload_hash(path)[:12]}")


def _from_webui(args: argparse.Namespace, console: Console, files: Files, layers: Layers, found: Found, metadata: Mapping[str, str]) -> None:
    folder = _folder(args, f"a folder with --from_webui; the files in it are called unet-NAME{SUFFIX} … (--name)")
    ours = [str(path) for path, file in files if META_FORMAT in file.metadata]
    if ours:
        raise CheckpointError(f"{', '.join(ours)}: already a file of hcpdiff; --to_webui, --to_diffusers and --to_peft make other programs' of it.")
    name = args.name or (split_name(files[0][0]) or ("", _stem(args, files)))[1]
    _may_write([our_path(folder, component, name) for component in layers], files, args.overwrite)
    known = found.version if not found.open else None
    for path in write_ours(folder, layers, known, name=name, kept=metadata | _extra(args, files) | ({} if known or found.open else found.family.extra), dtype=DTYPES.get(args.save_dtype)):
        part = load_lora(path).layers
        _print_table(console, part)
        _print_result(console, path, part, "")


def _to_diffusers(args: argparse.Namespace, console: Console, files: Files, layers: Layers, found: Found, metadata: Mapping[str, str]) -> None:
    path = _file_path(args, args.name or DIFFUSERS_WEIGHTS.removesuffix(SUFFIX))
    _may_write([path], files, args.overwrite)
    lora = write_diffusers(path, layers, found.family, found.version, name=args.name or _stem(args, files), kept=metadata,
                           dtype=DTYPES.get(args.save_dtype), extra=_extra(args, files))
    _print_table(console, layers)
    if lora.widened:
        console.print(f"{len(lora.widened)} layers are stored as fp32, since their scale alpha / rank is no power of two and half precision would round it; "
                      f"--save_dtype chooses another type")
    _print_result(console, path, layers, "; every alpha is inside the factors, so that it is 1 x up @ down")


def _to_peft(args: argparse.Namespace, console: Console, files: Files, layers: Layers, found: Found, metadata: Mapping[str, str]) -> None:
    folder = _folder(args, f"a folder; the adapters in it are called COMPONENT/{PEFT_WEIGHTS}")
    paths = [folder / component / PEFT_WEIGHTS for component in layers]
    _may_write(paths, files, args.overwrite)
    strangers = [path.with_name(CONFIG) for path in paths if path.with_name(CONFIG).exists() and not path.exists() and not args.overwrite]
    if strangers:
        raise CheckpointError([f"{path} exists and was not made by this command; --overwrite replaces it." for path in strangers])
    written = write_peft(folder, layers, found.family, found.version, name=args.name or _stem(args, files), kept=metadata,
                         dtype=DTYPES.get(args.save_dtype), extra=_extra(args, files))
    for path, (component, named) in zip(written, layers.items(), strict=True):
        _print_table(console, {component: named})
        _print_result(console, path, {component: named}, f"; {CONFIG} beside it holds ranks and alphas")


def _extra(args: argparse.Namespace, files: Files) -> dict[str, str]:
    """Entries of the header that the user asks for, and the mark by which the file's source is known again."""
    return {**said(args), META_SOURCE: source_mark(path for path, _ in files)}


def _stem(args: argparse.Namespace, files: Files) -> str:
    """A name for what comes of these files: the run's and the step for files of ours; the folder's for one that has the name that every such file has."""
    path = files[0][0].absolute()
    ours = split_name(path)
    if ours:
        run = path.parent.parent.name if path.parent.name == "ckpts" else path.parent.name if Path(args.lora_path).is_dir() else ""
        return f"{run or 'lora'}-{ours[1]}"
    if path.name not in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS):
        return path.stem
    own = path.parent.parent if path.name == PEFT_WEIGHTS and path.parent.name in STEMS and path.parent.parent.name else path.parent
    return own.name


def _folder(args: argparse.Namespace, what: str) -> Path:
    folder = Path(args.dump_path)
    if folder.suffix == SUFFIX or folder.is_file():
        raise CheckpointError(f"--dump_path {folder}: this is {what}.")
    return folder


def _file_path(args: argparse.Namespace, stem: str) -> Path:
    path = Path(args.dump_path)
    if path.is_dir() or args.dump_path.endswith(("/", "\\")):
        return path / f"{stem}{SUFFIX}"
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise CheckpointError(f"--dump_path {path}: only {SUFFIX} files are written, {path.suffix} is a pickle.")
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def _may_write(paths: list[Path], files: Files, overwrite: bool) -> None:
    read = {source.resolve() for source, _ in files}
    faults = [f"{path} is the file that is read; choose another --dump_path." for path in paths if path.resolve() in read]
    if not faults and not overwrite:
        source = source_mark(path for path, _ in files)
        faults = [f"{path} exists and was {'made from another LoRA' if replaceable(path) else 'not made by this command'}; --overwrite replaces it."
                  for path in paths if not replaceable(path, source=source)]
    if faults:
        raise CheckpointError(faults)


def _print_table(console: Console, layers: Layers) -> None:
    table = Table("part", "layers", "Linear", "1x1", "3x3", "rank", "alpha", "dtype")
    table.columns[0].no_wrap, table.columns[0].min_width = True, max(map(len, layers))
    for component, named in layers.items():
        loras = list(named.values())
        kernels = [tuple(lora.down.shape[2:]) for lora in loras]
        counts = [len(loras), kernels.count(()), kernels.count((1, 1)), sum(kernel not in ((), (1, 1)) for kernel in kernels)]
        dtypes = {str(lora.down.dtype).removeprefix("torch.") for lora in loras}
        table.add_row(component, *map(str, counts), _range([lora.rank for lora in loras]), _range([lora.alpha for lora in loras]), ", ".join(sorted(dtypes)))
    console.print(table)


def _range(values: list) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} … {high:.4g}"


def _print_result(console: Console, path: Path, layers: Layers, more: str) -> None:
    count = sum(map(len, layers.values()))
    if all(float(lora.up.abs().max()) == 0 or float(lora.down.abs().max()) == 0 for named in layers.values() for lora in named.values()):
        console.print("warning: this LoRA changes nothing, all its deltas are zero (was it saved before the first step?)")
    console.print(f"wrote {path} ({path.stat().st_size / 2**20:.2f} MiB)")
    console.print(f"checked by reading it back: {count} of {count} layers change the weights as before{more}")

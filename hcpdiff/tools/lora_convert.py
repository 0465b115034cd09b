"""`python -m hcpdiff.tools.lora_convert`: LoRA files from and to hcpdiff, webui, diffusers and PEFT, with the result checked before it appears."""

import argparse
from pathlib import Path

from hcpdiff import cli
from hcpdiff.checkpoint.paths import StepFiles, beside, locate, split_name
from hcpdiff.checkpoint.safetensors_header import read_header
from hcpdiff.errors import CheckpointError, ConfigError, HCPError
from hcpdiff.tools.lora_options import FAMILIES, SAVE_DTYPES, blocked_faults, control_faults, header_faults, said_of

EPILOG = """examples:
  to webui / ComfyUI:
    python -m hcpdiff.tools.lora_convert --to_webui --lora_path exps/run/ckpts/unet-1000.safetensors --dump_path mylora.safetensors
  the newest step of a run folder, all its parts, in half precision:
    python -m hcpdiff.tools.lora_convert --to_webui --lora_path exps/run --dump_path mylora.safetensors --save_dtype fp16
  from webui, PEFT, old diffusers or old hcpdiff files, into a folder:
    python -m hcpdiff.tools.lora_convert --from_webui --lora_path mylora.safetensors --dump_path converted/
  for pipe.load_lora_weights of diffusers, and for PeftModel.from_pretrained (a folder for each part):
    python -m hcpdiff.tools.lora_convert --to_diffusers --lora_path exps/run --dump_path for_diffusers/
    python -m hcpdiff.tools.lora_convert --to_peft --lora_path mylora.safetensors --dump_path for_peft/
"""
DIRECTIONS = ("to_webui", "from_webui", "to_diffusers", "to_peft")  # none: found from what the file is


def parser() -> cli.Parser:
    """The command's options."""
    options = cli.Parser(prog="python -m hcpdiff.tools.lora_convert", epilog=EPILOG,
                         description="Converts LoRA between hcpdiff, webui (A1111, ComfyUI, kohya), diffusers and PEFT. Reads every usual spelling; "
                                     "checks what it writes. Without a direction, files of hcpdiff become webui's, and others hcpdiff's.")
    add = options.add_argument
    add("--to_webui", action="store_true", help="hcpdiff (or any other spelling) to one webui file")
    add("--from_webui", action="store_true", help="webui (or any other spelling) to hcpdiff's files, one for each part")
    add("--to_diffusers", action="store_true", help="any spelling to one file for diffusers' load_lora_weights, every scale inside the factors")
    add("--to_peft", action="store_true", help="any spelling to PEFT's adapters, a folder for each part (adapter_model.safetensors, adapter_config.json)")
    add("--lora_path", metavar="PATH", type=cli.place, help="the LoRA: a file, a run folder (its newest step, all its parts), or a folder of diffusers or PEFT")
    add("--lora_path_TE", metavar="FILE", type=cli.place, nargs="+", default=[],
        help="the text encoder's file (SDXL: one or two); leave it out if there is none")
    add("--dump_path", metavar="PATH", type=cli.place, help="--to_webui, --to_diffusers: the file to write; --from_webui, --to_peft: the folder to write into")
    add("--auto_scale_alpha", action="store_true", help="accepted, changes nothing: alpha is always written so that webui gets the strength that was trained")
    add("--sdxl", action="store_true", help="the LoRA is for SDXL (found by itself; the flag only confirms it)")
    add("--family", choices=FAMILIES, help="which Stable Diffusion it is for, where names and widths leave it open")
    add("--save_dtype", choices=SAVE_DTYPES, help="store the factors in this type (default: as they are)")
    add("--name", help="the name in the metadata (default: that of the file), and of a file in a folder (default: RUN-STEP for a run folder); --from_webui: the files are called unet-NAME ...")
    add("--metadata", metavar="KEY=VALUE", action="append", default=[], help="an entry of the header, such as modelspec.author=me; may be repeated (not with --from_webui)")
    add("--keep_metadata", action="store_true", help="also keep captions, tags and folder names that the source's metadata holds")
    add("--overwrite", action="store_true", help="replace a file that this command did not make from the same LoRA (what it made of this one it replaces)")
    return options


def main(args: argparse.Namespace) -> int:
    """Converts; returns the exit code."""
    _check_options(args)
    sources, warnings = _sources(args)
    from hcpdiff.tools import lora_convert_run  # torch is imported only when there is something to do

    return lora_convert_run.run(args, sources, warnings)


def _check_options(args: argparse.Namespace) -> None:
    faults = []
    told = [f"--{way}" for way in DIRECTIONS if getattr(args, way)]
    if len(told) > 1:
        faults.append(f"which way? {' and '.join(told)} were given, one of them is meant.")
    for option in ("lora_path", "dump_path"):
        if not getattr(args, option):
            faults.append(f"--{option} is missing.")
    faults += blocked_faults(Path(args.dump_path or "."))
    if args.sdxl and args.family not in (None, "sdxl"):
        faults.append(f"--sdxl and --family {args.family} contradict each other.")
    if args.from_webui and args.metadata:
        faults.append("--metadata is not for --from_webui.")
    faults += header_faults(args) + control_faults([("lora_path", args.lora_path), ("dump_path", args.dump_path), *(("lora_path_TE", path) for path in args.lora_path_TE)])
    if faults:
        raise ConfigError(faults)


def _sources(args: argparse.Namespace) -> tuple[dict[Path, str], list[str]]:
    """The files to read -> the option that named each; and warnings about what lies beside them."""
    sources: dict[Path, str] = {}
    faults: list[str] = []
    warnings: list[str] = []
    for option, value in [("--lora_path", args.lora_path), *(("--lora_path_TE", path) for path in args.lora_path_TE)]:
        try:
            found = locate(value)
            if isinstance(found, Path):
                read_header(found)  # what is no safetensors file is told before torch is loaded
        except HCPError as error:
            faults += [f"{option}: {fault}" for fault in error.faults]
            continue
        if isinstance(found, StepFiles):
            parts = {stem: path for stem, path in found.parts.items() if option == "--lora_path" or stem != "unet"}
            if option == "--lora_path" and args.lora_path_TE:
                parts = {stem: path for stem, path in parts.items() if stem == "unet"}
            warnings.append(said_of(value, StepFiles(found.step, parts)))
            sources.update(dict.fromkeys(parts.values(), option))
        else:
            sources[found] = option
    if faults:
        raise CheckpointError(faults)
    return sources, warnings + _left_out(sources)


def _left_out(sources: dict[Path, str]) -> list[str]:
    given = {path.resolve() for path in sources}
    lines = [f"warning: {other} lies beside {path.name} and is not given: the result has no {stem}. Add --lora_path_TE {other} if it belongs to it."
             for path in sources for stem, other in beside(path).items() if stem != "unet" and other.resolve() not in given]
    steps = {split_name(path)[1]: path.name for path in sources if split_name(path)}
    if len(steps) > 1:
        lines.append(f"warning: files of different steps are put together: {', '.join(steps.values())}.")
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    cli.run(main, parser)

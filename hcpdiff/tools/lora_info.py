"""`python -m hcpdiff.tools.lora_info`: what a LoRA file is, whether it is sound, and whether it fits a model."""

import argparse

from hcpdiff import cli
from hcpdiff.errors import ConfigError
from hcpdiff.tools.lora_options import control_faults, sources

EPILOG = """examples:
  python -m hcpdiff.tools.lora_info --lora_path downloaded.safetensors
  does it fit this model (a folder, a .safetensors file, a hub id)?
    python -m hcpdiff.tools.lora_info --lora_path downloaded.safetensors --base_model model.safetensors
exit code: 0, or 2 where a file cannot be used as a LoRA, or does not fit the model
"""


def parser() -> cli.Parser:
    """The command's options."""
    options = cli.Parser(prog="python -m hcpdiff.tools.lora_info", epilog=EPILOG,
                         description="Shows what LoRA files are: spelling, family, layers, ranks, alphas, norms, metadata, and what is wrong with them.")
    add = options.add_argument
    add("--lora_path", metavar="PATH", type=cli.place, nargs="+", default=[], help="the LoRA: files, or run folders (their newest step, all its parts)")
    add("--base_model", metavar="MODEL", type=cli.place, help="also say whether it fits this model: a diffusers folder, a .safetensors file or a hub id")
    add("--layers", action="store_true", help="a row for each layer")
    add("--all_metadata", action="store_true", help="metadata in full, however long")
    add("--json", action="store_true", help="print all of it as JSON (a list, one map per file)")
    return options


def main(args: argparse.Namespace) -> int:
    """Shows; returns the exit code."""
    faults = control_faults([("lora_path", path) for path in args.lora_path] + [("base_model", args.base_model)])
    if not args.lora_path:
        faults.append("--lora_path is missing: which LoRA?")
    if faults:
        raise ConfigError(faults)
    found, _ = sources(args.lora_path)
    from hcpdiff.lora_tools import info_run  # torch is imported only when there is something to do

    return info_run.run(args, found)


if __name__ == "__main__":
    cli.run(main, parser)

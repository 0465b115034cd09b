"""`python -m hcpdiff.tools.lora_merge`: several LoRA into one, or into a base model."""

import argparse

from hcpdiff import cli
from hcpdiff.errors import ConfigError
from hcpdiff.tools.lora_options import (add_family, add_limit, add_output, control_faults, limit_faults, output_faults, sources, weight_faults)

EPILOG = """examples:
  two LoRA into one, exactly (its rank is the sum of theirs):
    python -m hcpdiff.tools.lora_merge --lora_path cat.safetensors ink.safetensors --alpha 0.8 0.5 --dump_path both.safetensors
  the same, cut to rank 32 (says what that loses):
    python -m hcpdiff.tools.lora_merge --lora_path cat.safetensors ink.safetensors --alpha 0.8 0.5 --rank 32 --dump_path both.safetensors
  a LoRA into a base model (a folder gives a folder, a file a file; keys and types stay):
    python -m hcpdiff.tools.lora_merge --lora_path cat.safetensors --alpha 0.8 --base_model model.safetensors --dump_path model-cat.safetensors
"""
_OF_A_LORA = ("rank", "energy", "save_dtype", "family")


def parser() -> cli.Parser:
    """The command's options."""
    options = cli.Parser(prog="python -m hcpdiff.tools.lora_merge", epilog=EPILOG,
                         description="Adds LoRA up: several into one file that works in webui, ComfyUI and hcpdiff, or into a base model. Reads every usual spelling; "
                                     "checks what it writes.")
    add = options.add_argument
    add("--lora_path", metavar="PATH", type=cli.place, nargs="+", default=[], help="the LoRA: files, or run folders (their newest step, all its parts)")
    add("--alpha", metavar="WEIGHT", type=float, nargs="+", default=[], help="the strength of each, or one for all (default: 1); may be negative")
    add("--alpha_TE", metavar="WEIGHT", type=float, nargs="+", default=[], help="the same for text encoders (default: --alpha)")
    add("--base_model", metavar="MODEL", type=cli.place,
        help="write this model with the LoRA in its weights: a diffusers folder, a .safetensors file or a hub id")
    add_limit(add)
    add_output(add, "the sources' own where that is exact, else fp32")
    add_family(add)
    return options


def main(args: argparse.Namespace) -> int:
    """Merges; returns the exit code."""
    _check_options(args)
    found, lines = sources(args.lora_path)
    if args.base_model:
        from hcpdiff.lora_tools import bake  # torch is imported only when there is something to do

        return bake.run(args, found, lines)
    from hcpdiff.lora_tools import merge

    return merge.run(args, found, lines)


def _check_options(args: argparse.Namespace) -> None:
    faults = limit_faults(args) + control_faults([("lora_path", path) for path in args.lora_path])
    faults += weight_faults("alpha", args.alpha, len(args.lora_path)) + weight_faults("alpha_TE", args.alpha_TE, len(args.lora_path))
    if not args.lora_path:
        faults.append("--lora_path is missing: which LoRA?")
    given = [f"--{option}" for option in _OF_A_LORA if getattr(args, option)]
    if args.base_model and given:
        faults.append(f"{', '.join(given)}: not with --base_model, whose weights keep their type and take the whole change.")
    faults += output_faults(args) + control_faults([("base_model", args.base_model)])
    if faults:
        raise ConfigError(faults)


if __name__ == "__main__":
    cli.run(main, parser)

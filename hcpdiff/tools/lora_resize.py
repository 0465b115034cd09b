"""`python -m hcpdiff.tools.lora_resize`: a LoRA of a lower rank."""

import argparse

from hcpdiff import cli
from hcpdiff.errors import ConfigError
from hcpdiff.tools.lora_options import add_family, add_limit, add_output, control_faults, limit_faults, output_faults, sources

EPILOG = """examples:
  rank 16:
    python -m hcpdiff.tools.lora_resize --lora_path big.safetensors --rank 16 --dump_path small.safetensors
  whatever rank keeps 98 % of each layer's energy, 32 at most:
    python -m hcpdiff.tools.lora_resize --lora_path big.safetensors --energy 0.98 --rank 32 --dump_path small.safetensors
"""


def parser() -> cli.Parser:
    """The command's options."""
    options = cli.Parser(prog="python -m hcpdiff.tools.lora_resize", epilog=EPILOG,
                         description="Cuts a LoRA to a lower rank by SVD, and says how much of its effect that loses. Reads every usual spelling; writes webui's.")
    add = options.add_argument
    add("--lora_path", metavar="PATH", type=cli.place, help="the LoRA: a file, or a run folder (its newest step, all its parts)")
    add_limit(add)
    add_output(add, "as they are")
    add_family(add)
    add("--keep_metadata", action="store_true", help="also keep captions, tags and folder names that the source's metadata holds")
    return options


def main(args: argparse.Namespace) -> int:
    """Resizes; returns the exit code."""
    faults = limit_faults(args) + output_faults(args) + control_faults([("lora_path", args.lora_path)])
    if not args.lora_path:
        faults.append("--lora_path is missing: which LoRA?")
    if args.rank is None and args.energy is None:
        faults.append("how small? --rank N, --energy SHARE, or both.")
    if faults:
        raise ConfigError(faults)
    found, lines = sources([args.lora_path])
    from hcpdiff.lora_tools import resize  # torch is imported only when there is something to do

    return resize.run(args, found, lines)


if __name__ == "__main__":
    cli.run(main, parser)

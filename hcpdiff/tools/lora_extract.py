"""`python -m hcpdiff.tools.lora_extract`: the difference of two models as a LoRA."""

import argparse

from hcpdiff import cli
from hcpdiff.checkpoint.paths import STEMS
from hcpdiff.errors import ConfigError
from hcpdiff.tools.lora_options import add_family, add_limit, add_output, control_faults, limit_faults, output_faults

EPILOG = """examples:
  rank 32 for all layers, 16 for 3x3 convolutions:
    python -m hcpdiff.tools.lora_extract --base_model sd15 --tuned_model mymodel.safetensors --rank 32 --conv_rank 16 --dump_path mymodel-lora.safetensors
  whatever rank keeps 95 % of each layer's energy, of the UNet alone:
    python -m hcpdiff.tools.lora_extract --base_model sd15 --tuned_model mymodel.safetensors --energy 0.95 --parts unet --dump_path mymodel-lora.safetensors
"""


def parser() -> cli.Parser:
    """The command's options."""
    options = cli.Parser(prog="python -m hcpdiff.tools.lora_extract", epilog=EPILOG,
                         description="Makes a LoRA of what a fine-tuned model changed of its base model (SVD, layer by layer), and says how much of it is lost.")
    add = options.add_argument
    add("--base_model", metavar="MODEL", type=cli.place, help="the model before: a diffusers folder, a .safetensors file or a hub id")
    add("--tuned_model", metavar="MODEL", type=cli.place, help="the model after, in any of these forms")
    add_limit(add)
    add("--conv_rank", type=int, metavar="N", help="the highest rank of a 3x3 convolution (default: --rank; 0: leave them out)")
    add("--parts", nargs="+", choices=STEMS, help="only these parts (default: all that both models have)")
    add("--device", help="where to compute, such as cpu or cuda (default: a GPU if there is one)")
    add_output(add, "fp16, or fp32 where a model has more digits")
    add_family(add)
    return options


def main(args: argparse.Namespace) -> int:
    """Extracts; returns the exit code."""
    faults = [f"--{option} is missing: which model?" for option in ("base_model", "tuned_model") if not getattr(args, option)]
    faults += limit_faults(args) + output_faults(args) + control_faults([("base_model", args.base_model), ("tuned_model", args.tuned_model)])
    if args.rank is None and args.energy is None:
        faults.append("how large? --rank N, --energy SHARE, or both.")
    if args.conv_rank is not None and args.conv_rank < 0:
        faults.append(f"--conv_rank {args.conv_rank}: a whole number from 0 on is wanted.")
    if faults:
        raise ConfigError(faults)
    from hcpdiff.lora_tools import extract  # torch is imported only when there is something to do

    return extract.run(args)


if __name__ == "__main__":
    cli.run(main, parser)

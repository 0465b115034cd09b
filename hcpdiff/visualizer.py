"""Draws pictures from a config: `python -m hcpdiff.visualizer --cfg cfgs/infer/text2img.yaml key=value …`."""

import argparse
from collections.abc import Mapping
from typing import Any

from hcpdiff import cli

EXAMPLE = """example:
  python -m hcpdiff.visualizer --cfg cfgs/infer/t2i_lora.yaml \\
      pretrained_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      lora_path=exps/2023-07-26-01-05-35/ckpts/unet-1000.safetensors \\
      lora_alpha=0.8 \\
      prompt='masterpiece, best quality, 1girl, {a red scarf:1.2}' seed=42 bs=2 num=2

Every key is explained in docs/en/user_guides/config.md.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return cli.config_parser("hcpdiff.visualizer", "Draw pictures with a base model and LoRA, from one YAML file.", EXAMPLE)


def main(args: argparse.Namespace) -> int:
    """Reads the config, then (only then) loads torch and draws."""
    from hcpdiff.config.infer_schema import InferConfig
    from hcpdiff.config.load import load
    from hcpdiff.errors import ConfigError

    loaded = load(args.cfg, args.overrides, InferConfig, allow=args.allow_target, also=quick_checks)
    for notice in loaded.notices:
        print(f"note: {notice}", flush=True)
    from hcpdiff.vis.request import read

    try:
        request = read(loaded.config)
    except ConfigError as error:
        given = {"pretrained_model": loaded.config.pretrained_model, "config": loaded.config.config, "prediction_type": loaded.config.prediction_type, "vae": loaded.config.vae,
                 **{f"new_components.{name}": spec for name, spec in loaded.config.new_components.items()}}
        raise ConfigError(error.faults + quick_checks(given)) from error
    from hcpdiff.quiet import quiet_libraries

    cli.reading()
    quiet_libraries()
    from hcpdiff.vis.run import run

    run(request, args.allow_target, lambda line: print(line, flush=True))
    return 0


def quick_checks(passed: Mapping[str, Any]) -> list[str]:
    """Beside a config's own faults, or its prompts' and files': what can be said of the base model without torch."""
    from hcpdiff.families import quick_faults

    replaced = [key.split(".")[1] for key in passed if key.startswith("new_components.")] + (["vae"] if passed.get("vae") else [])
    if "pretrained_model" not in passed:
        return []
    told = passed.get("prediction_type", "auto")
    return quick_faults(passed["pretrained_model"], "pretrained_model", replaced, passed.get("config"), None if told == "auto" else told)


if __name__ == "__main__":
    cli.run(main, parser)

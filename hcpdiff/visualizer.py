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
    from hcpdiff.families import not_to_be_had

    loaded = load(args.cfg, args.overrides, InferConfig, allow=args.allow_target, also=quick_checks)
    for notice in loaded.notices:
        print(f"note: {notice}", flush=True)
    from hcpdiff.vis.request import read

    cfg, faults = loaded.config, []
    try:
        request = read(cfg)
    except ConfigError as error:
        faults = error.faults
    if faults or not_to_be_had(cfg.pretrained_model, cfg.vae, cfg.revision, ("pretrained_model", "vae")):
        given = {name: getattr(cfg, name) for name in ("pretrained_model", "config", "prediction_type", "vae", "revision")}
        raise ConfigError(faults + quick_checks(given | {f"new_components.{name}": spec for name, spec in cfg.new_components.items()}))
    from hcpdiff.families.ahead import read_ahead, weights_ahead
    from hcpdiff.importing import importing
    from hcpdiff.quiet import quiet_libraries

    cli.reading()
    read_ahead(weights_ahead(cfg.pretrained_model, cfg.vae, cfg.revision, cfg.variant))
    with importing():
        quiet_libraries()
        from hcpdiff.families.clip_unet import import_kinds
        from hcpdiff.vis.run import run

        import_kinds()
    run(request, args.allow_target, lambda line: print(line, flush=True))
    return 0


def quick_checks(passed: Mapping[str, Any]) -> list[str]:
    """Beside a config's own faults, or its prompts' and files': what can be said of the base model and of LoRA files without torch."""
    from hcpdiff.config.infer_schema import InferConfig
    from hcpdiff.families import not_to_be_had, quick_faults
    from hcpdiff.vis.lora_files import Finder

    replaced = [key.split(".")[1] for key in passed if key.startswith("new_components.")] + (["vae"] if passed.get("vae") else [])
    source, told = passed.get("pretrained_model"), passed.get("prediction_type", "auto")
    faults = quick_faults(source, "pretrained_model", replaced, passed.get("config"), None if told == "auto" else told) if source else []
    faults += not_to_be_had(source, passed.get("vae"), passed.get("revision"), ("pretrained_model", "vae"))
    finder = Finder()
    if "lora_path" in passed:  # each of these is well in itself
        finder.lists(InferConfig(pretrained_model="", **{name: passed[name] for name in ("lora_path", "lora_path_TE", "lora_alpha", "lora_alpha_TE") if name in passed}))
    return faults + finder.faults


if __name__ == "__main__":
    cli.run(main, parser)

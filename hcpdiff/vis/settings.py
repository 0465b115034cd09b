"""What is written down about a picture: A1111's text, our JSON (no local paths), and a config that draws it again. No torch here."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..config import expressions, tree
from .prompt import to_webui
from .request import Picture, Request
from .save import Settings

# A1111's names of samplers, by diffusers' class (and algorithm_type).
SAMPLERS = {
    "EulerAncestralDiscreteScheduler": "Euler a", "EulerDiscreteScheduler": "Euler", "LMSDiscreteScheduler": "LMS", "HeunDiscreteScheduler": "Heun",
    "KDPM2DiscreteScheduler": "DPM2", "KDPM2AncestralDiscreteScheduler": "DPM2 a", "DPMSolverMultistepScheduler": "DPM++ 2M", "DPMSolverSDEScheduler": "DPM++ SDE",
    "DDIMScheduler": "DDIM", "PNDMScheduler": "PLMS", "UniPCMultistepScheduler": "UniPC", "LCMScheduler": "LCM", "DDPMScheduler": "DDPM",
}


@dataclass(frozen=True)
class Facts:
    """What holds for every picture of a run."""

    model: str
    family: str
    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str
    scheduler_config: Mapping
    dtype: str
    embeddings: Sequence[str] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def describe(request: Request, picture: Picture, facts: Facts) -> Settings:
    """The three texts of a picture."""
    return Settings(webui_text(request, picture, facts), inside(request, picture, facts), redraw(request, picture, facts))


def webui_text(request: Request, picture: Picture, facts: Facts) -> str:
    """The `parameters` text as AUTOMATIC1111 writes and reads it; weights in its spelling, LoRA as tags."""
    tags = [f"<lora:{lora.name}:{lora.strength:g}>" if lora.strength == lora.strength_TE else f"<lora:{lora.name}:{lora.strength_TE:g}:{lora.strength:g}>"
            for lora in request.loras]
    prompt = " ".join([to_webui(request.prompts[picture.prompt].pieces), *tags])
    negative = to_webui(request.neg_prompts[picture.prompt].pieces)
    items = {"Steps": facts.steps, "Sampler": sampler_name(facts), **({"Schedule type": "Karras"} if facts.scheduler_config.get("use_karras_sigmas") else {}),
             "CFG scale": f"{facts.guidance:g}", "Seed": picture.seed, "Size": f"{facts.width}x{facts.height}", "Model": comma_free(facts.model),
             **({"Clip skip": request.cfg.clip_skip + 1} if request.cfg.clip_skip else {}), "Version": f"hcpdiff {__version__}"}
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else []), ", ".join(f"{name}: {value}" for name, value in items.items())]
    return "\n".join(lines)


def sampler_name(facts: Facts) -> str:
    """A1111's name of the sampler, else diffusers' class."""
    name = SAMPLERS.get(facts.scheduler, facts.scheduler)
    return name + " SDE" if name == "DPM++ 2M" and str(facts.scheduler_config.get("algorithm_type")).startswith("sde") else name


def comma_free(text: str) -> str:
    """A value of that text must be quoted where it holds a comma, a colon or a line break."""
    return f'"{text}"' if set(text) & set(",:\n") else text


def inside(request: Request, picture: Picture, facts: Facts) -> dict:
    """What goes into the file as JSON: everything that makes the picture, names instead of local paths."""
    cfg = request.cfg
    return {
        "program": "hcpdiff", "version": __version__, "prompt": request.texts[picture.prompt], "neg_prompt": request.neg_texts[picture.prompt],
        "prompt_syntax": cfg.prompt_syntax, "seed": picture.seed, "width": facts.width, "height": facts.height, "model": facts.model, "family": facts.family,
        "loras": [{"name": lora.name, "strength": lora.strength, "strength_TE": lora.strength_TE} for lora in request.loras], "clip_skip": cfg.clip_skip,
        "infer_args": {**no_paths(cfg.infer_args), "num_inference_steps": facts.steps, "guidance_scale": facts.guidance, "width": facts.width, "height": facts.height},
        "scheduler": facts.scheduler, "new_components": {name: no_paths(spec) for name, spec in cfg.new_components.items()},
        "embeddings": list(facts.embeddings), "dtype": facts.dtype, **facts.versions,
    }


def no_paths(value):
    """Text that is a path of this machine is cut to its last part; hub ids (name/name) stay."""
    if isinstance(value, Mapping):
        return {key: no_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [no_paths(item) for item in value]
    named = isinstance(value, str) and ("/" in value or "\\" in value)
    local = named and ("\\" in value or value.startswith(("~", "/", "./", "../")) or Path(value).exists())
    return Path(value.replace("\\", "/")).name if local else value


def redraw(request: Request, picture: Picture, facts: Facts) -> str:
    """The run's config with this picture's prompt and seed, as YAML that --cfg takes."""
    plain = dataclasses.asdict(request.cfg)
    plain |= {"prompt": request.texts[picture.prompt], "neg_prompt": request.neg_texts[picture.prompt], "prompt_file": None, "seed": picture.seed, "bs": 1, "num": 1,
              "infer_args": {**plain["infer_args"], "num_inference_steps": facts.steps, "guidance_scale": facts.guidance, "width": facts.width, "height": facts.height},
              "dtype": facts.dtype, "emb_dir": str(request.emb_dir) if request.emb_dir else None}
    return tree.dump(tree.written(escaped(pin(plain, request))))


def pin(plain: dict, request: Request) -> dict:
    """`plain` with run folders replaced by the files that were taken: a later checkpoint must not change the picture."""
    taken = {lora.key: str(lora.path) for lora in request.loras if lora.path}
    path = plain["lora_path"]
    if isinstance(path, list):
        plain["lora_path"] = [taken.get(f"lora_path[{n}]" if len(path) > 1 else "lora_path", item) for n, item in enumerate(path)]
    else:
        plain["lora_path"] = taken.get("lora_path", path)
    for n, item in enumerate(plain["merge"] if isinstance(plain["merge"], list) else []):
        item["path"] = taken.get(f"merge[{n}]", item["path"])
    return plain


def escaped(value):
    """Text in which `${` and `$<` stay what they are when the YAML is read again."""
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [escaped(item) for item in value]
    return expressions.escape(value) if isinstance(value, str) else value

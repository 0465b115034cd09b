"""`new_components`: parts of the model built from `_target_`, in the place of its own."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config.build import build, check_target, locate
from ..errors import ConfigError, collect
from ..families.source import load_or_fault, load_whole

LOADER = ".from_pretrained"
EXAMPLES = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler")
SOURCE_ARGUMENT = "pretrained_model_name_or_path"


def check(specs: Mapping[str, Mapping], known: Sequence[str], allow: Sequence[str]) -> list[str]:
    """Faults of the blocks, without building: unknown parts, and targets that their slot does not take."""
    faults = []
    for name, spec in specs.items():
        where = f"new_components.{name}"
        if name not in known:
            faults.append(f"{where}: this model has no such part; it has {', '.join(known)}.")
        else:
            faults += check_target(spec, name, where, allow) or _place_faults(spec, where)
    return faults


def _place_faults(spec: Mapping, where: str) -> list[str]:
    """What cannot name a place: a loader's arguments are a free map, whose types the config's check does not know."""
    value = spec.get(SOURCE_ARGUMENT, "a place")
    if not spec["_target_"].endswith(LOADER) or isinstance(value, str) and value.strip():
        return []
    return [f"{where}.{SOURCE_ARGUMENT} = {value!r} is no text that names a place. It takes a folder, or a hub id (name/name)."]


def base_scheduler(config: Mapping):
    """The base model's own sampler, from its scheduler config."""
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ConfigError(f"pretrained_model: its scheduler is a {config.get('_class_name')}, which diffusers {diffusers.__version__} does not have. "
                          f"Name one in new_components.scheduler, such as _target_: diffusers.DPMSolverMultistepScheduler.")
    try:
        return kind.from_config(config)
    except Exception as error:  # constructors raise what a wrong value makes of them
        raise ConfigError(f"pretrained_model: its scheduler cannot be made: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def build_scheduler(spec: Mapping, base, allow: Sequence[str]):
    """A sampler by `_target_`; what its block leaves out comes from the base model's (prediction_type, steps_offset ...).

    As in diffusers' from_config, values that the base's own file left to its class are not carried over.
    """
    where = "new_components.scheduler"
    if str(spec["_target_"]).rsplit(".", 1)[-1] in ("from_pretrained", "from_config"):
        return diffusing(build(spec, "scheduler", where, allow), where)
    kind = locate(spec["_target_"])
    takes = kind._get_init_keys(kind)
    own = set(base.config.get("_use_default_values", ()))
    inherited = {name: value for name, value in base.config.items() if name in takes and name not in own and value is not None}
    return diffusing(build({**inherited, **spec}, "scheduler", where, allow), where)


def check_terminal(scheduler) -> None:
    """ConfigError for a schedule that ends without signal (zero terminal SNR) in front of a model that predicts epsilon: its first step would divide by zero."""
    config = scheduler.config
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        raise ConfigError(f"the sampler {type(scheduler).__name__} has rescale_betas_zero_snr (zero terminal SNR), but the model predicts epsilon, which means nothing where there "
                          f"is noise alone. Give new_components.scheduler prediction_type: v_prediction if the model was made for it, else rescale_betas_zero_snr: false.")


def diffusing(scheduler, where: str):
    """The sampler, refused where it is for another kind of model (flow matching)."""
    if not hasattr(scheduler, "init_noise_sigma"):
        raise ConfigError(f"{where}: {type(scheduler).__name__} is for another kind of model; this one takes {', '.join(sorted(EXAMPLES))} …")
    return scheduler


def build_part(name: str, spec: Mapping, allow: Sequence[str]):
    """A module or tokenizer by `_target_`. Local weights that are not whole are refused, where the loader would draw random ones."""
    where, spec = f"new_components.{name}", dict(spec)
    nested = any(isinstance(value, Mapping) and "_target_" in value for value in spec.values())  # a quantization config: build makes it first
    if spec["_target_"].endswith(LOADER) and SOURCE_ARGUMENT in spec and not nested:
        kind, place = locate(spec.pop("_target_").removesuffix(LOADER)), os.path.expanduser(spec.pop(SOURCE_ARGUMENT))
        if name.startswith("tokenizer"):
            return load_or_fault(kind, place, where, spec)
        return load_whole(kind, Path(place) if Path(place).is_dir() else place, where, spec)
    return build(spec, name, where, allow)


def build_all(specs: Mapping[str, Mapping], allow: Sequence[str]) -> dict:
    """Every part but the scheduler, by name; all faults come together."""
    parts, faults = {}, []
    for name, spec in specs.items():
        if name == "scheduler":
            continue
        collect(faults, lambda: parts.update({name: build_part(name, spec, allow)}))
    if faults:
        raise ConfigError(faults)
    return parts

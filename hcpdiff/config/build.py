"""Objects from `_target_` mappings (stage B). A place of the config takes one kind of thing: what is not a class of that kind is never called.

The name's package must be allowed (see `check.ALLOWED`), and after import it must be a class of the slot's base class, defined in an allowed
package, or its `from_pretrained`, `from_config` or `from_single_file`. Functions are never taken: an allow-list of names alone would
run `torch.hub.load` or `torch.utils.collect_env.run`.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, HCPError
from . import check

LOADERS = ("from_pretrained", "from_config", "from_single_file")
SETTINGS = ("_target_", "_args_", "_partial_")

# slot -> base classes by name, imported when they are needed
SLOTS: dict[str, tuple[str, ...]] = {
    "optimizer": ("torch.optim.Optimizer",),
    "lr_scheduler": ("torch.optim.lr_scheduler.LRScheduler",),
    "noise_scheduler": ("diffusers.SchedulerMixin",),
    "scheduler": ("diffusers.SchedulerMixin",),
    "logger": ("hcpdiff.loggers.Logger",),
    "vae": ("diffusers.ModelMixin",),
    "unet": ("diffusers.ModelMixin",),
    "transformer": ("diffusers.ModelMixin",),
    "text_encoder": ("transformers.PreTrainedModel",),
    "tokenizer": ("transformers.PreTrainedTokenizerBase",),
    "component": ("diffusers.ModelMixin", "diffusers.SchedulerMixin", "transformers.PreTrainedModel", "transformers.PreTrainedTokenizerBase"),
}
# What may stand inside another target's arguments.
NESTED = (*SLOTS["component"], "transformers.utils.quantization_config.QuantizationConfigMixin", "diffusers.quantizers.quantization_config.QuantizationConfigMixin",
          "transformers.PreTrainedConfig", "torch.optim.Optimizer")
INSIDE = "a model, scheduler, tokenizer, optimizer, or the config of one"
PROVIDED = {"optimizer": ("params",), "lr_scheduler": ("optimizer",)}  # arguments that the caller fills in
HOW_TO_GET = {"prodigyopt": "prodigyopt", "schedulefree": "schedulefree", "pytorch_optimizer": "pytorch-optimizer", "bitsandbytes": "bitsandbytes",
              "torchao": "torchao", "dadaptation": "dadaptation", "lion_pytorch": "lion-pytorch"}


def build(spec: Mapping, slot: str, where: str, allow: Sequence[str] = (), **extra: Any) -> Any:
    """The object that `spec` describes, made by hydra; `extra` are further arguments of its constructor.

    ConfigError names `where` (the key of the spec) for every fault, including what the constructor itself complains about.
    """
    faults = check_target(spec, slot, where, allow, tuple(extra))
    if faults:
        raise ConfigError(faults)
    try:
        made = _made({name: value for name, value in spec.items() if name != "_partial_"}, extra)
    except HCPError:
        raise
    except Exception as error:  # constructors of other packages raise what they like; it is told, not swallowed
        raise ConfigError(f"{where}: {spec['_target_']} cannot be built: {_first_line(error)}") from error
    if not isinstance(made, _bases(slot)):
        raise ConfigError(f"{where}: {spec['_target_']} gives a {type(made).__name__}; {_wanted(slot)} is expected")
    return made


def check_target(spec: Mapping, slot: str, where: str, allow: Sequence[str] = (), provided: Sequence[str] | None = None) -> list[str]:
    """Faults of a spec, nested ones too, without building anything; imports the classes that it names."""
    faults = check.spec_faults(dict(spec), where, allow)
    return faults or _target_faults(spec, _names(slot), where, allow, (*PROVIDED.get(slot, ()), *(provided or ())))


def locate(target: str) -> Any:
    """The object of a dotted name; ConfigError when it cannot be imported."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        name = ".".join(parts[:cut])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")) and cut > 1:
                continue
            raise ConfigError(_not_installed(target, error.name or name)) from None
        except Exception as error:
            raise ConfigError(f"'{target}' cannot be imported: {_first_line(error)}") from error
        return _attributes(found, name, parts[cut:], target)
    raise ConfigError(f"'{target}' cannot be imported")


def _attributes(found: Any, name: str, rest: list[str], target: str) -> Any:
    for part in rest:
        try:
            found = getattr(found, part)
        except AttributeError:
            near = near_names(part, dir(found))
            raise ConfigError(f"'{target}': {name} has no {part}" + (f". Nearest: {', '.join(near)}" if near else "")) from None
        except Exception as error:  # lazy modules import on access
            raise ConfigError(f"'{target}' cannot be imported: {_first_line(error)}") from error
        name += f".{part}"
    return found


def near_names(name: str, known: Sequence[str]) -> list[str]:
    """Up to three public names that look like this one; one that differs in letter case only comes first, alone."""
    spelt = {other.casefold(): other for other in known if not other.startswith("_")}
    if name.casefold() in spelt:
        return [spelt[name.casefold()]]
    return [spelt[other] for other in difflib.get_close_matches(name.casefold(), spelt, n=3)]


def near_classes(target: str, bases: tuple[str, ...]) -> str:
    """'. Nearest: torch.optim.AdamW' for classes of these kinds, beside their base class, whose name looks like the target's."""
    found = []
    for base in () if bases is NESTED else bases:
        home = base.rpartition(".")[0]
        for name in near_names(target.rpartition(".")[2], dir(importlib.import_module(home))):
            thing = getattr(importlib.import_module(home), name)
            if inspect.isclass(thing) and issubclass(thing, _classes(bases)) and f"{home}.{name}" not in (target, *bases):
                found.append(f"{home}.{name}")
    return f". Nearest: {', '.join(found)}" if found else ""


def _not_installed(target: str, module: str) -> str:
    package = module.split(".")[0]
    return f"'{target}': the package {package} is not installed (pip install {HOW_TO_GET.get(package, package)})"


def _target_faults(spec: Mapping, bases: tuple[str, ...], where: str, allow: Sequence[str], provided: Sequence[str] = ()) -> list[str]:
    """Faults of one spec whose names have passed `check.spec_faults`."""
    target = spec["_target_"]
    try:
        found = locate(target)
    except ConfigError as error:
        near = "" if "not installed" in str(error) else near_classes(target, bases)
        faults = [fault.partition(". Nearest:")[0] + near if near else fault for fault in error.faults]  # classes of the right kind are the better hint
        return [f"{where}._target_: {fault}" for fault in faults] + _nested_faults(spec, where, allow)
    fault = _kind_fault(found, target, bases, allow)
    if fault:
        return [f"{where}._target_ = '{target}' {fault}{near_classes(target, bases)}", *_nested_faults(spec, where, allow)]
    return argument_faults(found, spec, where, provided) + _nested_faults(spec, where, allow)


def _nested_faults(value: Any, where: str, allow: Sequence[str]) -> list[str]:
    """Faults of the specs inside a spec's arguments."""
    if isinstance(value, Mapping):
        items = [(f"{where}.{name}", item) for name, item in value.items()]
    else:
        items = [(f"{where}[{index}]", item) for index, item in enumerate(value)] if isinstance(value, (list, tuple)) else []
    faults = []
    for place, item in items:
        nested = isinstance(item, Mapping) and "_target_" in item
        faults += _target_faults(item, NESTED, place, allow) if nested else _nested_faults(item, place, allow)
    return faults


def _kind_fault(found: Any, target: str, bases: tuple[str, ...], allow: Sequence[str]) -> str:
    """Why a place of these base classes does not take `found`; '' when it does."""
    wanted = "this place takes " + (INSIDE if bases is NESTED else f"a class of kind {' or '.join(bases)}")
    owner = found
    if inspect.ismethod(found) and target.rsplit(".", 1)[-1] in LOADERS:
        owner = found.__self__
    if not inspect.isclass(owner):
        what = "a module" if inspect.ismodule(owner) else "a function" if callable(owner) else f"a {type(owner).__name__}"
        return f"is {what}; {wanted} (or its {', '.join(LOADERS)})"
    if not issubclass(owner, _classes(bases)):
        return f"is a class of another kind; {wanted}"
    if not check.allowed(owner.__module__, allow):
        return f"is defined in {owner.__module__}, which is not among the allowed packages"
    return f"is only the base class; {wanted}" if found in _classes(bases) else ""


def argument_faults(found: Callable, spec: Mapping, where: str, provided: Sequence[str] = ()) -> list[str]:
    """Unknown and missing arguments of a class or loader."""
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # written in C: it tells when it is called
        return []
    kinds = {parameter.kind for parameter in parameters.values()}
    names = [name for name, parameter in parameters.items() if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    given = [name for name in spec if name not in SETTINGS]
    faults = [f"{where}.{name} is filled in by hcpdiff: take it out" for name in given if name in provided]
    for name in given:
        if name not in names and name not in provided and inspect.Parameter.VAR_KEYWORD not in kinds:
            faults.append(f"{where}.{name} is no argument of {spec['_target_']}{_nearest(name, names, provided)}; '---' takes out one that a base wrote")
    filled = {*given, *provided, *names[:len(spec.get("_args_", ()))]}
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in filled:
            faults.append(f"{where}.{name} is missing: {spec['_target_']} needs it")
    return faults


def _nearest(name: str, names: list[str], provided: Sequence[str]) -> str:
    own = [known for known in names if known not in provided and known != "self"]
    near = difflib.get_close_matches(name, own, n=3)
    return f". Nearest: {', '.join(near)}" if near else f". It takes {', '.join(own)}"


def _names(slot: str) -> tuple[str, ...]:
    """The slot's base classes by name; `text_encoder_2` is a `text_encoder`."""
    return SLOTS[slot] if slot in SLOTS else SLOTS[slot.rstrip("0123456789").rstrip("_")]


def _classes(names: tuple[str, ...]) -> tuple[type, ...]:
    return tuple(locate(name) for name in names)


def _bases(slot: str) -> tuple[type, ...]:
    return _classes(_names(slot))


def _wanted(slot: str) -> str:
    return " or ".join(_names(slot))


def _made(spec: Mapping, extra: Mapping) -> Any:
    """The object of a checked spec, those inside it first.

    hydra is given the name alone: it would read `${` in the arguments' text as an interpolation, and copy what it is given.
    """
    import hydra.utils

    call = hydra.utils.instantiate({"_target_": spec["_target_"], "_partial_": True})
    arguments = {name: _argument(value) for name, value in spec.items() if name not in SETTINGS}
    positional = [_argument(value) for value in spec.get("_args_", ())]
    return functools.partial(call, *positional, **arguments) if spec.get("_partial_") else call(*positional, **arguments, **extra)


def _argument(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _made(value, {}) if "_target_" in value else {name: _argument(item) for name, item in value.items()}
    return [_argument(item) for item in value] if isinstance(value, (list, tuple)) else value


def _first_line(error: BaseException) -> str:
    """The reason of an error in one line; hydra wraps the one that counts."""
    while type(error).__module__.startswith("hydra") and error.__cause__:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]} ({type(error).__name__})" if lines else type(error).__name__

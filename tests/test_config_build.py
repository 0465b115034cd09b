"""A place of the config builds one kind of thing; all else is named and never called."""

import pytest
import torch
from config_help import write

from hcpdiff.config import build as building
from hcpdiff.config.build import build, check_target
from hcpdiff.errors import ConfigError


def spec(target, **arguments):
    return {"_target_": target, **arguments}


def test_the_optimizer_holds_the_parameters_it_is_given():
    weight = torch.nn.Parameter(torch.ones(2))
    made = build(spec("torch.optim.AdamW", weight_decay=0.5, betas=[0.8, 0.9], _partial_=True), "optimizer", "train.optimizer", params=[{"params": [weight], "lr": 0.1}])
    group = made.param_groups[0]
    assert isinstance(made, torch.optim.AdamW) and group["params"][0] is weight and (group["lr"], group["weight_decay"], tuple(group["betas"])) == (0.1, 0.5, (0.8, 0.9))


@pytest.mark.parametrize("target, says", [
    ("torch.utils.collect_env.run", "is a function"), ("torch.hub.load", "is a function"), ("torch.os.listdir", "is a function"), ("torch.utils.cpp_extension.load_inline", "is a function"),
    ("builtins.eval", "not among those allowed"), ("os.system", "not among those allowed"), ("torch.optim", "is a module"), ("torch.optim.Adamw", "Nearest: torch.optim.AdamW"), ("torch.nn.Linear", "another kind"),
    ("torch.optim.Optimizer", "only the base class"), ("torch.optim.AdamW.step", "is a function"), ("torch.optim.AdamW.__init__", "is a function"), ("torch.load", "is a function"),
    ("diffusers.DDIMScheduler", "another kind"), ("prodigyopt_x.Prodigy", "not among"), ("torch.optim.AdamW.mro", "is a function"), ("torch.os.PathLike", "another kind"), ("torch.nope.X", "torch has no nope"),
])
def test_only_a_class_of_the_slots_kind_is_taken(target, says, monkeypatch):
    faults = check_target(spec(target), "optimizer", "train.optimizer")
    assert len(faults) == 1 and says in faults[0] and "train.optimizer._target_" in faults[0]
    with pytest.raises(ConfigError):
        build(spec(target), "optimizer", "train.optimizer", params=[])


def test_functions_are_never_called(monkeypatch):
    called = []
    monkeypatch.setattr(torch.hub, "load", lambda *args, **kwargs: called.append(args))
    for place in (spec("torch.hub.load", repo_or_dir="x", model="y"), spec("torch.optim.AdamW", lr=spec("torch.hub.load", repo_or_dir="x", model="y"))):
        with pytest.raises(ConfigError):
            build(place, "optimizer", "o", params=[torch.nn.Parameter(torch.ones(1))])
    assert called == []


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    fault = check_target(spec("prodigyopt.Prodigy"), "optimizer", "train.optimizer")[0]
    assert "pip install prodigyopt" in fault


def test_arguments_are_checked_by_name():
    faults = check_target(spec("torch.optim.AdamW", weigth_decay=1, params=[]), "optimizer", "train.optimizer")
    assert len(faults) == 2 and "train.optimizer.params is filled in by hcpdiff" in faults[0] and "Nearest: weight_decay" in faults[1]
    assert "gamma is missing" in " ".join(check_target(spec("torch.optim.lr_scheduler.ExponentialLR"), "lr_scheduler", "s"))
    assert check_target(spec("torch.optim.lr_scheduler.ExponentialLR", gamma=0.9), "lr_scheduler", "s") == []
    assert check_target(spec("torch.optim.lr_scheduler.ExponentialLR", _args_=5), "lr_scheduler", "s") == ["s._args_ = 5 must be a list"]


def test_what_the_constructor_says_is_told_under_the_key():
    with pytest.raises(ConfigError, match="train.optimizer: torch.optim.AdamW cannot be built: Invalid beta parameter.*ValueError"):
        build(spec("torch.optim.AdamW", betas=[2, 2]), "optimizer", "train.optimizer", params=[torch.nn.Parameter(torch.ones(1))])


def test_schedulers_and_models_of_diffusers_are_built():
    made = build(spec("diffusers.DPMSolverMultistepScheduler", beta_start=0.00085, use_karras_sigmas=True), "scheduler", "new_components.scheduler")
    assert made.config.use_karras_sigmas and made.config.beta_start == 0.00085
    from diffusers import AutoencoderKL

    assert isinstance(build(spec("diffusers.AutoencoderKL", block_out_channels=[4], norm_num_groups=2), "vae", "new_components.vae"), AutoencoderKL)


def test_from_pretrained_is_taken_of_the_right_class_only(tiny_sd1):
    loader = spec("diffusers.AutoencoderKL.from_pretrained", pretrained_model_name_or_path=str(tiny_sd1 / "vae"))
    assert type(build(loader, "vae", "v")).__name__ == "AutoencoderKL"
    assert "another kind" in check_target(loader, "scheduler", "s")[0]
    assert "another kind" in check_target(spec("diffusers.DiffusionPipeline.from_pretrained", pretrained_model_name_or_path="x"), "component", "c")[0]
    assert "is a function" in check_target(spec("diffusers.AutoencoderKL.load_config", pretrained_model_name_or_path="x"), "vae", "v")[0]
    assert check_target(spec("transformers.CLIPTextModel.from_pretrained", pretrained_model_name_or_path="x"), "text_encoder_2", "t") == []
    assert check_target(spec("transformers.CLIPTokenizer.from_pretrained", pretrained_model_name_or_path="x"), "tokenizer", "t") == []


@pytest.mark.parametrize("name", ["trust_remote_code", "custom_pipeline"])
def test_code_from_outside_is_refused_at_any_depth(name):
    nested = spec("diffusers.AutoencoderKL.from_pretrained", pretrained_model_name_or_path="x", more=[{"deep": {name: True}}])
    assert check_target(nested, "vae", "v") == [f"v.more[0].deep.{name} is refused: it runs code from outside"]


def test_text_that_looks_like_an_interpolation_reaches_the_object_as_it_is():
    made = build(spec("diffusers.DDIMScheduler", beta_schedule="linear", prediction_type="${x} ??? \\${y}"), "scheduler", "s")
    assert made.config.prediction_type == "${x} ??? \\${y}"


def test_allow_target_admits_a_class_of_another_package(tmp_path, monkeypatch):
    write(tmp_path, "import torch\nclass Mine(torch.optim.SGD):\n    pass\ndef helper():\n    raise SystemExit\n", "other_package_of_mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    target = spec("other_package_of_mine.Mine", lr=1.0)
    assert "--allow-target other_package_of_mine" in check_target(target, "optimizer", "o")[0]
    assert type(build(target, "optimizer", "o", ["other_package_of_mine"], params=[torch.nn.Parameter(torch.ones(1))])).__name__ == "Mine"
    assert "is a function" in check_target(spec("other_package_of_mine.helper"), "optimizer", "o", ["other_package_of_mine"])[0]


def test_a_class_that_an_allowed_module_only_imported_is_refused(monkeypatch):
    class Foreign(torch.optim.SGD):
        pass

    Foreign.__module__ = "elsewhere"
    monkeypatch.setattr(torch.optim, "Foreign", Foreign, raising=False)
    assert "defined in elsewhere" in check_target(spec("torch.optim.Foreign"), "optimizer", "o")[0]


def test_every_slot_names_classes_that_exist():
    for slot in building.SLOTS:
        assert all(isinstance(kind, type) for kind in building._classes(building.SLOTS[slot]))
    assert all(isinstance(kind, type) for kind in building._classes(building.NESTED))

"""A stranger's files are data: nothing in a config, model, embedding, cache or state runs, reads a secret or writes outside its folder.

Every hostile file here would leave a marker (a file, or a changed one) if what is in it ran.
"""

import io
import json
import os
import pickle
import shutil
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from config_help import SMALL, write
from PIL import Image
from safetensors.torch import load_file

from hcpdiff.cli import message
from hcpdiff.config.build import build, check_target
from hcpdiff.config.expressions import ExpressionError, evaluate
from hcpdiff.config.infer_schema import InferConfig
from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.data.caption import load_captions
from hcpdiff.errors import CheckpointError, ConfigError, HCPError
from hcpdiff.families import detect
from hcpdiff.loggers import FileLogger, TensorBoardLogger
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.run import Run
from hcpdiff.vis import components, embeddings

SECRET = "s3cr3t-of-the-environment"


@pytest.fixture(autouse=True)
def marker(tmp_path, monkeypatch):
    """The file that hostile content would make; a test fails when it is there."""
    path = tmp_path / "marker"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HCP_SECRET", SECRET)
    yield path
    assert not path.exists()


class Hostile:
    """Unpickled, it makes the marker."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def spec(target, /, **arguments):
    return {"_target_": target, **arguments}


# -- configs ---------------------------------------------------------------------------------------------------------------------

def calls(marker: Path) -> dict[str, dict]:
    """Specs whose target, when called, would make the marker."""
    touch = f"touch {marker}"
    hub = marker.parent / "hub"
    hub.mkdir()
    (hub / "hubconf.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\ndef model():\n    pass\n", encoding="utf-8")
    pickled = marker.parent / "hostile.pt"
    torch.save({"a": Hostile(marker)}, pickled)
    return {
        "os.system": spec("os.system", command=touch), "subprocess": spec("subprocess.check_output", args=touch, shell=True), "eval": spec("builtins.eval", _args_=[f"open({str(marker)!r}, 'w')"]),
        "exec": spec("builtins.exec", _args_=[f"open({str(marker)!r}, 'w')"]), "path": spec("pathlib.Path.touch", _args_=[str(marker)]), "numpy": spec("numpy.save", file=str(marker), arr=1),
        "hydra": spec("hydra.utils.instantiate", config=spec("os.system", command=touch)), "hydra call": spec("hydra.utils.call", config=spec("os.system", command=touch)),
        "hydra method": spec("hydra.utils.get_method", path="os.system"), "collect_env": spec("torch.utils.collect_env.run", command=touch),
        "hub": spec("torch.hub.load", repo_or_dir=str(hub), model="model", source="local"), "hub import": spec("torch.hub.import_module", name="x", path=str(hub / "hubconf.py")),
        "inline": spec("torch.utils.cpp_extension.load_inline", name="x", cpp_sources="", extra_cflags=[f"; {touch}"]), "torch.load": spec("torch.load", f=str(pickled), weights_only=False),
        "torch.os": spec("torch.os.system", command=touch), "listdir": spec("torch.os.listdir", path="/"), "getenv": spec("torch.os.getenv", key="HCP_SECRET"),
        "save": spec("torch.save", obj=1, f=str(marker)), "package": spec("torch.package.PackageImporter", file_or_buffer=str(pickled)), "jit": spec("torch.jit.load", f=str(pickled)),
        "from_file": spec("torch.UntypedStorage.from_file", filename=str(marker), shared=True, nbytes=4), "library": spec("torch.ops.load_library", path=str(marker)),
        "pipeline": spec("diffusers.DiffusionPipeline.from_pretrained", pretrained_model_name_or_path=str(hub), custom_pipeline=str(hub)),
        "automodel": spec("transformers.AutoModel.from_pretrained", pretrained_model_name_or_path=str(hub), trust_remote_code=True),
        "dynamic": spec("transformers.dynamic_module_utils.get_class_from_dynamic_module", class_reference="hubconf.model", pretrained_model_name_or_path=str(hub)),
        "notebook": spec("accelerate.notebook_launcher", function=spec("os.system", _partial_=True, command=touch)),
        "own": spec("hcpdiff.checkpoint.atomic.write_atomic", path=str(marker), write=spec("os.system", _partial_=True)), "own import": spec("hcpdiff.config.build.locate", target="hubconf"),
    }


SLOTS = {"train.optimizer": ("optimizer", {"params": [torch.nn.Parameter(torch.ones(1))]}), "train.lr_scheduler": ("lr_scheduler", {}), "logger": ("logger", {}), "model.noise_scheduler": ("noise_scheduler", {})}
CARRIERS = {"optimizer": spec("torch.optim.AdamW"), "lr_scheduler": spec("torch.optim.lr_scheduler.LambdaLR"), "logger": spec("hcpdiff.loggers.FileLogger"), "noise_scheduler": spec("diffusers.DDPMScheduler")}


def placed(call: dict, slot: str) -> list[dict]:
    """The call as the object of a slot, and at every depth of one that the slot takes."""
    carrier, partial = CARRIERS[slot], {**call, "_partial_": True}
    return [call, partial, {**call, "_recursive_": False, "_convert_": "all"}, {**carrier, "lr": call}, {**carrier, "_args_": [call]}, {**carrier, "lr_lambda": partial},
            {**carrier, "name": [{"deep": [call]}]}, {**carrier, "x": {"_target_": "torch.optim.SGD", "lr": call}}]


@pytest.mark.parametrize("slot", SLOTS)
def test_no_target_runs_what_is_not_a_class_of_its_place(slot, marker):
    kind, extra = SLOTS[slot]
    for name, call in calls(marker).items():
        for hostile in placed(call, kind):
            with pytest.raises(ConfigError):
                build(hostile, kind, slot, **extra)
            assert not marker.exists(), (name, hostile)


def test_a_config_with_hostile_targets_stops_before_anything_is_imported(marker):
    for call in calls(marker).values():
        (marker.parent / "hostile.yaml").write_text(SMALL.replace("{train_epochs: 20}", json.dumps({"train_epochs": 1, "optimizer": call})), encoding="utf-8")
        write(marker.parent)
        try:
            load("hostile.yaml")
        except ConfigError:
            continue
        assert check_target(call, "optimizer", "train.optimizer")  # the package is allowed: the class is refused when it is looked at


@pytest.mark.parametrize("name, value", [("trust_remote_code", True), ("custom_pipeline", "x"), ("weights_only", False), ("pickle_module", "dill"), ("attn_implementation", "someone/kernel"),
                                         ("use_kernels", True), ("allow_all_kernels", True), ("code_revision", "x")])
def test_arguments_of_loaders_that_run_code_are_refused_at_any_depth(name, value, tiny_sd1):
    for loader in ("transformers.CLIPTextModel.from_pretrained", "diffusers.AutoencoderKL.from_pretrained"):
        for arguments in ({name: value}, {"config": {"deep": [{name: value}]}}):
            faults = components.check({"text_encoder" if "CLIP" in loader else "vae": spec(loader, pretrained_model_name_or_path=str(tiny_sd1), **arguments)}, ("text_encoder", "vae"), ())
            assert len(faults) == 1 and f"{name}" in faults[0] and "runs code from outside" in faults[0]


@pytest.mark.parametrize("text", ["${oc.env:HCP_SECRET}", "${oc.env:HCP_SECRET,x}", "$<oc.env:HCP_SECRET>", "${oc.decode:${oc.env:HCP_SECRET}}", "${env:HCP_SECRET}", "${hydra:runtime.cwd}",
                                  "${oc.${hcp.time:env}:HCP_SECRET}", "${oc.create:{_target_: os.system}}", "${hcp.eval:__import__('os').environ['HCP_SECRET']}", "${__class__}"])
def test_no_expression_reads_what_is_outside_the_config(text):
    write(Path.cwd(), SMALL + f"preview: {{prompts: [{json.dumps(text)}]}}\n")
    with pytest.raises(ConfigError) as caught:
        load("run.yaml")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", ["9**9**9", "9**9**9**9", "2**(9**9)", "(1e308*10)*0", "'x'*10**9", "'a'.upper()", "[0]*10**9", "().__class__", "open('marker','w')", "__import__('os')", "int('9'*10**6)",
                                  "lambda: 0", "x:=5", "[i for i in (1,)]", "round(1, 10**9)", "round(5, -10**9)", "min()", "max(1, '2')", "1if 1else 2", "10**18*10**18", "True+1", "f'{1}'", "1j**2"])
def test_arithmetic_is_all_that_an_expression_does(text):
    with pytest.raises(ExpressionError):
        evaluate(text)


def test_expressions_that_multiply_are_stopped():
    def fold(count, first, make):
        return "".join([f"k0: {first}\n", *(f"k{n}: {make(n)}\n" for n in range(1, count))])

    for bomb in (fold(60, "x" * 100, lambda n: f'"${{k{n - 1}}}${{k{n - 1}}}"'), fold(60, "[1, 2]", lambda n: f'["${{k{n - 1}}}", "${{k{n - 1}}}"]'),
                 "k0: &k0 [x, x, x]\n" + "".join(f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}, *k{n - 1}]\n" for n in range(1, 40)), "a: &a [*a]\n", "k: " + "[" * 5000 + "]" * 5000 + "\n",
                 fold(2, "1", lambda n: '"' + "${" * 60 + "k0" + "}" * 60 + '"')):
        write(Path.cwd(), SMALL + bomb + "preview: {neg_prompt: '${k59}'}\n")
        with pytest.raises(ConfigError):
            load("run.yaml")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch marker']", "!!python/object/apply:pathlib.Path.touch [marker]", "!!python/name:os.system ''", "!!python/module:os ''",
                                 "!!python/object/new:os.system ['touch marker']", "!!binary x", "!hostile x"])
def test_yaml_tags_construct_nothing(tag):
    write(Path.cwd(), SMALL + f"preview: {{neg_prompt: {tag}}}\n")
    with pytest.raises(ConfigError, match="tag|no YAML"):
        load("run.yaml")
    with pytest.raises(ConfigError):
        load(write(Path.cwd()), [f"logger=[{tag}]"])
    faults = []
    Path("captions.yaml").write_text(f"a.png: {tag}\n", encoding="utf-8")
    captions = load_captions("captions.yaml", "pictures", ["a.png"], "w", faults)
    assert faults or isinstance(captions.texts[0], str)


@pytest.mark.parametrize("name", ["../out.log", "a/../../out.log", "/tmp/out.log", "..", "", "x\0y", "C:\\x", "..\\x", 5, None])
def test_loggers_write_inside_the_run_folder_only(name):
    for kind, key in ((FileLogger, "name"), (TensorBoardLogger, "folder")):
        with pytest.raises(ConfigError, match="inside the run folder"):
            build(spec(f"hcpdiff.loggers.{kind.__name__}", **{key: name}), "logger", "logger[0]")


def test_a_link_in_a_strangers_run_folder_leads_no_logger_out(tmp_path):
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.log").symlink_to(tmp_path / "mine")
    (run / "tblog").symlink_to(tmp_path / "elsewhere")
    for logger in (FileLogger(), TensorBoardLogger()):
        with pytest.raises(ConfigError, match="outside the run folder"):
            logger.open(run, 0, 1)
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine" and not list((tmp_path / "elsewhere").iterdir())


def test_what_could_steer_a_terminal_is_shown_as_text():
    text = message(ConfigError(["a\x1b]0;title\x07b\x9bc", "two\nlines"]))
    assert "\x1b" not in text and "\x9b" not in text and "\\x1b]0;title\\x07b\\x9bc" in text and "two\n" in text


# -- models ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def model(tmp_path, tiny_sd1):
    """A copy of a small model, to be spoilt."""
    return Path(shutil.copytree(tiny_sd1, tmp_path / "model"))


def edit(path: Path, change) -> None:
    """Replaces a JSON file by what `change` makes of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def loaded(model: Path):
    """What training and drawing do with a base model."""
    family = detect(model)
    family.check(model)
    models = family.load(model, "model")
    family.alphas_cumprod(models)
    components.base_scheduler(models.scheduler_config)
    return models


@pytest.mark.parametrize("part, name", [("unet", "diffusion_pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")])
def test_a_models_pickles_are_read_as_tensors_or_not_at_all(model, marker, part, name):
    weights = next((model / part).glob("*.safetensors"))
    torch.save(load_file(weights), model / part / name)
    weights.unlink()
    assert loaded(model)
    for hostile in ({"a": Hostile(marker)}, Hostile(marker), {**torch.load(model / part / name, weights_only=True), "a": Hostile(marker)}):
        torch.save(hostile, model / part / name)
        with pytest.raises(ConfigError, match="pickle"):
            loaded(model)
    (model / part / name).write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(ConfigError, match="pickle"):
        loaded(model)


CODE = {"auto_map": {"AutoConfig": "hostile.Hostile", "AutoModel": "hostile.Hostile", "AutoTokenizer": ["hostile.Hostile", None]}}
EDITS = {
    "unet of another class": ("unet/config.json", {**CODE, "_class_name": "Hostile"}), "unet by file": ("unet/config.json", {**CODE, "_class_name": ["hostile", "Hostile"]}),
    "encoder": ("text_encoder/config.json", {**CODE, "model_type": "hostile", "architectures": ["Hostile"]}), "kernel": ("text_encoder/config.json", {"attn_implementation": "someone/kernel"}),
    "kernel inside": ("text_encoder/config.json", {"_attn_implementation": "someone/kernel", "_attn_implementation_internal": "someone/kernel"}),
    "tokenizer": ("tokenizer/tokenizer_config.json", {**CODE, "tokenizer_class": "Hostile"}), "scheduler": ("scheduler/scheduler_config.json", {**CODE, "_class_name": "os.system"}),
    "scheduler function": ("scheduler/scheduler_config.json", {"_class_name": "load_image"}), "index": ("model_index.json", {"unet": ["hostile", "Hostile"], "vae": ["os", "system"]}),
    "index class": ("model_index.json", {"_class_name": ["hostile", "Hostile"]}), "index name": ("model_index.json", {"_class_name": "../hostile.Hostile"}),
    "quantized": ("unet/config.json", {"quantization_config": {"quant_method": "hostile"}}), "long schedule": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**13}),
    "bad schedule": ("scheduler/scheduler_config.json", {"beta_schedule": "hostile"}), "bad vae": ("vae/config.json", {"block_out_channels": "x"}), "deep vae": ("vae/config.json", {"block_out_channels": [8] * 90}),
}


@pytest.mark.parametrize("what", EDITS)
def test_code_in_a_model_folder_never_runs(model, marker, what):
    for folder in (model, *(path for path in model.iterdir() if path.is_dir())):
        (folder / "hostile.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Hostile:\n    pass\n", encoding="utf-8")
    file, more = EDITS[what]
    edit(model / file, lambda content: {**content, **more})
    try:
        assert type(loaded(model).unet).__module__.startswith("diffusers.")
    except HCPError as error:
        assert str(model) in str(error) or "pretrained_model" in str(error)


def test_json_of_a_model_that_is_no_map_is_named(model):
    for file in ("model_index.json", "vae/config.json", "scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        kept = (model / file).read_bytes()
        for content in ("[1]", "5", "{", "[" * 100_000, "\udcff"):
            (model / file).write_bytes(content.encode("utf-8", "surrogateescape"))
            with pytest.raises(HCPError) as caught:
                loaded(model)
            assert file.split("/")[0] in str(caught.value)
        (model / file).write_bytes(kept)


def test_an_index_cannot_name_weights_outside_its_folder(model):
    for part in ("unet", "text_encoder"):
        weights = next((model / part).glob("*.safetensors"))
        for stray in ("../elsewhere.safetensors", str(model / "elsewhere.safetensors"), "a/../../x.safetensors", "..\\x"):
            index = model / part / f"{weights.name}.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": stray}}), encoding="utf-8")
            with pytest.raises(ConfigError, match="outside its folder"):
                loaded(model)
            index.unlink()


def test_an_adapter_in_a_model_folder_brings_no_other_model(model):
    (model / "text_encoder" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/else", "auto_mapping": {"parent_library": "hostile"}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="adapter_config.json"):
        loaded(model)


# -- embeddings ------------------------------------------------------------------------------------------------------------------

def legacy(value) -> bytes:
    raw = io.BytesIO()
    torch.save(value, raw, _use_new_zipfile_serialization=False)
    return raw.getvalue()


@pytest.mark.parametrize("ending", [".pt", ".bin", ".safetensors"])
def test_embeddings_run_nothing(tmp_path, marker, ending):
    path = tmp_path / f"word{ending}"
    zipped = io.BytesIO()
    torch.save({"string_to_param": {"*": Hostile(marker)}}, zipped)
    for raw in (zipped.getvalue(), pickle.dumps(Hostile(marker)), legacy({"a": Hostile(marker)}), pickle.dumps({"a": Hostile(marker)}, 0)):
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match="word"):
            embeddings.read(path)


def test_an_embedding_unfolds_to_nothing_larger_than_its_file(tmp_path):
    path = tmp_path / "word.pt"
    torch.save({"x": torch.ones(1, 1).expand(10**6, 10**6)}, path)
    with pytest.raises(CheckpointError, match="larger than the file"):
        embeddings.read(path)
    whole = io.BytesIO()
    torch.save({"x": torch.zeros(1, 4096)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="compressed archive"):
        embeddings.read(path)


@pytest.mark.parametrize("value", [torch.ones(2, 8).to_sparse(), torch.ones(2, 8, dtype=torch.complex64), torch.ones(0, 0), torch.ones(2, 8, device="meta"), torch.tensor(3.0), torch.ones(2, 8).bool(),
                                   torch.full((1, 4), torch.nan)], ids=lambda value: str(value.dtype))
def test_vectors_that_are_none_are_refused(tmp_path, value):
    torch.save({"x": value}, tmp_path / "word.pt")
    with pytest.raises(CheckpointError, match="word.pt: the vectors"):
        embeddings.read(tmp_path / "word.pt")


# -- names and paths -------------------------------------------------------------------------------------------------------------

def test_keys_of_a_caption_file_open_nothing(tmp_path):
    (tmp_path / "secret.txt").write_text(SECRET, encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    for key in ("../secret.txt", "../secret", str(tmp_path / "secret.txt"), "pictures/../../secret", "~/secret"):
        (tmp_path / "captions.json").write_text(json.dumps({key: "words", "a.png": key}), encoding="utf-8")
        faults = []
        assert load_captions("captions.json", "pictures", ["a.png"], "w", faults).texts == [key] and not faults


CONFIG = """
train: {{train_steps: 1, cpu_threads: 1, save_step: 1, optimizer: {{_target_: torch.optim.SGD}}}}
model: {{pretrained_model_name_or_path: '{model}'}}
exp_dir: '{home}/run'
lora_unet: [{{lr: 1.0, rank: 2, layers: ['re:.*mid_block.*to_k$']}}]
preview: {{prompts: [cat], every: 1, num_inference_steps: 1}}
data:
  '../../out':
    batch_size: 1
    cache_latents: disk
    cache_dir: '{home}/cache'
    source: {{'../../../out': {{img_root: '{home}/images'}}}}
    bucket: {{target_area: 4096, num_bucket: 1}}
"""


def test_what_a_run_writes_to_hand_on_names_no_path_machine_or_environment(tmp_path, model):
    """Weights, pictures, cache and TensorBoard; cfg.yaml, train.log and states are the run's own notes and may name paths. Names with '..' make no folder."""
    home = tmp_path / "home-of-someone"
    (home / "images").mkdir(parents=True)
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(home / "images" / "a.png")
    (tmp_path / "run.yaml").write_text(CONFIG.format(home=home, model=model), encoding="utf-8")
    before = set(tmp_path.rglob("*"))
    assert Run(load("run.yaml", [], RunConfig), Parallel()).train() == 0
    made = {path for path in tmp_path.rglob("*")} - before
    assert all(home in path.parents for path in made)
    own = ("cfg.yaml", "train.log", "state.json")
    shared = [path for path in made if path.is_file() and path.name not in own]
    assert {"ckpts", "previews", "tblog", "latents-1"} <= {path.parent.name for path in shared}
    for path in shared:
        for private in ("home-of-someone", str(tmp_path), SECRET, socket.gethostname()):
            assert private.encode() not in path.read_bytes(), (path.name, private)
            assert private not in path.name or private == "home-of-someone"


def test_a_picture_and_its_settings_name_no_path(tmp_path):
    from hcpdiff.vis.settings import no_paths

    (tmp_path / "x").mkdir()
    assert no_paths({"a": [str(tmp_path / "x"), "~/x", "x/../x", "name/name", "C:\\Users\\me\\x.pt", "./x"]}) == {"a": ["x", "x", "x", "name/name", "x.pt", "x"]}


def test_a_config_names_yaml_of_pictures_only_as_text():
    """Redrawing from a picture's settings evaluates nothing that stood in its prompt."""
    write(Path.cwd(), "pretrained_model: some/model\nprompt: '\\${oc.env:HCP_SECRET}'\n", "draw.yaml")
    assert load("draw.yaml", [], InferConfig).config.prompt == "${oc.env:HCP_SECRET}"
    assert yaml.safe_load(load("draw.yaml", [], InferConfig).yaml)["prompt"] == "\\${oc.env:HCP_SECRET}"

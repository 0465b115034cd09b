"""Whatever a user gives (configs, arguments, captions, templates, prompts, weights, images, model folders), what comes back is a result or an error of ours.

The suite runs the same 2,400 examples each time. `HCPDIFF_FUZZ=50 python3 tests/run.py tests/test_fuzz.py` runs fifty times as many, new ones each time.
"""

import datetime
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fuzz_help import EXPRESSIONS, KEYS, PIECES, SCALARS, TIMES, TREES, WORDS, counted, flipped, fuzz, mutated, only_ours, places, ran, spoilt
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from hcpdiff.checkpoint import format as lora_format
from hcpdiff.checkpoint import spellings
from hcpdiff.checkpoint.io import read_tensors
from hcpdiff.config.infer_schema import InferConfig
from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.config.shape import fields
from hcpdiff.data import image as pixels
from hcpdiff.data.caption import load_captions
from hcpdiff.data.dataset import build_train_data
from hcpdiff.data.template import Prompter, load_templates
from hcpdiff.families import detect
from hcpdiff.vis import embeddings, request
from hcpdiff.vis.prompt import parse, to_webui

ROOT = Path(__file__).parents[1]
NOW = datetime.datetime(2023, 7, 26)
SHIPPED = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for folder in ("cfgs", "demo") for path in sorted((ROOT / folder).rglob("*.yaml"))}
SMALL = {  # as few keys as a run needs: a mutation of it goes deeper than the first fault
    RunConfig: {"train": {"train_epochs": 1, "optimizer": {"_target_": "torch.optim.AdamW", "weight_decay": 0.1}}, "unet_lr": 1e-4, "seed": 1,
                "lora_unet": [{"lr": "${unet_lr}", "rank": 4, "layers": ["re:.*attn.?$"]}], "model": {"pretrained_model_name_or_path": "some/model", "clip_skip": 1},
                "preview": {"prompts": ["a cat"], "every": 10}, "logger": [{"_target_": "hcpdiff.loggers.ConsoleLogger"}],
                "data": {"d": {"batch_size": 2, "bucket": {"target_area": 4096, "num_bucket": 2}, "cache_latents": "none",
                               "source": {"s": {"img_root": "pictures", "caption_file": "pictures", "prompt_template": None, "word_names": {"pt1": "x"}, "repeats": 2, "bg_color": [1, 2, 3]}}}}},
    InferConfig: {"pretrained_model": "some/model", "prompt": ["a cat", "{b:1.2}"], "neg_prompt": "x", "seed": [1, 2], "bs": 1, "num": 1, "infer_args": {"width": 64, "height": 64, "num_inference_steps": 5},
                  "new_components": {"scheduler": {"_target_": "diffusers.DDIMScheduler"}}, "merge": [{"path": "a.safetensors", "alpha": 0.5}], "lora_path": None, "out_dir": "out", "emb_dir": None,
                  "save": {"image_type": "png"}, "prompt_syntax": "webui"},
}


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """A working directory with four small pictures and a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number, size in enumerate(((20, 30), (30, 20), (16, 16), (40, 9))):
        Image.new("RGB", size, (60 * number, 9, 9)).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text("a, b", encoding="utf-8")
    put("run.yaml", SMALL[RunConfig])


def put(name: str, content) -> str:
    """A file of text (YAML where it is no text); half characters stay half."""
    text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
    Path(name).write_bytes(text.encode("utf-8", "surrogatepass"))
    return name


def loads(name: str, schema: type, overrides=()):
    """The loaded config, and again from its own cfg.yaml; None after an error of ours."""
    loaded = only_ours(load, name, overrides, schema, now=NOW)
    if loaded:
        again = load(put("again.yaml", loaded.yaml), [], schema, now=NOW + datetime.timedelta(days=1))
        assert again.plain == loaded.plain or again.plain.get("exp_dir") != loaded.plain.get("exp_dir") or loaded.plain != loaded.plain  # NaN differs from itself
    return loaded


def schema_of(name: str) -> type:
    return InferConfig if "infer" in name else RunConfig


# -- configs and arguments ---------------------------------------------------------------------------------------------------------

@fuzz(80)
@given(st.data())
@counted
def test_shipped_configs_spoilt_in_their_text(data):
    name = data.draw(st.sampled_from(sorted(SHIPPED)))
    loads(put("spoilt.yaml", data.draw(spoilt(SHIPPED[name]))), schema_of(name))


@fuzz(80)
@given(st.data())
@counted
def test_shipped_configs_with_other_values(data):
    name = data.draw(st.sampled_from(sorted(SHIPPED)))
    loads(put("mutated.yaml", data.draw(mutated(yaml.safe_load(SHIPPED[name])))), schema_of(name))


@fuzz(250)
@given(st.data())
@counted
def test_small_training_configs_up_to_the_plan_of_their_images(data):
    loaded = loads(put("mutated.yaml", data.draw(mutated(SMALL[RunConfig]))), RunConfig)
    if loaded:
        only_ours(build_train_data, loaded.config.data, seed=loaded.config.seed, micro_per_step=loaded.config.train.gradient_accumulation_steps, workers=0)


@fuzz(200)
@given(st.data())
@counted
def test_small_drawing_configs_up_to_their_pictures(data):
    loaded = loads(put("mutated.yaml", data.draw(mutated(SMALL[InferConfig]))), InferConfig)
    if loaded:
        only_ours(request.read, loaded.config)


@fuzz(60)
@given(st.dictionaries(KEYS | st.sampled_from([*fields(RunConfig), *fields(InferConfig)]), TREES, max_size=4), st.sampled_from([RunConfig, InferConfig]))
@counted
def test_bases_of_any_shape(tree, schema):
    put("base.yaml", tree)
    loads(put("over.yaml", SMALL[schema] | {"_base_": ["base.yaml"]}), schema)


NAMES = st.sampled_from([".".join(map(str, path)) for schema in SMALL for path in places(SMALL[schema])] + [*fields(RunConfig), "lora_unet[0].lr", "lora_unet.9.lr", "lora_unet.-1", "a..b", ".", "+x", "~x", "data.*", "x" * 200])


@fuzz(200)
@given(st.lists(st.tuples(NAMES, st.one_of(SCALARS.map(str), EXPRESSIONS, st.text(max_size=9), st.sampled_from(["[1", "{a: ", "[1, {a: b}]", "{_target_: os.system}", "[[[", "{x: [*a]}", "!!int 3"]))), max_size=4),
       st.sampled_from([RunConfig, InferConfig]))
@counted
def test_arguments(pairs, schema):
    put("run.yaml", SMALL[schema])
    loads("run.yaml", schema, [f"{name}={value}" for name, value in pairs])


# -- texts -------------------------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "c.json": '{"0.png": "a cat, b", "pictures/1": {"caption": "a"}, "2": null}', "c.jsonl": '{"file_name": "0.png", "text": "a"}\n{"1.png": "b"}\n', "c.yaml": "0.png: a cat\n'1': {caption: b}\n2.png: 007\n",
    "c.txt": "one for all\nof them\n", "folder/0.txt": "a, b, {c}", "folder/0.caption": "x",
}


@fuzz(250)
@given(st.data())
@counted
def test_captions(data):
    name = data.draw(st.sampled_from(sorted(CAPTIONS)))
    text = data.draw(spoilt(CAPTIONS[name]) | TREES.map(lambda tree: json.dumps(tree, default=str)) | st.text(max_size=40))
    raw = data.draw(st.just(text.encode("utf-8", "surrogatepass")) | st.sampled_from(["utf-16", "gbk", "utf-8-sig", "latin-1"]).map(lambda code: text.encode(code, "replace")) | st.binary(max_size=40))
    shutil.rmtree("folder", ignore_errors=True)
    Path("folder").mkdir()
    Path(name).write_bytes(raw)
    faults = []
    captions = load_captions("folder" if "/" in name else name, "pictures", ["0.png", "1.png", "2.png", "a/3.png"], "here", faults)
    assert len(captions.texts) == 4 and all(text is None or isinstance(text, str) for text in captions.texts)
    assert all(Path(name).name in fault or "here" in fault for fault in faults)
    rng = np.random.default_rng(0)
    prompter = Prompter(tuple(load_templates(None, True, {"pt1": "x"}, "here", faults)), {"pt1": "x"}, True, 1, 0.3, 0.1, 0.1)
    for text in captions.texts:
        assert isinstance(prompter.prompt(text, rng), str) and isinstance(prompter.longest(text), str)


@fuzz(100)
@given(spoilt("a photo of {pt1}, {caption}\n{pt1} {name} - {caption}\n"), st.dictionaries(st.sampled_from(["pt1", "name", "caption", "", "a b", "{", "pt2"]), WORDS, max_size=3), st.text(max_size=20))
@counted
def test_templates(text, words, caption):
    put("template.txt", text)
    faults = []
    templates = load_templates("template.txt", True, words, "here", faults)
    assert all("template.txt" in fault or "here" in fault for fault in faults)
    if not faults:
        assert isinstance(Prompter(tuple(templates), words).prompt(caption, np.random.default_rng(0)), str)


MARKS = st.sampled_from(["(", ")", "[", "]", "{", "}", ":", "1.2", ":1.2)", "\\", "<lora:a:1>", "<lora:", ">", "BREAK", " AND ", "|", ",", "((((", "猫", "🙂", "\0", "\n", "1e999", "-", "<hypernet:x>", "<lyco:a:te=1:unet=0.5>"])


@fuzz(300)
@given(st.lists(MARKS | st.text(max_size=5), max_size=12).map("".join) | st.tuples(MARKS, st.integers(1, 3000)).map(lambda pair: pair[0] * pair[1]), st.sampled_from(["hcp", "webui", "plain"]))
@counted
def test_prompts(text, syntax):
    parsed = only_ours(parse, text, syntax)
    if parsed:
        assert all(np.isfinite(piece.weight) for piece in parsed.pieces)
        only_ours(parse, to_webui(parsed.pieces), "webui")


# -- weights -----------------------------------------------------------------------------------------------------------------------

UNET, TEXT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k", "text_model.encoder.layers.0.self_attn.q_proj"
SPELT = [
    f"unet_.{UNET}.___.layer.lora_down.weight", f"{UNET}.lora_down.weight", f"{UNET}.alpha", f"unet.{UNET}.lora_A.weight", f"base_model.model.{UNET}.lora_B.weight", f"base_model.model.{UNET}.lora_A.default.weight",
    f"unet.{UNET}.lora.down.weight", f"unet.{UNET}.processor.to_k_lora.up.weight", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.lora_up.weight", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_down.weight",
    f"text_encoder.{TEXT}.lora_A.weight", f"{TEXT}.lora_up.weight", "lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight", "lora_unet_x.hada_w1_a", "lora_unet_x.lokr_w1", "lora_unet_x.dora_scale", "lora_unet_x.diff",
    "lora_transformer_x.lora_down.weight", "diffusion_model.x.lora_A.weight", "bundle_emb.x.string_to_param.*",
]
SHAPES = st.sampled_from([(), (1,), (0,), (2, 8), (8, 2), (2, 8, 1, 1), (8, 2, 1, 1), (2, 2, 3, 3), (0, 4), (1, 1, 1, 1, 1), (3, 5)])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64])


@fuzz(250)
@given(st.dictionaries(st.sampled_from(SPELT) | st.sampled_from(SPELT).flatmap(spoilt) | st.text(max_size=9), st.tuples(SHAPES, DTYPES, st.sampled_from([1.0, 0.0, float("nan"), 1e30])), max_size=5),
       st.dictionaries(st.sampled_from(["hcpdiff.format", "hcpdiff.component", "ss_network_dim", "format", "x"]), st.text(max_size=6), max_size=2))
@counted
def test_names_and_shapes_in_lora_files(tensors, metadata):
    usable = {name.encode("utf-8", "replace").decode("utf-8"): torch.full(shape, value).to(dtype) for name, (shape, dtype, value) in tensors.items()}
    usable.pop("__metadata__", None)
    Path("x.safetensors").write_bytes(save(usable, {name.encode("utf-8", "replace").decode(): text.encode("utf-8", "replace").decode() for name, text in metadata.items()}))
    only_ours(lora_format.load_lora, "x.safetensors")


WHOLE = save({"a.lora_down.weight": torch.ones(2, 8), "a.lora_up.weight": torch.ones(8, 2), "a.alpha": torch.tensor(2.0)}, {"hcpdiff.format": "1", "hcpdiff.component": "unet"})
HEADER = json.loads(WHOLE[8:8 + int.from_bytes(WHOLE[:8], "little")])


@fuzz(250)
@given(st.one_of(mutated(HEADER, SCALARS).map(lambda header: json.dumps(header, default=str).encode()), spoilt(json.dumps(HEADER)).map(lambda text: text.encode("utf-8", "surrogatepass"))), st.integers(-9, 9), flipped(WHOLE), st.booleans())
@counted
def test_headers_of_safetensors(header, off, raw, by_bytes):
    Path("x.safetensors").write_bytes(raw if by_bytes else max(0, len(header) + off).to_bytes(8, "little") + header + WHOLE[-(16 * 2 + 1) * 4:])
    for read in (read_tensors, lora_format.load_lora, embeddings.read):
        only_ours(read, Path("x.safetensors"))


def pickled() -> bytes:
    raw = io.BytesIO()
    torch.save({"string_to_param": {"*": torch.ones(2, 8)}, "name": "x"}, raw)
    return raw.getvalue()


@fuzz(60)
@given(flipped(pickled()))
@counted
def test_pickles_of_embeddings(raw):
    Path("x.pt").write_bytes(raw)
    only_ours(embeddings.read, Path("x.pt"))


# -- images and model folders --------------------------------------------------------------------------------------------------------

def images() -> dict[str, bytes]:
    """One small image of every form, some with transparency, palette, EXIF and several frames."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {}
    for name, picture, options in (("png", rgb, {}), ("png exif", rgb, {"exif": exif}), ("png palette", rgb.convert("P"), {"transparency": 3}), ("png 16", Image.fromarray(rng.integers(0, 65535, (9, 9)).astype(np.uint16)), {}),
                                   ("jpeg", rgb, {"exif": exif}), ("jpeg cmyk", rgb.convert("CMYK"), {}), ("webp", rgb.convert("RGBA"), {"lossless": True}), ("gif", rgb, {"save_all": True, "append_images": [rgb]}),
                                   ("bmp", rgb, {}), ("avif", rgb, {})):
        file = io.BytesIO()
        picture.save(file, name.split()[0].upper(), **options)
        made[name] = file.getvalue()
    return made


IMAGES = images()


@fuzz(250)
@given(st.data())
@counted
def test_images(data):
    name = data.draw(st.sampled_from(sorted(IMAGES)))
    Path("x.img").write_bytes(data.draw(flipped(IMAGES[name])))
    for work in (pixels.read_header, pixels.verify, pixels.decode, pixels.decode_mask):
        try:
            work(Path("x.img"))
        except pixels.READ_FAULTS:
            continue


MODEL_FILES = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")


@fuzz(80)
@given(st.data())
@counted
def test_json_of_model_folders(tiny_sd1, data):
    name = data.draw(st.sampled_from(MODEL_FILES))
    if not Path("model").exists():
        shutil.copytree(tiny_sd1, "model")
    whole = (tiny_sd1 / name).read_text(encoding="utf-8")
    Path("model", name).write_bytes(data.draw(mutated(json.loads(whole)).map(lambda tree: json.dumps(tree, default=str)) | spoilt(whole)).encode("utf-8", "surrogatepass"))

    def check():
        family = detect(Path("model"))
        family.check(Path("model"))
        family.latent_geometry(Path("model"))

    only_ours(check)
    shutil.copy(tiny_sd1 / name, Path("model", name))


def test_the_suite_really_runs_its_examples():
    """Runs last in this file; not where only some of its tests were chosen."""
    fuzzed = {name for name, value in globals().items() if name.startswith("test_") and hasattr(value, "hypothesis")}
    if set(ran) != fuzzed:
        pytest.skip(f"only {len(ran)} of {len(fuzzed)} fuzz tests were chosen")
    assert sum(ran.values()) >= 2000 * TIMES, dict(ran)

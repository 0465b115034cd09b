"""LoRA files as a config names them, seeds and batches, and pictures on disk."""

import json

import pytest
from PIL import Image

from hcpdiff.checkpoint.paths import locate
from hcpdiff.config.infer_schema import InferConfig, MergeItem
from hcpdiff.config.load import load
from hcpdiff.errors import ConfigError
from hcpdiff.vis import request, save
from hcpdiff.vis.lora_files import Finder
from hcpdiff.vis.settings import Facts, describe, no_paths


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def config(tmp_path, **keys):
    return InferConfig(**{"pretrained_model": "x/y", "out_dir": str(tmp_path / "out"), "seed": 1, **keys})


def find(tmp_path, **keys):
    finder = Finder()
    found = finder.all(config(tmp_path, **keys))
    return [(s.path and s.path.name, s.path_TE and s.path_TE.name, s.text, s.strength, s.strength_TE) for s in found], finder


@pytest.fixture
def ckpts(tmp_path):
    return touch(tmp_path / "exps" / "run" / "ckpts", "unet-90.safetensors", "unet-100.safetensors", "text_encoder-100.safetensors", "unet-9.safetensors")


def test_text_encoders_file_of_that_step_is_taken_and_said(tmp_path, ckpts):
    found, finder = find(tmp_path, lora_path=str(ckpts / "unet-100.safetensors"), lora_alpha=0.8)
    assert found == [("unet-100.safetensors", "text_encoder-100.safetensors", True, 0.8, 0.8)]
    assert "text_encoder-100.safetensors lies beside" in finder.notices[0]
    assert find(tmp_path, lora_path=str(ckpts / "unet-90.safetensors"), lora_alpha_TE=0.3)[0] == [("unet-90.safetensors", None, True, 1, 0.3)]
    assert find(tmp_path, lora_path=str(ckpts / "unet-100.safetensors"), lora_path_TE=None)[0] == [("unet-100.safetensors", None, False, 1, 1)]


def test_run_folder_means_its_newest_step(tmp_path, ckpts):
    for folder in (ckpts.parent, ckpts):
        found, finder = find(tmp_path, lora_path=str(folder))
        assert found[0][:2] == ("unet-100.safetensors", "text_encoder-100.safetensors") and "newest" in finder.notices[0]


def test_a_run_folder_means_the_same_files_to_every_reader(tmp_path):
    run = touch(tmp_path / "run" / "ckpts", "unet-100.safetensors", "unet-200.safetensors", "unet-foo-300.safetensors", "text_encoder-100.safetensors").parent
    assert list(locate(run).parts) == ["unet"]
    assert find(tmp_path, lora_path=str(run))[0] == [(locate(run).parts["unet"].name, None, True, 1, 1)]
    _, finder = find(tmp_path, lora_path=str(run), lora_path_TE=str(run))  # not text_encoder-100 beside unet-200
    assert len(finder.faults) == 1 and "lora_path_TE" in finder.faults[0] and "text_encoder-100.safetensors" in finder.faults[0], finder.faults
    touch(run / "ckpts", "text_encoder-200.safetensors", "text_encoder_2-200.safetensors")
    for text in ("auto", str(run), str(run / "ckpts")):
        (source,) = Finder().all(config(tmp_path, lora_path=str(run), lora_path_TE=text))
        assert {"unet": source.path, "text_encoder": source.path_TE, "text_encoder_2": source.second_TE} == locate(run).parts


def test_a_run_of_text_encoders_alone_can_be_named_either_way(tmp_path):
    run = touch(tmp_path / "run" / "ckpts", "text_encoder-20.safetensors").parent
    assert find(tmp_path, lora_path=str(run))[0] == [("text_encoder-20.safetensors", None, True, 1, 1)]
    assert find(tmp_path, lora_path_TE=str(run))[0] == [(None, "text_encoder-20.safetensors", True, 1, 1)]


def test_missing_file_lists_the_checkpoints_beside_it(tmp_path, ckpts):
    _, finder = find(tmp_path, lora_path=str(ckpts / "unet-1000.safetensors"))
    assert "unet-9.safetensors, unet-90.safetensors, unet-100.safetensors" in finder.faults[0]
    _, finder = find(tmp_path, lora_path=str(tmp_path / "exps" / "rum" / "ckpts" / "unet-100.safetensors"))
    assert f"Runs in {tmp_path / 'exps'}: run." in finder.faults[0]
    _, finder = find(tmp_path, lora_path=str(touch(tmp_path / "empty")))
    assert "holds no weight files" in finder.faults[0]


def test_several_loras_by_lists_and_by_merge(tmp_path, ckpts):
    paths = [str(ckpts / "unet-90.safetensors"), str(ckpts / "unet-9.safetensors")]
    assert find(tmp_path, lora_path=paths, lora_alpha=[0.5, 0.7])[0] == [("unet-90.safetensors", None, True, .5, .5), ("unet-9.safetensors", None, True, .7, .7)]
    _, finder = find(tmp_path, lora_path=paths, lora_alpha=[0.5])
    assert "lora_alpha has 1 values for 2" in finder.faults[0]
    items = [MergeItem(path=paths[0], alpha=0.5, alpha_TE=0.1), MergeItem(path=paths[1], path_TE=None, layers=["re:.*to_k$"])]
    assert find(tmp_path, merge=items)[0] == [("unet-90.safetensors", None, True, .5, .1), ("unet-9.safetensors", None, False, 1, 1)]
    _, finder = find(tmp_path, lora_path=paths[0], merge=items)
    assert "the same LoRA" in finder.faults[0]
    _, finder = find(tmp_path, merge=[MergeItem()])
    assert "merge[0] names no file" in finder.faults[0]


def test_ancestors_groups_are_read(tmp_path, ckpts, monkeypatch):
    unet, text = str(ckpts / "unet-100.safetensors"), str(ckpts / "text_encoder-100.safetensors")
    merge = {"exp_dir": "2023", "group1": {"type": "unet", "base_model_alpha": 1.0, "lora": [{"path": unet, "alpha": 0.6, "layers": "all", "mask": [0, 1]}], "part": None},
             "group2": {"type": "TE", "lora": [{"path": text, "alpha": 0.4}]}}
    want = [("unet-100.safetensors", None, False, .6, .6), (None, "text_encoder-100.safetensors", True, .4, .4)]
    assert find(tmp_path, merge=merge)[0] == want
    assert find(tmp_path, merge=merge, lora_path=unet)[0] == want  # `path: ${lora_path}` is how lora_path was read then
    monkeypatch.setenv("HOME", str(ckpts))
    monkeypatch.setenv("USERPROFILE", str(ckpts))
    merge["group1"]["lora"][0]["path"] = "~/unet-100.safetensors"
    assert find(tmp_path, merge=merge)[0] == want
    bad = {"group1": {"type": "plugin", "base_model_alpha": 0.5, "part": [{"path": "x"}], "lore": [], "lora": [{"alpha": 1}, {"path": unet, "mask": [0, 0.5]}]}, "g": 3}
    _, finder = find(tmp_path, merge=bad)
    assert len(finder.faults) == 7, finder.faults


def test_webui_tags_find_their_files(tmp_path, ckpts):
    touch(tmp_path / "loras" / "sub", "style.safetensors")
    keys = dict(prompt="a <lora:style:0.5:0.7>", prompt_syntax="webui", lora_dir=str(tmp_path / "loras"))
    assert [(s.path.name, s.strength, s.strength_TE) for s in request.read(config(tmp_path, **keys)).loras] == [("style.safetensors", 0.7, 0.5)]
    for change, words in (({"lora_dir": None}, "needs lora_dir"), ({"prompt": "<lora:other>"}, "is not in lora_dir"), ({"prompt": ["a", "<lora:style>"]}, "different")):
        with pytest.raises(ConfigError, match=words):
            request.read(config(tmp_path, **{**keys, **change}))


def seeds(tmp_path, **keys):
    return [(p.prompt, p.seed) for p in request.read(config(tmp_path, **keys)).pictures]


def test_picture_i_has_seed_plus_i(tmp_path):
    assert seeds(tmp_path, seed=0, bs=2, num=2) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert seeds(tmp_path, seed=[5, 3, 9], bs=2) == [(0, 5), (0, 3), (0, 9)]
    assert seeds(tmp_path, seed=7, num=2, prompt=["a", "b"]) == [(0, 7), (0, 8), (1, 7), (1, 8)]
    with pytest.raises(ConfigError, match="list of 3"):
        seeds(tmp_path, seed=[1, 2, 3], num=2)


def test_random_seed_is_said_and_draws_again(tmp_path):
    made = request.read(config(tmp_path, seed=None, num=2))
    first = made.pictures[0].seed
    assert made.pictures[1].seed == first + 1 and f"took {first}" in made.notices[0]


def test_batches_hold_one_length_and_at_most_bs():
    pictures = [request.Picture(n, n // 3, n) for n in range(9)]
    cut = request.batches(pictures, [1, 2, 2], 4)
    assert [[p.index for p in batch] for batch in cut] == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]


def test_prompts_come_from_a_file(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\n\r\n一只狗\r\n".encode())
    made = request.read(config(tmp_path, prompt_file=str(tmp_path / "p.txt"), neg_prompt=["x", "y"]))
    assert made.texts == ("a cat", "一只狗") and made.neg_texts == ("x", "y")


def test_all_faults_come_in_one_message(tmp_path):
    touch(tmp_path, "file")
    keys = dict(prompt=["{a", "b}"], neg_prompt=["x", "y", "z"], lora_path="nope.safetensors", emb_dir=str(tmp_path / "no"), seed=[1, 2], num=3,
                infer_args={"prompt": "x", "width": 0, "guidance_scale": "high"}, out_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError) as error:
        request.read(config(tmp_path, **keys))
    for part in ("prompt[0], character 1", "prompt[1], character 2", "neg_prompt has 3", "lora_path = 'nope.safetensors'", "emb_dir", "seed is a list of 2",
                 "infer_args.prompt", "infer_args.width = 0", "infer_args.guidance_scale = 'high'", "out_dir"):
        assert any(part in fault for fault in error.value.faults), part


SETTINGS = save.Settings("a (cat:1.2), 猫\nSteps: 4", {"prompt": "a {cat:1.2}, 猫", "seed": 7}, "prompt: a\n")


@pytest.mark.parametrize("kind, suffix", [("png", ".png"), ("webp", ".webp"), ("jpg", ".jpg"), ("jpeg", ".jpg")])
def test_settings_inside_a_picture_are_read_back(tmp_path, kind, suffix):
    path = save.save(Image.new("RGB", (16, 8), "red"), tmp_path, 7, SETTINGS, kind)
    assert path.name == f"00000-7{suffix}" and Image.open(path).size == (16, 8)
    assert save.read_settings(path) == (SETTINGS.text, SETTINGS.inside)
    assert path.with_suffix(".yaml").read_text(encoding="utf-8") == SETTINGS.beside


def test_webp_of_quality_100_is_lossless(tmp_path):
    noise = Image.frombytes("RGB", (16, 16), bytes(range(256)) * 3)
    path = save.save(noise, tmp_path, 1, SETTINGS, "webp", 100)
    assert Image.open(path).convert("RGB").tobytes() == noise.tobytes()


def test_settings_go_where_they_are_asked(tmp_path):
    for n, where in enumerate(("inside", "beside", "none")):
        path = save.save(Image.new("RGB", (8, 8)), tmp_path, 1, SETTINGS, where=where)
        assert path.name == f"0000{n}-1.png"
        assert (save.read_settings(path)[0] is not None, path.with_suffix(".yaml").exists()) == (where == "inside", where == "beside")


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path):
    touch(tmp_path, "00006-1.yaml", "notes.txt", "x-1.png")
    names = [save.save(Image.new("RGB", (8, 8)), tmp_path, 1, SETTINGS, where="none").name for _ in range(2)]
    assert names == ["00007-1.png", "00008-1.png"]
    assert not save.claim(tmp_path / "00007-1.png", b"other") and Image.open(tmp_path / "00007-1.png").size == (8, 8)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_folder_that_cannot_be_written_is_a_users_mistake(tmp_path):
    touch(tmp_path, "file")
    assert save.check_folder(tmp_path / "file" / "out")[0].endswith(f"{tmp_path / 'file'} is no folder.")
    assert save.check_folder(tmp_path / "new" / "out") == [] and not (tmp_path / "new").exists()  # trying leaves nothing
    with pytest.raises(ConfigError, match="cannot be written"):
        save.save(Image.new("RGB", (8, 8)), tmp_path / "file" / "out", 1, SETTINGS)


def test_settings_tell_the_picture_and_no_local_path(tmp_path, ckpts):
    made = request.read(config(tmp_path, prompt="a {cat:1.2} (x)", neg_prompt="bad", lora_path=str(ckpts / "unet-90.safetensors"), lora_alpha=0.8, clip_skip=1,
                               new_components={"vae": {"_target_": "diffusers.AutoencoderKL.from_pretrained", "pretrained_model_name_or_path": str(tmp_path)}}))
    facts = Facts("model", "sd_v1", 64, 96, 25, 7.5, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "algorithm_type": "dpmsolver++"}, "fp32")
    told = describe(made, made.pictures[0], facts)
    assert told.text == ("a (cat:1.2) \\(x\\) <lora:unet-90:0.8>\nNegative prompt: bad\nSteps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, "
                         "Seed: 1, Size: 64x96, Model: model, Clip skip: 2, Version: hcpdiff " + told.inside["version"])
    assert str(tmp_path) not in json.dumps(told.inside) and str(tmp_path) in told.beside
    assert no_paths({"a": ["org/name", "C:\\x\\y.vae", 3]}) == {"a": ["org/name", "y.vae", 3]}


@pytest.mark.parametrize("prompt", ["a ${5} ${seed}", "$<x> \\{a\\} {b:1.2}", "null", "007", "a: b # c", "猫, 'x' \"y\"", " two  spaces ", "[a, b]", "line\nline"])
def test_config_beside_a_picture_means_the_same(tmp_path, prompt, ckpts):
    cfg = config(tmp_path, prompt=["x", prompt], lora_path=str(ckpts.parent), merge=[MergeItem(path=str(ckpts / "unet-9.safetensors"), alpha=0.5)])
    made = request.read(cfg)
    facts = Facts("model", "sd_v1", 64, 96, 25, 7.5, "DDIMScheduler", {}, "fp32")
    (tmp_path / "again.yaml").write_text(describe(made, made.pictures[-1], facts).beside, encoding="utf-8")
    again = request.read(load(str(tmp_path / "again.yaml"), [], InferConfig).config)
    assert (again.texts, again.neg_texts, [p.seed for p in again.pictures]) == ((prompt,), ("",), [1])
    assert [(s.path, s.path_TE, s.strength) for s in again.loras] == [(s.path, s.path_TE, s.strength) for s in made.loras]
    assert again.cfg.infer_args == {"num_inference_steps": 25, "guidance_scale": 7.5, "width": 64, "height": 96}


@pytest.fixture
def both(tmp_path):
    return touch(tmp_path / "xl" / "ckpts", "unet-7.safetensors", "text_encoder-7.safetensors", "text_encoder_2-7.safetensors", "text_encoder-9.safetensors")


def texts(tmp_path, **keys):
    finder = Finder()
    (source,) = finder.all(config(tmp_path, **keys))
    return [path.name for path in source.text_files], finder.notices


def test_files_of_two_text_encoders_are_taken_together(tmp_path, both):
    first, second = (str(both / f"{stem}-7.safetensors") for stem in ("text_encoder", "text_encoder_2"))
    unet, names = str(both / "unet-7.safetensors"), ["text_encoder-7.safetensors", "text_encoder_2-7.safetensors"]
    assert texts(tmp_path, lora_path=unet)[0] == texts(tmp_path, lora_path=unet, lora_path_TE=[first, second])[0] == names
    assert texts(tmp_path, merge=[MergeItem(path=unet, path_TE=[first, second])])[0] == names
    assert texts(tmp_path, lora_path=unet)[1] == [f"lora_path_TE = auto: {first} and {second} lie beside and are used too (null leaves them out)."]
    assert texts(tmp_path, lora_path=unet, lora_path_TE=None) == ([], [])
    one, notices = texts(tmp_path, lora_path=unet, lora_path_TE=second)
    assert one == names[1:] and "text_encoder-7.safetensors lies beside text_encoder_2-7.safetensors and is not used" in notices[0]
    (both / "text_encoder-9.safetensors").unlink()
    assert texts(tmp_path, lora_path=unet, lora_path_TE=str(both.parent))[0] == names  # a run folder is all of its step
    finder = Finder()
    finder.all(config(tmp_path, merge=[MergeItem(path=unet, path_TE=[first, second, unet])]))
    assert "at most two text encoders" in finder.faults[0]


def test_a_folder_of_diffusers_or_peft_stands_for_its_parts(tmp_path):
    def found(folder, **keys):
        finder = Finder()
        (source,) = finder.all(config(tmp_path, lora_path=str(folder), **keys))
        assert finder.faults == []
        return source

    whole = touch(tmp_path / "d", "pytorch_lora_weights.safetensors") / "pytorch_lora_weights.safetensors"
    assert (found(tmp_path / "d").path, found(tmp_path / "d").text_files) == (whole, ())
    parts = {stem: touch(tmp_path / "p" / stem, "adapter_model.safetensors") / "adapter_model.safetensors" for stem in ("unet", "text_encoder", "text_encoder_2")}
    source = found(tmp_path / "p")
    assert source.path == parts["unet"] and source.text_files == (parts["text_encoder"], parts["text_encoder_2"])
    assert found(tmp_path / "p", lora_path_TE=None).text_files == () and found(tmp_path / "p", lora_path_TE=str(parts["text_encoder_2"])).text_files == (parts["text_encoder_2"],)

"""Captions reach their images from every form of file, and what does not fit is named."""

import json

import pytest

from hcpdiff.data.caption import check_caption_file, load_captions


def texts(caption_file, keys, root="imgs"):
    faults = []
    captions = load_captions(str(caption_file), root, keys, "data.d.source.s", faults)
    assert not faults
    return captions.texts


def faults_of(caption_file, keys, root="imgs"):
    faults = []
    load_captions(str(caption_file), root, keys, "data.d.source.s", faults)
    return faults


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


FORMS = {
    "json by stem": ("c.json", '{"1": "one", "2": "two"}'),
    "json by file name": ("c.json", '{"1.png": "one", "2.jpg": "two"}'),
    "json with BOM": ("c.json", '\ufeff{"1": "one", "2": "two"}'),
    "json below img_root as written": ("c.json", '{"imgs/1.png": "one", "./2": "two"}'),
    "json of maps": ("c.json", '{"1": {"caption": "one"}, "2": {"text": "two"}}'),
    "json list of records": ("c.json", '[{"file_name": "1.png", "text": "one"}, {"file_name": "2.jpg", "text": "two"}]'),
    "jsonl of records": ("c.jsonl", '{"file_name": "1.png", "text": "one"}\n\n{"image": "2.jpg", "caption": "two"}\n'),
    "jsonl of pairs": ("c.jsonl", '{"1": "one"}\n{"2": "two"}'),
    "jsonl with CRLF": ("c.jsonl", '{"1": "one"}\r\n{"2": "two"}\r\n'),
    "yaml": ("c.yaml", "1: one\n2: two\n"),
    "yml with BOM and CRLF": ("c.yml", "\ufeff1: one\r\n2: two\r\n"),
    "yaml list": ("c.yaml", "- {file_name: 1.png, text: one}\n- {file_name: 2.jpg, text: two}\n"),
    "windows paths": ("c.json", json.dumps({".\\1.png": "one", "imgs\\2.jpg": "two"})),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_table_gives_the_same_captions(tmp_path, form):
    name, text = FORMS[form]
    assert texts(write(tmp_path / name, text), ["1.png", "2.jpg"]) == ["one", "two"]


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_stands_for_its_one_table(tmp_path, form):
    name, text = FORMS[form]
    write(tmp_path / name, text)
    write(tmp_path / "README.txt", "not a caption")
    assert texts(tmp_path, ["1.png", "2.jpg"]) == ["one", "two"]


def test_text_files_are_found_beside_and_below(tmp_path):
    write(tmp_path / "1.txt", "one,\n  second line \n\n")
    write(tmp_path / "a/1.txt", "\ufeffanother one")
    write(tmp_path / "b/3.caption", "three")
    write(tmp_path / "5.txt", "")
    assert texts(tmp_path, ["1.png", "a/1.png", "3.png", "4.png", "5.png"]) == ["one, second line", "another one", "three", None, ""]


def test_a_flat_caption_folder_serves_images_in_folders(tmp_path):
    write(tmp_path / "1.txt", "one")
    assert texts(tmp_path, ["deep/1.png", "deep/2.png"]) == ["one", None]


def test_one_text_file_serves_all_images(tmp_path):
    assert texts(write(tmp_path / "all.txt", "a cat\n"), ["1.png", "2.png"]) == ["a cat", "a cat"]


def test_yaml_scalars_stay_the_text_that_was_written(tmp_path):
    path = write(tmp_path / "c.yaml", "01: no\n1: 12:30\n1.50: null\n2e3: 0x10\nyes: ~\n")
    assert texts(path, ["01.png", "1.png", "1.50.png", "2e3.png", "yes.png"]) == ["no", "12:30", "null", "0x10", "~"]


def test_json_numbers_keep_their_spelling(tmp_path):
    assert texts(write(tmp_path / "c.json", '{"1": 1.50, "2": 7}'), ["1.png", "2.png"]) == ["1.50", "7"]


def test_images_of_one_stem_are_told_apart_by_ending_or_folder(tmp_path):
    path = write(tmp_path / "c.json", '{"a.png": "png", "a.jpg": "jpg", "x/b": "x", "y/b.png": "y"}')
    assert texts(path, ["a.png", "a.jpg", "x/b.png", "y/b.png"]) == ["png", "jpg", "x", "y"]


def test_text_files_with_the_images_ending_in_their_name_tell_images_of_one_stem_apart(tmp_path):
    write(tmp_path / "a.png.txt", "png")
    write(tmp_path / "a.jpg.txt", "jpg")
    assert texts(tmp_path, ["a.png", "a.jpg"]) == ["png", "jpg"]


def test_the_exact_path_wins_over_the_bare_stem(tmp_path):
    path = write(tmp_path / "c.json", '{"b": "top", "x/b": "inner"}')
    assert texts(path, ["b.png", "x/b.png"]) == ["top", "inner"]


def test_a_bare_stem_that_fits_images_in_two_folders_is_an_error(tmp_path):
    [fault] = faults_of(write(tmp_path / "c.json", '{"b": "which"}'), ["x/b.png", "y/b.png"])
    assert "'b' fits 2 images: x/b.png, y/b.png" in fault


def test_stems_with_dots_and_unicode_work(tmp_path):
    path = write(tmp_path / "c.json", json.dumps({"v1.2.final": "dots", "猫 1": "cat", "e\u0301": "decomposed", "😀": "smile"}))
    assert texts(path, ["v1.2.final.png", "猫 1.png", "\u00e9.jpg", "😀.webp"]) == ["dots", "cat", "decomposed", "smile"]


BAD = {
    "missing comma": ("c.json", '{\n  "1": "a"\n  "2": "b"\n}', ["c.json: line 3 column 3", "comma"]),
    "comma too many": ("c.json", '{"1": "a",}', ["line 1 column 11", "comma too many"]),
    "single quotes": ("c.json", "{'1': 'a'}", ["line 1 column 2", "double quotes"]),
    "cut off": ("c.json", '{"1": "a"', ["line 1 column 10", "too early"]),
    "lines in a json": ("c.json", '{"1": "a"}\n{"2": "b"}', ["line 2 column 1", ".jsonl"]),
    "jsonl fault": ("c.jsonl", '{"1": "a"}\n{"2": b}', ["line 2 column 7"]),
    "twice in json": ("c.json", '{"1": "a", "1": "b"}', ["'1'", "twice"]),
    "twice in jsonl": ("c.jsonl", '{"1": "a"}\n{"1": "b"}', ["line 2", "'1'", "twice"]),
    "twice in yaml": ("c.yaml", "1: a\n1: b\n", ["line 2", "'1'", "twice"]),
    "list caption": ("c.json", '{"1": ["a", "b"]}', ["'1'", "text", "list"]),
    "true": ("c.json", '{"1": true}', ["'1'", "true or false"]),
    "number alone": ("c.json", "5", ["expected", "text"]),
    "yaml colon": ("c.yaml", "1: a: b\n", ["line 1 column 5"]),
    "yaml tab": ("c.yaml", "1: a\n\t2: b\n", ["line 2 column 1"]),
    "yaml list caption": ("c.yaml", "1: [a, b]\n", ["line 1", "'1'", "list"]),
    "yaml scalar": ("c.yaml", "just words", ["line 1", "image: caption"]),
    "other ending": ("c.csv", "1,a", [".json", ".yaml"]),
    "record without text": ("c.jsonl", '{"file_name": "1.png", "label": {"a": 1}}', ["line 1", "'label'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_faults_name_file_line_and_column(tmp_path, case):
    name, text, parts = BAD[case]
    path = write(tmp_path / name, text)
    [fault] = faults_of(path, ["1.png", "2.png"])
    assert str(path) in fault and all(part in fault for part in parts), fault
    assert check_caption_file(str(path), "data.d.source.s") == [fault]


def test_several_tables_in_a_folder_are_listed(tmp_path):
    write(tmp_path / "a.json", "{}")
    write(tmp_path / "b.yaml", "")
    [fault] = faults_of(tmp_path, ["1.png"])
    assert "a.json, b.yaml" in fault


@pytest.mark.parametrize("raw, part", [("标注".encode("gbk"), "not UTF-8"), ("a".encode("utf-16"), "UTF-16")])
def test_a_text_that_is_not_utf8_is_named(tmp_path, raw, part):
    (tmp_path / "1.txt").write_bytes(b"ok\n" + raw if part == "not UTF-8" else raw)
    [fault] = faults_of(tmp_path, ["1.png"])
    assert "1.txt" in fault and part in fault
    assert part == "UTF-16" or "line 2" in fault


def test_deep_nesting_is_a_fault_and_no_crash(tmp_path):
    assert "nested" in faults_of(write(tmp_path / "c.json", "[" * 100_000), ["1.png"])[0]


def test_a_missing_caption_file_is_a_fault(tmp_path):
    [fault] = check_caption_file(str(tmp_path / "none.json"), "data.d.source.s")
    assert fault.startswith("data.d.source.s.caption_file") and "none.json" in fault


def test_unused_captions_and_near_misses_are_named(tmp_path):
    path = write(tmp_path / "c.json", '{"001": "one", "Cat.PNG": "cat", "3": "three"}')
    faults = []
    captions = load_captions(str(path), "imgs", ["1.png", "cat.png", "3.png"], "w", faults)
    assert captions.texts == [None, None, "three"] and captions.found == 1
    assert "'001'" in captions.notices[0] and "'Cat.PNG'" in captions.notices[0]
    assert "'1.png' ~ '001'" in captions.notices[1] and "'cat.png' ~ 'Cat.PNG'" in captions.notices[1]

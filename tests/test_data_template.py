"""Templates, trigger words and caption transforms give exactly the prompts that the guide promises."""

import pytest

from hcpdiff.data.template import Prompter, default_template, load_templates, parse
from hcpdiff.randomness import generator

WORDS = {"pt1": "pt-cat1", "class": "cat"}


def prompt(line, caption, words=WORDS, rng=None, **settings):
    return Prompter((parse(line),), words, **settings).prompt(caption, rng)


@pytest.mark.parametrize("line, caption, expected", [
    ("{pt1}, {caption}", "a cat", "pt-cat1, a cat"),
    ("{pt1}, {caption}", "", "pt-cat1"),
    ("{pt1}, {caption}", None, "pt-cat1"),
    ("{caption}, {pt1}", "", "pt-cat1"),
    ("a, {caption}, b", "", "a, b"),
    ("a, {caption}, b", "x", "a, x, b"),
    ("a photo of {pt1} {caption}", "", "a photo of pt-cat1"),
    ("a photo of {pt1} {caption} in a box", "", "a photo of pt-cat1 in a box"),
    ("{pt1}: {caption}", "", "pt-cat1"),
    ("{pt1} - {caption}", "", "pt-cat1"),
    ("{pt1}，{caption}", "", "pt-cat1"),
    ("A photo. {caption}", "", "A photo."),
    ("{caption}", "", ""),
    ("{pt1}, {caption}", "pt-cat1, a cat", "pt-cat1, a cat"),
    ("{pt1}, {caption}", "PT-Cat1 , a cat", "pt-cat1, a cat"),
    ("{pt1}, {caption}", "pt-cat1", "pt-cat1"),
    ("{pt1}, {caption}", "pt-cat10, a cat", "pt-cat1, pt-cat10, a cat"),
    ("{pt1}, {caption}", "pt-cat1 sits", "pt-cat1, sits"),
    ("a photo of {pt1}, {caption}", "pt-cat1, a cat", "a photo of pt-cat1, a cat"),
    ("{caption}", "pt-cat1, a cat", "pt-cat1, a cat"),
    ("{pt1}, {caption}", "a {cat:1.2} and {pt1} }", "pt-cat1, a {cat:1.2} and {pt1} }"),
    (r"\{{class}\}, {caption}", "x", "{cat}, x"),
])
def test_template_table(line, caption, expected):
    assert prompt(line, caption) == expected


@pytest.mark.parametrize("captions, words, expected", [
    (True, WORDS, "pt-cat1, a cat"), (True, {}, "a cat"), (False, WORDS, "pt-cat1"), (False, {}, ""),
])
def test_the_default_template_trains_trigger_word_and_caption(captions, words, expected):
    assert Prompter((default_template(captions, words),), words).prompt("a cat" if captions else None, None) == expected


def test_a_word_with_braces_is_plain_text():
    assert prompt("{pt1}, {caption}", "x", {"pt1": "{caption}"}) == "{caption}, x"


def test_each_line_is_a_choice_and_all_are_drawn(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\ufeffa {pt1}\n\n  b {pt1} \r\nc {pt1}", encoding="utf-8")
    faults = []
    prompter = Prompter(tuple(load_templates(str(path), True, WORDS, "w", faults)), WORDS)
    drawn = {prompter.prompt("x", generator(1, "prompt", n)) for n in range(60)}
    assert not faults and drawn == {"a pt-cat1", "b pt-cat1", "c pt-cat1"}


def test_all_names_without_a_word_are_listed(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("{pt1} {pt2}\n{cat:1.2}\n{pt2}", encoding="utf-8")
    faults = []
    load_templates(str(path), True, WORDS, "data.d.source.s", faults)
    assert len(faults) == 2
    assert "{pt2} in line 1, 3" in faults[0] and "data.d.source.s.word_names.pt2" in faults[0] and "{cat:1.2} in line 2" in faults[1]


@pytest.mark.parametrize("text, part", [("a {pt1", "line 1: the brace '{' in column 3"), ("ok\na } b", "line 2: the brace '}' in column 3"), ("\n \n", "empty"), (None, "cannot be read")])
def test_a_template_that_does_not_parse_is_a_fault(tmp_path, text, part):
    path = tmp_path / "t.txt"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    faults = []
    load_templates(str(path), True, WORDS, "w", faults)
    assert len(faults) == 1 and part in faults[0]


CAPTION = "first, second, t1, t2, t3, t4, t5, t6"


def drawn(count=200, **settings):
    return [prompt("{pt1}, {caption}", CAPTION, rng=generator(3, "prompt", n), **settings).split(", ")[1:] for n in range(count)]


def test_shuffle_keeps_the_leading_tags_and_loses_none():
    found = drawn(tag_shuffle=True, keep_tokens=2)
    assert all(tags[:2] == ["first", "second"] and sorted(tags) == sorted(CAPTION.split(", ")) for tags in found)
    assert len({tuple(tags) for tags in found}) > 150


def test_a_trigger_word_that_leads_the_caption_counts_as_a_kept_tag():
    found = {prompt("{pt1}, {caption}", "pt-cat1, a, b, c", rng=generator(3, "prompt", n), tag_shuffle=True, keep_tokens=2) for n in range(50)}
    assert found == {"pt-cat1, a, b, c", "pt-cat1, a, c, b"}


def test_tag_dropout_drops_its_share_and_keeps_order():
    found = drawn(tag_dropout=0.3, keep_tokens=1)
    assert all(tags[0] == "first" and tags == [tag for tag in CAPTION.split(", ") if tag in tags] for tags in found)
    assert sum(map(len, found)) / len(found) == pytest.approx(1 + 7 * 0.7, abs=0.3)


def test_caption_dropout_keeps_the_trigger_word_and_prompt_dropout_nothing():
    prompts = [prompt("{pt1}, {caption}", "a cat", rng=generator(4, "prompt", n), caption_dropout=0.5, prompt_dropout=0.25) for n in range(400)]
    share = {text: prompts.count(text) / 400 for text in set(prompts)}
    assert set(share) == {"", "pt-cat1", "pt-cat1, a cat"}
    assert share[""] == pytest.approx(0.25, abs=0.07) and share["pt-cat1"] == pytest.approx(0.375, abs=0.07)


def test_the_longest_prompt_is_that_of_the_wordiest_template_with_a_caption():
    templates = tuple(map(parse, ("{caption}", "a very long line of words without it", "a photo of {pt1}, {caption}")))
    assert Prompter(templates, WORDS, prompt_dropout=1.0, tag_dropout=1.0).longest("x, y") == "a photo of pt-cat1, x, y"

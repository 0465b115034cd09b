"""The prompt's two syntaxes: what they mean, and what they refuse."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcpdiff.errors import ConfigError
from hcpdiff.vis.prompt import parse, to_webui


def read(prompt, syntax="hcp"):
    return [(p.text, round(p.weight, 6)) for p in parse(prompt, syntax).pieces if not p.breaks]


@pytest.mark.parametrize("prompt, pieces", [
    ("", []),
    ("a cat", [("a cat", 1)]),
    ("a {cat} running {in the {city}:1.2}", [("a ", 1), ("cat", 1.1), (" running ", 1), ("in the ", 1.2), ("city", 1.32)]),
    ("{surtr_arknights-1000:1.2}", [("surtr_arknights-1000", 1.2)]),
    ("{a: b}", [("a: b", 1.1)]),
    ("{a:b:0.5}", [("a:b", 0.5)]),
    ("{a: .5 }", [("a", 0.5)]),
    ("{a:-1}", [("a", -1)]),
    ("{a:0}", [("a", 0)]),
    ("{{a}:2}", [("a", 2.2)]),
    ("{x {y:2}}", [("x ", 1.1), ("y", 2.2)]),
    ("{a:{b}}", [("a:", 1.1), ("b", 1.21)]),
    (r"\{a\} \: \\ \(", [(r"{a} : \ \(", 1)]),
    (r"{12\:30}", [("12:30", 1.1)]),
    ("12:30 a: b", [("12:30 a: b", 1)]),
    ("{猫:1.3}，狗", [("猫", 1.3), ("，狗", 1)]),
])
def test_braces_mean_weights(prompt, pieces):
    assert read(prompt) == pieces


@pytest.mark.parametrize("prompt, places", [
    ("a {cat", [3]), ("cat}", [4]), ("{a {b}", [1]), ("{a:}", [1]), ("{a:1.2.3}", [1]), ("{at 12:30}", [1]), ("x {}", [3]), ("{ :1.2}", [1]), ("} {a:99} {", [1, 3, 10]),
])
def test_what_does_not_parse_is_pointed_at(prompt, places):
    with pytest.raises(ConfigError) as error:
        parse(prompt)
    found = sorted(int(re.match(r"prompt, character (\d+):", fault).group(1)) for fault in error.value.faults)
    assert found == places
    for fault in error.value.faults:  # the caret stands below the place
        _, line, caret, _ = fault.split("\n")
        assert line[caret.index("^")] == prompt[int(re.search(r"\d+", fault).group()) - 1]


def test_caret_allows_for_wide_characters_and_long_prompts():
    with pytest.raises(ConfigError) as error:
        parse("猫" * 100 + "{狗")
    _, line, caret, _ = error.value.faults[0].split("\n")
    assert caret.index("^") == 4 + 1 + 2 * 40 and line.strip() == "…" + "猫" * 40 + "{狗"


TEXT = st.text(alphabet="ab{}:\\1. 猫()[]<>", max_size=20)


@given(TEXT)
def test_any_text_parses_or_is_a_users_mistake(text):
    for syntax in ("hcp", "webui", "plain"):
        try:
            parse(text, syntax)
        except ConfigError as error:
            assert error.faults


@given(st.text(max_size=30))
def test_escaped_text_comes_out_as_it_was(text):
    escaped = re.sub(r"([{}:\\])", r"\\\1", text)
    assert parse(escaped).text == text and all(p.weight == 1 for p in parse(escaped).pieces)
    assert parse(text, "plain").text == text


WEIGHTS = st.integers(-40, 40).map(lambda n: n / 10)
LEAF = st.text(alphabet="abc 猫", min_size=1, max_size=5).filter(str.strip).map(lambda t: (t, None))
TREE = st.recursive(LEAF, lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.none() | WEIGHTS), max_leaves=8)


def written(node):
    content, weight = node
    if isinstance(content, str):
        return content
    return "{" + "".join(map(written, content)) + ("" if weight is None else f":{weight}") + "}"


def meant(node, outer=1.0):
    content, weight = node
    if isinstance(content, str):
        return [(c, outer) for c in content]
    return [pair for child in content for pair in meant(child, outer * (1.1 if weight is None else weight))]


@settings(deadline=None)
@given(st.lists(TREE, max_size=4))
def test_nested_weights_multiply(nodes):
    got = [(c, p.weight) for p in parse("".join(map(written, nodes))).pieces for c in p.text]
    want = [pair for node in nodes for pair in meant(node)]
    assert [c for c, _ in got] == [c for c, _ in want]
    assert [w for _, w in got] == pytest.approx([w for _, w in want])


@given(st.lists(TREE, max_size=4))
def test_prompt_in_webuis_spelling_means_the_same(nodes):
    ours = parse("".join(map(written, nodes)))
    theirs = parse(to_webui(ours.pieces), "webui")

    def weighted(pieces):
        return [(c, p.weight) for p in pieces for c in p.text if c != " "]

    got, want = weighted(theirs.pieces), weighted(ours.pieces)
    assert [c for c, _ in got] == [c for c, _ in want] and [w for _, w in got] == pytest.approx([w for _, w in want], abs=1e-4)


@pytest.mark.parametrize("prompt, pieces", [  # as AUTOMATIC1111 documents it
    ("normal text", [("normal text", 1)]),
    ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    ("a ((b:1.5)) [c] )", [("a ", 1), ("b", 1.65), (" ", 1), ("c", 0.909091), (" )", 1)]),
    ("[(a:1.2) b]", [("a", 1.090909), (" b", 0.909091)]),
    ("{a:1.2}", [("{a:1.2}", 1)]),
])
def test_webui_syntax(prompt, pieces):
    assert read(prompt, "webui") == pieces


def test_webui_tags_and_breaks():
    parsed = parse("a BREAK b <lora:one:0.8> <lora:two:0.5:1> <lyco:three:te=0.1:unet=0.2><lora:four>", "webui")
    assert [(p.text.strip(), p.breaks) for p in parsed.pieces] == [("a", False), ("", True), ("b", False)]
    assert [(t.name, t.text_strength, t.strength) for t in parsed.loras] == [("one", .8, .8), ("two", .5, 1), ("three", .1, .2), ("four", 1, 1)]


@pytest.mark.parametrize("prompt", ["[a:b:0.5]", "[a|b]", "a AND b", "<hypernet:x:1>", "<lora::1>", "<lora:a:b>"])
def test_webui_syntax_that_is_not_read_is_refused(prompt):
    with pytest.raises(ConfigError, match="character 1|character 3"):
        parse(prompt, "webui")


@pytest.mark.parametrize("prompt, mark", [
    ("a (cat:1.2)", "(cat:1.2)"), ("((cat))", "((cat))"), ("<lora:x:0.8>", "<lora:x:0.8>"), ("a BREAK b", "BREAK"), ("[a|b]", "[a|b]"), (r"x \(y\)", r"\("),
    ("{猫：1.2}", "half-width"),
])
def test_webuis_habits_are_named_in_a_warning(prompt, mark):
    assert any(mark in notice for notice in parse(prompt).notices)
    assert parse("a cat (black), [old], 1:2").notices == ()

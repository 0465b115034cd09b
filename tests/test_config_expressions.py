"""hcp.eval is arithmetic and nothing else; the scan of brackets and escapes is exact."""

import datetime
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcpdiff.config import expressions
from hcpdiff.config.expressions import Expression, ExpressionError, escape, evaluate, format_time, parse, times


@pytest.mark.parametrize("text, value", [("512*768", 393216), ("(1+2)*-3", -9), ("7//2 + 7%2", 4), ("2**10", 1024), ("2**-1", 0.5), ("max(1, 2, min(3, 4))", 3), ("round(2.55, 1)", 2.5),
                                         ("round(2.5)", 2), ("int(sqrt(16))", 4), ("float(3)/2", 1.5), ("1e3", 1000.0), (" 1 ", 1), ("-2**2", -4)])
def test_arithmetic_gives_what_python_gives(text, value):
    assert evaluate(text) == value and type(evaluate(text)) is type(value)


@pytest.mark.parametrize("text", ["__import__('os')", "a", "'a'*9", "[1]*9", "True", "1 if 1 else 2", "lambda: 1", "(1).real", "max", "open(1)", "1<2", "1 or 2", "{1}", "f'{1}'", "max(*[1])", "max(a=1)",
                                  "min()", "9**9**9", "10**19", "1e400", "1j", "1/0", "0**-1", "(-8)**(1/3)", "sqrt(-1)", "sqrt(1, 2)", "round(1, -99999999)", "round(1, 2, 3)", "int(1e300)", "(", "", "1,2", "1\n2",
                                  "-" * 600 + "1", "(" * 240 + "1" + ")" * 240, "\0", "1_0_", "é"])
def test_all_else_is_refused(text):
    with pytest.raises(ExpressionError):
        evaluate(text)


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789.+-*/%()e ,maxinroudsqt_[]'", max_size=20))
def test_no_text_gives_anything_but_a_bounded_number_or_a_refusal(text):
    try:
        value = evaluate(text)
    except ExpressionError:
        return
    assert type(value) in (int, float) and math.isfinite(value) and abs(value) < 2**63


def shape(text):
    return [(piece.name, piece.argument) if isinstance(piece, Expression) else piece for piece in parse(text)]


@pytest.mark.parametrize("text, pieces", [
    ("a ${b.c} d", ["a ", (("b.c",), None), " d"]), ('${hcp.eval:"512*768"}', [(("hcp.eval",), ("512*768",))]), ("$<hcp.eval:(1+2)*3>", [(("hcp.eval",), ("(1+2)*3",))]),
    ("${hcp.time:}", [(("hcp.time",), ())]), ("${times:512, 512}", [(("times",), ("512, 512",))]), ("\\${x} \\$<y>", ["${x} $<y>"]), ("\\\\${x}", ["\\", (("x",), None)]),
    ("C:\\a {b:1} $5", ["C:\\a {b:1} $5"]), ('${hcp.time:"%H}"}', [(("hcp.time",), ("%H}",))]), ("${hcp.time:o'clock}", [(("hcp.time",), ("o'clock",))]),
])
def test_text_is_cut_into_pieces(text, pieces):
    assert shape(text) == pieces


def test_nested_expressions_are_kept_with_their_places():
    (outer,) = parse("$<hcp.eval:\"${a}*$<b>\">")
    first, star, second = outer.argument
    assert (first.name, star, second.name) == (("a",), "*", ("b",)) and (outer.start, outer.end) == (0, 23)


@pytest.mark.parametrize("text", ["${", "${a", "$<a}", "${a:'x}", "x ${a ${b}"])
def test_brackets_that_do_not_close_are_told(text):
    with pytest.raises(ExpressionError, match="is missing its closing"):
        parse(text)


@settings(max_examples=300, deadline=None)
@given(st.text("\\${<}>x:'\"", max_size=12))
def test_escaped_text_is_read_back_as_it_was(text):
    assert "".join(parse(escape(text))) == text


def test_time_and_products():
    now = datetime.datetime(2023, 7, 26, 1, 5, 35)
    assert format_time("", now) == "2023-07-26-01-05-35" and format_time("%Y", now) == "2023"
    assert times("512, 768") == 393216 and times("0.5,4") == 2.0
    for text in ("a", "", "1,", "1e99,1e99", "9" * 30):
        with pytest.raises(ExpressionError):
            times(text)


def test_depth_and_length_are_bounded():
    with pytest.raises(ExpressionError, match="nested"):
        parse("${" * 100)
    with pytest.raises(ExpressionError, match="limited"):
        parse("x" * (expressions.LONGEST + 1))

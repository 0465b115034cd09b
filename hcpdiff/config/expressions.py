r"""The expressions of a config value: `${key}`, `${hcp.eval:"512*768"}`, `${hcp.time:}`, `${times:512,512}`; `$<...>` means the same.

`parse` splits text into literal pieces and expressions by a balanced scan; `\${` and `\$<` are literal. Nothing here runs code: `hcp.eval`
is arithmetic over a syntax tree of its own.
"""

import ast
import datetime
import math
import operator
import re
import warnings
from dataclasses import dataclass

RESOLVERS = ("hcp.eval", "hcp.time", "times")
TIME_FORMAT = "%Y-%m-%d-%H-%M-%S"
CLOSERS = {"${": "}", "$<": ">"}
KEY = re.compile(r"\.*[^.\[\]{}<>:,'\"$\s]+(\.[^.\[\]{}<>:,'\"$\s]+|\[[^\[\]{}<>$\s]+\])*$")
DEEPEST, LONGEST = 50, 10_000


class ExpressionError(Exception):
    """What is wrong with one expression; the caller knows which key holds it."""


@dataclass(frozen=True)
class Expression:
    """`${name}` (argument None: a key) or `${name:argument}` (a resolver); pieces are text or nested expressions.

    start, end: where it stands in the text that was parsed.
    """

    name: tuple
    argument: tuple | None
    start: int
    end: int


def has_expression(text: str) -> bool:
    """Whether text holds `${` or `$<` (escaped or not)."""
    return "${" in text or "$<" in text


def parse(text: str) -> list["str | Expression"]:
    """Literal pieces and expressions of a text; ExpressionError where brackets do not balance."""
    if len(text) > LONGEST:
        raise ExpressionError(f"text with expressions is limited to {LONGEST} characters")
    return _Scanner(text).outside()


def first(text: str, start: int) -> Expression:
    """The expression whose opening bracket stands at `start`; ExpressionError when it does not end."""
    return _Scanner(text).inside(start)


class _Scanner:
    def __init__(self, text: str):
        self.text, self.depth = text, 0

    def outside(self) -> list:
        """The pieces of the whole text."""
        pieces, literal, position = [], "", 0
        while position < len(self.text):
            step, opener = self.opening(position)
            if opener:
                expression = self.inside(position)
                pieces += [literal, expression]
                literal, position = "", expression.end
            else:
                literal += step[0]
                position += step[1]
        return [piece for piece in (*pieces, literal) if piece != ""]

    def opening(self, position: int) -> tuple[tuple[str, int], bool]:
        """(literal text, characters it takes), and whether an expression starts here instead."""
        slashes = re.match(r"\\*", self.text[position:]).end()
        opener = self.text[position + slashes:position + slashes + 2]
        if opener not in CLOSERS:
            return (self.text[position:position + max(slashes, 1)], max(slashes, 1)), False
        if slashes == 0:
            return ("", 0), True
        if slashes % 2:  # the last one makes the opener literal
            return ("\\" * (slashes // 2) + opener, slashes + 2), False
        return ("\\" * (slashes // 2), slashes), False

    def inside(self, start: int) -> Expression:
        """The expression that opens at `start`: up to its own closing bracket outside quotes."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise ExpressionError(f"expressions are nested more than {DEEPEST} deep")
        closer, position = CLOSERS[self.text[start:start + 2]], start + 2
        name, argument, literal, quote = [], None, "", ""
        while position < len(self.text):
            character = self.text[position]
            pieces = name if argument is None else argument
            if self.text[position:position + 2] in CLOSERS:
                nested = self.inside(position)
                pieces += [literal, nested]
                literal, position = "", nested.end
                continue
            if quote and character == "\\" and self.text[position + 1:position + 2] in (quote, "\\"):
                literal, position = literal + self.text[position + 1], position + 2
                continue
            position += 1
            if quote:
                literal, quote = (literal, "") if character == quote else (literal + character, quote)
            elif character == closer:
                pieces.append(literal)
                self.depth -= 1
                clean = [None if part is None else tuple(piece for piece in part if piece != "") for part in (name, argument)]
                return Expression(clean[0], clean[1], start, position)
            elif argument is None and character == ":":
                name.append(literal)
                literal, argument = "", []
            elif character in "'\"" and argument is not None and literal.strip() in ("", ",") and not literal.strip(" ,"):
                literal, quote = literal.rstrip(" "), character
            else:
                literal += character
        what = "its closing quote" if quote else f"its closing '{closer}'"
        raise ExpressionError(f"'{self.text[start:start + 40]}' is missing {what} (a backslash before the $ makes it literal)")


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
             ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg}
FUNCTIONS = {"min": min, "max": max, "round": lambda value, digits=0: _round(value, digits), "int": int, "float": float, "sqrt": math.sqrt}
LARGEST = 2**63  # as results and on the way: no config value is larger


def evaluate(text: str) -> int | float:
    """The value of an arithmetic expression: numbers, + - * / // % **, parentheses, min max round int float sqrt. Results stay below 2**63."""
    if len(text) > 500:
        raise ExpressionError("hcp.eval takes at most 500 characters")
    try:
        with warnings.catch_warnings(action="ignore"):  # Python warns of `1if`, which is refused below
            tree = ast.parse(text.strip(), mode="eval")
        return _value(tree.body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ExpressionError(f"hcp.eval cannot read '{text}': {_ALLOWED}") from None
    except (ZeroDivisionError, OverflowError, TypeError) as error:
        raise ExpressionError(f"hcp.eval fails on '{text}': {error}") from None


_ALLOWED = "it is arithmetic only (numbers, + - * / // % **, parentheses, min max round int float sqrt)"


def _value(node: ast.expr, text: str) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _bounded(_power(_value(node.left, text), _value(node.right, text), text), text)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return _bounded(OPERATORS[type(node.op)](_value(node.left, text), _value(node.right, text)), text)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand, text))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords and node.args:
        arguments = [_value(argument, text) for argument in node.args]
        if node.func.id == "sqrt" and arguments[0] < 0:
            raise ExpressionError(f"hcp.eval fails on '{text}': sqrt of a negative number")
        if node.func.id in ("min", "max"):
            return FUNCTIONS[node.func.id](arguments)
        return _bounded(FUNCTIONS[node.func.id](*arguments), text)
    raise ExpressionError(f"hcp.eval refuses '{ast.unparse(node)[:60]}': {_ALLOWED}")


def _round(value: int | float, digits: int) -> int | float:
    """round(value, digits); digits far from 0 would make Python compute 10**digits first."""
    if not isinstance(digits, int) or abs(digits) > 20:
        raise TypeError("round takes a whole number of digits between -20 and 20")
    return round(value, digits) if digits else round(value)


def _power(base: int | float, exponent: int | float, text: str) -> int | float:
    """base ** exponent, its size known before it is made."""
    if abs(base) > 1 and exponent * math.log2(abs(base)) > 64:
        raise ExpressionError(f"hcp.eval: a value in '{text}' is too large (2**63 is the limit)")
    result = base**exponent
    if isinstance(result, complex):
        raise ExpressionError(f"hcp.eval fails on '{text}': a root of a negative number")
    return result


def _bounded(value: int | float, text: str) -> int | float:
    if not abs(value) < LARGEST:  # also refuses nan
        raise ExpressionError(f"hcp.eval: a value in '{text}' is too large (2**63 is the limit)")
    return value


def times(text: str) -> int | float:
    """The product of comma-separated numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[-+]?(\d{1,18}|\d*\.\d+([eE][-+]?\d+)?)", part) for part in parts):
        raise ExpressionError(f"times takes numbers separated by commas, as ${{times:512,512}}; it got '{text}'")
    return _bounded(math.prod(float(part) if "." in part else int(part) for part in parts), text)


def format_time(pattern: str, now: datetime.datetime) -> str:
    """`now` by a strftime pattern; an empty one means 2023-07-26-01-05-35."""
    try:
        return now.strftime(pattern.strip() or TIME_FORMAT)
    except ValueError as error:
        raise ExpressionError(f"hcp.time cannot use the format '{pattern}': {error}") from None


def escape(text: str) -> str:
    """Text that `parse` takes for exactly this text."""
    return re.sub(r"(\\*)(\$[{<])", lambda match: match[1] * 2 + "\\" + match[2], text)

r"""Prompt weights: `{text:1.2}`, `{text}` = 1.1, nesting multiplies, `\{ \} \: \\` are plain characters.

Reading a prompt gives pieces of text with their weights; what they do to the text encoder's output is in `vis.encode`.
Nothing here imports torch.
"""

import re
import unicodedata
from dataclasses import dataclass, field, replace

from ..errors import ConfigError

DEFAULT_WEIGHT = 1.1  # of braces without a number, as A1111's parentheses
DEEPEST = 50  # brackets inside each other; 1.1 to the 50th is 117
MAX_PRODUCT = 1000.0  # of the weights of brackets inside each other
MAX_WEIGHT = 10.0  # beyond it no picture survives: it is a clock time or a ratio that was meant as text
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class Piece:
    """Text that has one weight. `breaks`: no text, the next token begins a new chunk (webui's BREAK)."""

    text: str
    weight: float = 1.0
    breaks: bool = False


@dataclass(frozen=True)
class LoraTag:
    """webui's `<lora:name:0.8>`: strengths of the text encoder's and the UNet's LoRA."""

    name: str
    text_strength: float
    strength: float


@dataclass(frozen=True)
class Parsed:
    """A prompt that was read: pieces in order, LoRA tags (webui syntax only), and what is worth a warning."""

    pieces: tuple[Piece, ...]
    loras: tuple[LoraTag, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The plain text, without weights."""
        return "".join(p.text for p in self.pieces)


@dataclass
class Item:
    """A stretch of the innermost open brace. `colon`: a colon that may begin a weight; `nested`: came out of a brace inside."""

    text: str
    weight: float = 1.0
    colon: bool = False
    nested: bool = False


@dataclass
class Brace:
    """An open brace: where it is and what it holds so far. The outermost one stands for the whole prompt."""

    at: int
    items: list[Item] = field(default_factory=list)


def parse(prompt: str, syntax: str = "hcp", where: str = "prompt") -> Parsed:
    """Reads a prompt. syntax: 'hcp' (braces), 'webui' (parentheses, BREAK, `<lora:…>`) or 'plain' (no weights at all).

    Raises ConfigError with all faults of the prompt; each shows the place in it.
    """
    if syntax == "plain":
        return Parsed(merge([Piece(prompt)]))
    if syntax == "webui":
        from .webui_prompt import parse_webui

        parsed = parse_webui(prompt, where)
    else:
        parsed = Parsed(merge(parse_braces(prompt, where)), notices=tuple(webui_notices(prompt, where)))
    heavy = next((piece for piece in parsed.pieces if not abs(piece.weight) <= MAX_PRODUCT), None)
    if heavy:
        raise ConfigError(f"{where}: the weight of {heavy.text[:40]!r} is {heavy.weight:g}; weights and those around them may multiply to {MAX_PRODUCT:g}, and no picture survives 10.")
    return parsed


def too_deep(prompt: str, at: int, where: str) -> str:
    """The fault of a bracket that stands inside too many others."""
    return pointed(where, prompt, at, f"this bracket stands inside {DEEPEST} others", "Give one pair of brackets a weight instead.")


def merge(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Joins neighbours of equal weight (so that no word is cut where nothing changes) and drops empty ones."""
    out: list[Piece] = []
    for piece in pieces:
        if not piece.breaks and not piece.text:
            continue
        if out and not piece.breaks and not out[-1].breaks and out[-1].weight == piece.weight:
            out[-1] = replace(out[-1], text=out[-1].text + piece.text)
        else:
            out.append(piece)
    return tuple(out)


def scan(prompt: str):
    """Yields (kind, text, position); kind is 'open', 'close', 'colon' or 'text'. Escapes are resolved here."""
    at = 0
    for match in re.finditer(r"\\([{}:\\])|([{}:])", prompt):
        if match.start() > at:
            yield "text", prompt[at:match.start()], at
        escaped, mark = match.groups()
        yield ("text", escaped, match.start()) if escaped else ({"{": "open", "}": "close", ":": "colon"}[mark], mark, match.start())
        at = match.end()
    if at < len(prompt):
        yield "text", prompt[at:], at


def parse_braces(prompt: str, where: str) -> list[Piece]:
    """Pieces of a prompt in our syntax. Iterative, so that nesting of any depth is no problem."""
    stack, faults = [Brace(-1)], []
    for kind, text, at in scan(prompt):
        if kind == "open":
            if len(stack) > DEEPEST:
                raise ConfigError([*faults, too_deep(prompt, at, where)])
            stack.append(Brace(at))
        elif kind != "close":
            stack[-1].items.append(Item(text, colon=kind == "colon"))
        elif len(stack) == 1:
            faults.append(pointed(where, prompt, at, "this `}` closes nothing", r"Remove it, or write `\}` for a plain brace."))
        else:
            brace = stack.pop()
            weight, items, problem = weigh(brace.items)
            if problem:
                faults.append(pointed(where, prompt, brace.at, *problem))
            stack[-1].items += [Item(i.text, i.weight * weight, nested=True) for i in items]
    faults += [pointed(where, prompt, brace.at, "this `{` is never closed", r"Close it with `}`, or write `\{` for a plain brace.") for brace in stack[1:]]
    if faults:
        raise ConfigError(faults)
    return [Piece(i.text, i.weight) for i in stack[0].items]


def weigh(items: list[Item]) -> tuple[float, list[Item], tuple[str, str] | None]:
    """(weight, content, fault) of one closed brace. The weight is what follows its last own colon, if that is a number."""
    colon = next((n for n in range(len(items) - 1, -1, -1) if items[n].colon or items[n].nested), -1)
    problem = None
    if colon >= 0 and items[colon].colon:
        tail = "".join(i.text for i in items[colon + 1:]).strip()
        if NUMBER.fullmatch(tail):
            if abs(float(tail)) > MAX_WEIGHT:
                problem = f"the weight {tail} is beyond {MAX_WEIGHT:g}", r"Write `\:` if the colon belongs to the text."
            weight, items = float(tail), items[:colon]
        else:
            weight = DEFAULT_WEIGHT
            if not tail or tail[0] in "+-.0123456789":
                problem = f"`{tail}` after the colon is no weight", r"Write a number as in `{text:1.2}`, or `\:` if the colon belongs to the text."
    else:
        weight = DEFAULT_WEIGHT
    if problem is None and not any(i.text.strip() for i in items):
        problem = "these braces hold no text", r"Remove them, or write `\{` and `\}` for plain braces."
    return weight, items, problem


def pointed(where: str, prompt: str, at: int, what: str, advice: str) -> str:
    """A fault with the part of the prompt around `at` and a caret below the place."""
    start, line = max(0, at - 40), prompt.replace("\n", " ").replace("\t", " ")
    before = ("…" if start else "") + line[start:at]
    after = line[at:at + 30] + ("…" if at + 30 < len(line) else "")
    wide = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in before)  # columns of a terminal
    return f"{where}, character {at + 1}: {what}\n    {before}{after}\n    {' ' * wide}^\n  {advice}"


WEBUI_MARKS = (
    (re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>"), "is webui's tag for a LoRA; here lora_path and lora_alpha name it"),
    (re.compile(r"(?<!\\)\([^()]*:\s*[+-]?[\d.]+\s*\)"), "is webui's spelling of a weight; here it is {text:1.2}"),
    (re.compile(r"(?<![\\(])\({2,}[^()]+\){2,}"), "is webui's emphasis; here it is {text}"),
    (re.compile(r"(?<!\\)\[(?:[^\[\]():|]|\([^()]*\))*[:|](?:[^\[\]()]|\([^()]*\))*\]"), "is webui's prompt editing, which is not read"),
    (re.compile(r"\\[()\[\]]"), "is webui's escape; parentheses are plain text here and need none"),
    (re.compile(r"\bBREAK\b"), "is webui's mark for a new chunk"),
    (re.compile(r"\bAND\b"), "composes prompts in webui; here it is a word"),
)
FULL_WIDTH = re.compile(r"[｛{][^{}｛｝]*：\s*[+-]?[\d.]+\s*[}｝]|｛[^{}｛｝]*｝")


def webui_notices(prompt: str, where: str) -> list[str]:
    """Warnings about webui's syntax in a prompt that is read in ours, one line for each kind."""
    found = []
    for pattern, meaning in WEBUI_MARKS:
        if match := pattern.search(prompt):
            found.append(f"{where}: `{match.group()}` {meaning}. It is taken as plain text; prompt_syntax: webui reads webui's prompts.")
    if match := FULL_WIDTH.search(prompt):
        found.append(f"{where}: `{match.group()}` has full-width marks, which are plain text; weights take the half-width `{{`, `:` and `}}`.")
    return found


def to_webui(pieces: tuple[Piece, ...]) -> str:
    """The prompt in A1111's spelling: weights in parentheses, parentheses of the text escaped."""
    out = []
    for piece in pieces:
        text = re.sub(r"([()\[\]\\])", r"\\\1", piece.text)
        if piece.breaks:
            out.append(" BREAK ")
        elif abs(piece.weight - 1) < 1e-6:
            out.append(text)
        else:  # spaces stay outside, as people write it
            head, body, tail = text[:len(text) - len(text.lstrip())], text.strip(), text[len(text.rstrip()):]
            out.append(f"{head}({body}:{float(f'{piece.weight:.4f}')}){tail}" if body else text)
    return "".join(out)

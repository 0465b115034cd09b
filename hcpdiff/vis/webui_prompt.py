r"""Reads AUTOMATIC1111's prompt syntax: `(x)` 1.1, `(x:1.2)`, `[x]` 1/1.1, `\( \) \[ \]`, BREAK, `<lora:name:0.8>`.

As there, brackets that are never closed count to the end and a lone closing one is text. What would be read differently (prompt
editing, AND) is refused rather than drawn wrongly.
"""

import re

from ..errors import ConfigError
from .prompt import DEEPEST, DEFAULT_WEIGHT, LoraTag, Parsed, Piece, merge, pointed, too_deep

TAG = re.compile(r"<(\w+):([^<>]*)>")
MARK = re.compile(r"\\([()\[\]\\])|([(\[])|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|([)\]])")


def parse_webui(prompt: str, where: str) -> Parsed:
    """Pieces and LoRA tags of a prompt in webui's syntax; ConfigError with all faults."""
    faults = unread(prompt, where)
    loras = []
    for match in TAG.finditer(prompt):
        kind, body = match.groups()
        tag = lora_tag(body) if kind in ("lora", "lyco") else None
        if tag is None:
            faults.append(pointed(where, prompt, match.start(), f"`{match.group()}` is not read", "Tags that are: <lora:name:0.8>, <lora:name:TE:UNet>."))
        else:
            loras.append(tag)
    if faults:
        raise ConfigError(faults)
    pieces, notices = brackets(TAG.sub("", prompt), where)
    return Parsed(merge(with_breaks(pieces)), tuple(loras), tuple(notices))


def lora_tag(body: str) -> LoraTag | None:
    """`name:0.8` (both), `name:TE:UNet`, `te=` and `unet=` too; None where it is none of these."""
    name, *rest = body.split(":")
    given = dict(r.split("=", 1) for r in rest if "=" in r)
    plain = [r for r in rest if "=" not in r]
    try:
        text = float(given.pop("te", plain[0] if plain else 1.0))
        unet = float(given.pop("unet", plain[1] if len(plain) > 1 else text))
    except ValueError:
        return None
    return None if given or len(plain) > 2 or not name.strip() else LoraTag(name.strip(), text, unet)


def unread(prompt: str, where: str) -> list[str]:
    """Faults for what webui would do while sampling and we do not."""
    advice = "Prompt editing and AND are not read; write the prompt without them, or escape the brackets."
    found = [m for p in (r"(?<!\\)\[(?:[^\[\]():|]|\([^()]*\))*[:|](?:[^\[\]()]|\([^()]*\))*\]", r"\bAND\b") for m in re.finditer(p, prompt)]
    return [pointed(where, prompt, m.start(), f"`{m.group()}` would change the prompt while webui samples", advice) for m in found]


def brackets(prompt: str, where: str) -> tuple[list[Piece], list[str]]:
    """Weights by brackets. Each open bracket remembers where its pieces begin; closing multiplies all of them."""
    pieces: list[Piece] = []
    opened: list[tuple[str, int]] = []

    def close(kind: str, weight: float) -> bool:
        if not opened or opened[-1][0] != kind:
            return False
        start = opened.pop()[1]
        pieces[start:] = [Piece(p.text, p.weight * weight) for p in pieces[start:]]
        return True

    at = 0
    for match in MARK.finditer(prompt):
        pieces.append(Piece(prompt[at:match.start()]))
        at = match.end()
        escaped, opening, number, closing = match.groups()
        if escaped:
            pieces.append(Piece(escaped))
        elif opening:
            if len(opened) >= DEEPEST:
                raise ConfigError(too_deep(prompt, match.start(), where))
            opened.append((opening, len(pieces)))
        elif number:
            if not close("(", float(number)):
                pieces.append(Piece(match.group()))
        elif not close("(" if closing == ")" else "[", DEFAULT_WEIGHT if closing == ")" else 1 / DEFAULT_WEIGHT):
            pieces.append(Piece(closing))
    pieces.append(Piece(prompt[at:]))
    notices = [f"{where}: {len(opened)} bracket(s) are never closed; as in webui they count to the end of the prompt."] if opened else []
    while opened:
        close(opened[-1][0], DEFAULT_WEIGHT if opened[-1][0] == "(" else 1 / DEFAULT_WEIGHT)
    return pieces, notices


def with_breaks(pieces: list[Piece]) -> list[Piece]:
    """Splits the pieces at the word BREAK."""
    out = []
    for piece in pieces:
        for n, text in enumerate(re.split(r"\s*\bBREAK\b\s*", piece.text)):
            out += [Piece("", breaks=True)] * bool(n) + [Piece(text, piece.weight)]
    return out

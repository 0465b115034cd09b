"""Prompts out of captions: templates with {names}, tag shuffle, dropouts. Standard library only; draws come from the generator that is passed in."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_text

_FIELD = re.compile(r"\\[{}]|\{([^{}]*)\}|[{}]")
_ENDS_WITH_SEPARATOR = re.compile(r"(?:\s*[,;:|，、；：]\s*|\s+[-–—/]\s*)$")
_STARTS_WITH_SEPARATOR = re.compile(r"^(?:\s*[,;:|，、；：]\s*|\s*[-–—/]\s+)")
_TRIGGER = re.compile(r"pt\d*$")


@dataclass(frozen=True)
class Template:
    """One line, cut at its fields: texts[0] {fields[0]} texts[1] ..."""

    texts: tuple[str, ...]
    fields: tuple[str, ...]

    def render(self, caption: str, words: dict[str, str]) -> str:
        """The prompt. An empty caption takes one separator with it; braces inside the caption or a word are plain text."""
        done = self.texts[0]
        eat_start = False
        for name, text in zip(self.fields, self.texts[1:]):
            value = caption if name == "caption" else words[name]
            if value:
                done, eat_start = done + value + text, False
            else:
                done, eat_start = _join_without_field(done, text)
        return done.strip() if not eat_start else _STARTS_WITH_SEPARATOR.sub("", done).strip()


def _join_without_field(left: str, right: str) -> tuple[str, bool]:
    """Left and right of an empty field with one separator less -> (text, whether a leading separator is still to go)."""
    separator = _ENDS_WITH_SEPARATOR.search(left)
    if separator and (not right.strip() or _STARTS_WITH_SEPARATOR.match(right)):
        return left[:separator.start()] + right, False
    if not left.strip():
        return _STARTS_WITH_SEPARATOR.sub("", right.lstrip()), not right.strip()
    if left[-1:].isspace() and right[:1].isspace():
        return left + right.lstrip(), False
    return left + right, False


def parse(line: str) -> Template:
    """Cut a line at its {names}; `\\{` and `\\}` are literal. A brace without a partner raises ValueError saying where."""
    texts, fields, start = [""], [], 0
    for found in _FIELD.finditer(line):
        texts[-1] += line[start:found.start()]
        start = found.end()
        token = found.group()
        if token.startswith("\\"):
            texts[-1] += token[1]
        elif found.group(1) is None:
            raise ValueError(f"the brace {token!r} in column {found.start() + 1} has no partner (write \\{token} for a literal one)")
        else:
            fields.append(found.group(1).strip())
            texts.append("")
    texts[-1] += line[start:]
    return Template(tuple(texts), tuple(fields))


def default_template(has_captions: bool, words: dict[str, str]) -> Template:
    """'{pt1}, {caption}' as far as there is a pt1 and there are captions."""
    return parse(", ".join(["{pt1}"] * ("pt1" in words) + ["{caption}"] * has_captions))


def load_templates(path: str | None, has_captions: bool, words: dict[str, str], where: str, faults: list[str]) -> list[Template]:
    """The choices of a source. Faults: unreadable or empty file, lone braces, every name that word_names lacks."""
    if path is None:
        return [default_template(has_captions, words)]
    text = read_text(Path(path), faults)
    if text is None:
        return []
    templates, unknown = [], {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            template = parse(line.strip())
        except ValueError as error:
            faults.append(f"{path}: line {number}: {error}")
            continue
        templates.append(template)
        for name in template.fields:
            if name != "caption" and name not in words:
                unknown.setdefault(name, []).append(number)
    for name, lines in unknown.items():
        faults.append(f"{path}: {{{name}}} in line {', '.join(map(str, lines))} has no word; add {where}.word_names.{name} (there: {', '.join(words) or 'none'})")
    if not templates and not any(line.strip() for line in text.split("\n")):
        faults.append(f"{path}: the template file is empty")
    return templates


def without_trigger(caption: str, trigger: str) -> tuple[str, bool]:
    """(caption without the trigger word that it starts with, whether that was a whole tag)."""
    start = caption.lstrip()
    if not trigger or start[:len(trigger)].casefold() != trigger.casefold():
        return caption, False
    rest = start[len(trigger):]
    if rest and (rest[0].isalnum() or rest[0] in "-_"):
        return caption, False  # pt-cat1 is not the beginning of pt-cat10
    return rest.lstrip(" ,;:，、；："), not rest.strip() or rest.lstrip()[0] in ",，"


def trigger_words(prompter: "Prompter") -> list[str]:
    """The trigger words (pt1 ...) that some template of a source puts into its prompts, each once."""
    return list(dict.fromkeys(prompter.words[name] for template in prompter.templates for name in template.fields if _TRIGGER.match(name)))


@dataclass(frozen=True)
class Prompter:
    """How a source's captions become prompts."""

    templates: tuple[Template, ...]
    words: dict[str, str]
    tag_shuffle: bool = False
    keep_tokens: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    prompt_dropout: float = 0.0

    @property
    def draws(self) -> bool:
        """Whether the same caption can give different prompts."""
        return bool(len(self.templates) > 1 or self.tag_shuffle or self.tag_dropout or self.caption_dropout or self.prompt_dropout)

    def prompt(self, caption: str | None, rng: Any) -> str:
        """The prompt of one sample. `rng`: a numpy Generator; None draws nothing (first template, no shuffle, no dropout)."""
        drop_prompt, drop_caption, choice = rng.random(3) if rng is not None else (1.0, 1.0, 0.0)
        if drop_prompt < self.prompt_dropout:
            return ""
        template = self.templates[int(choice * len(self.templates))]
        text = caption or ""
        if drop_caption < self.caption_dropout or "caption" not in template.fields:
            return template.render("", self.words)
        keep = self.keep_tokens
        for trigger in [self.words[name] for name in template.fields if _TRIGGER.match(name)]:
            text, whole_tag = without_trigger(text, trigger)
            keep = max(0, keep - whole_tag)
        return template.render(self._tags(text, keep, rng), self.words)

    def longest(self, caption: str | None) -> str:
        """The prompt by the wordiest template, nothing dropped."""
        wordiest = max(self.templates, key=lambda template: len(template.render("", self.words)) + 10**6 * ("caption" in template.fields))
        return Prompter((wordiest,), self.words).prompt(caption, None)

    def _tags(self, text: str, keep: int, rng: Any) -> str:
        if rng is None or not (self.tag_shuffle or self.tag_dropout):
            return text
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        head, tail = tags[:keep], tags[keep:]
        if self.tag_shuffle:
            tail = [tail[place] for place in rng.permutation(len(tail))]
        if self.tag_dropout:
            chances = rng.random(len(tail))
            tail = [tag for tag, chance in zip(tail, chances) if chance >= self.tag_dropout]
        return ", ".join(head + tail)


def word_notices(templates: list[Template], words: dict[str, str], has_captions: bool) -> list[str]:
    """What a reader of the report should know: words or captions that no template uses."""
    fields = {name for template in templates for name in template.fields}
    notices = [f"word_names.{name} is used by no template" for name in words if name not in fields]
    if has_captions and "caption" not in fields:
        notices.append("no template has {caption}: the captions are not used")
    if not has_captions and "caption" in fields:
        notices.append("there are no captions: {caption} stays empty")
    if not fields and not any("".join(template.texts).strip() for template in templates):
        notices.append("there is neither a caption nor a word_names.pt1: every prompt is empty")
    return notices

"""Prompts with weights -> what the denoiser is conditioned on: tokens with weights, chunks of 75, A1111's weighting."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..families.base import Conditioning, Models, Tokens, text_components
from ..families.clip_text import CHUNK, chunk_ids, repeats_for, token_ids
from .prompt import Parsed, Piece


@dataclass(frozen=True)
class Words:
    """Words that have ids of their own (embeddings): a pattern that finds them, and word -> ids for each tokenizer."""

    pattern: re.Pattern | None = None
    ids: Mapping[str, Mapping[str, list[int]]] = field(default_factory=dict)

    def of(self, tokenizer: str) -> Mapping[str, list[int]]:
        """word -> ids for one tokenizer."""
        return self.ids.get(tokenizer, {})


@dataclass(frozen=True)
class Row:
    """The tokens of one prompt for one tokenizer, in groups that begin a new chunk (one group, where nothing asks for more)."""

    groups: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]

    @property
    def chunks(self) -> int:
        """Chunks of 75 that all tokens need."""
        return sum(repeats_for(len(ids)) for ids, _ in self.groups)

    def table(self, repeats: int, bos: int, eos: int, pad: int) -> tuple[list[list[int]], list[list[float]]]:
        """`repeats` rows of 77 ids and of 77 weights; BOS, EOS and padding weigh 1. What does not fit is left out."""
        ids, weights = [], []
        for group, given in self.groups:
            need = repeats_for(len(group))
            ids += chunk_ids(group, need, bos, eos, pad)
            weights += [[1.0, *given[n * CHUNK:(n + 1) * CHUNK]] for n in range(need)]
        ids = (ids + chunk_ids((), max(0, repeats - len(ids)), bos, eos, pad))[:repeats]
        weights = (weights + [[1.0]] * max(0, repeats - len(weights)))[:repeats]
        return ids, [row + [1.0] * (CHUNK + 2 - len(row)) for row in weights]

    def cut(self, repeats: int) -> list[int]:
        """The ids that do not fit into `repeats` chunks."""
        free, lost = repeats, []
        for ids, _ in self.groups:
            lost += ids[max(0, free) * CHUNK:]
            free -= repeats_for(len(ids))
        return lost


def tokens_of(tokenizer, pieces: Sequence[Piece], words: Mapping[str, list[int]] | None = None, pattern: re.Pattern | None = None) -> Row:
    """Ids and weights of a prompt. A word of `words` becomes its ids; the piece's weight covers them all."""
    groups: list[tuple[list[int], list[float]]] = [([], [])]
    for piece in pieces:
        if piece.breaks:
            groups.append(([], []))
            continue
        ids = piece_ids(tokenizer, piece.text, words or {}, pattern)
        groups[-1][0].extend(ids)
        groups[-1][1].extend([piece.weight] * len(ids))
    return Row(tuple((tuple(ids), tuple(weights)) for ids, weights in groups))


def piece_ids(tokenizer, text: str, words: Mapping[str, list[int]], pattern: re.Pattern | None) -> list[int]:
    """Ids of a stretch of text, with the vectors' ids in the place of words that have them."""
    ids, at = [], 0
    for match in pattern.finditer(text) if pattern and words else ():
        if text[at:match.start()].strip():
            ids += token_ids(tokenizer, text[at:match.start()])
        ids += words[match.group().lower()]
        at = match.end()
    return ids + (token_ids(tokenizer, text[at:]) if text[at:].strip() else [])


def chunks_needed(models: Models, prompts: Sequence[Parsed], words: Words) -> list[int]:
    """Chunks that each prompt needs (the largest over the tokenizers)."""
    return [max(row.chunks for row in rows(models, prompt, words).values()) for prompt in prompts]


def cut_text(models: Models, prompt: Parsed, words: Words, repeats: int) -> tuple[int, str]:
    """How many tokens of a prompt do not fit into `repeats` chunks, and the text that they are."""
    name, tokenizer = next(iter(models.tokenizers.items()))
    lost = rows(models, prompt, words)[name].cut(repeats)
    return len(lost), tokenizer.decode([i for i in lost if i < len(tokenizer)]).strip()


def rows(models: Models, prompt: Parsed, words: Words) -> dict[str, Row]:
    """Tokenizer name -> tokens of the prompt."""
    return {name: tokens_of(t, prompt.pieces, words.of(name), words.pattern) for name, t in models.tokenizers.items()}


@torch.no_grad()
def encode(models: Models, prompt: Parsed, repeats: int, words: Words = Words(), clip_skip: int = 0) -> Conditioning:
    """One prompt -> hidden (1, repeats * 77, D), weighted; of several text encoders each one's part by itself. pooled has no weights, as in A1111 and ComfyUI."""
    tables = {name: row.table(repeats, *special_ids(models.tokenizers[name])) for name, row in rows(models, prompt, words).items()}
    ids = tuple(torch.tensor([table[0]], dtype=torch.int64) for table in tables.values())
    cond = models.family.encode_text(models, Tokens(ids, (0,)), clip_skip)
    weights = torch.tensor(next(iter(tables.values()))[1], dtype=torch.float32).unsqueeze(0)  # (1, R, 77); CLIP's tokenizers cut alike
    widths = [models.modules[component.name].config.hidden_size for component in text_components(models.family)]
    return Conditioning(torch.cat([weigh(part, weights) for part in cond.hidden.split(widths, dim=-1)], dim=-1), cond.pooled)


def encode_negative(models: Models, prompt: Parsed, repeats: int, words: Words = Words(), clip_skip: int = 0) -> Conditioning:
    """As `encode`; zeros for an empty one where the model was made so (`zero_negative`)."""
    cond = encode(models, prompt, repeats, words, clip_skip)
    if prompt.text.strip() or not models.extra.get("zero_negative"):
        return cond
    return Conditioning(torch.zeros_like(cond.hidden), None if cond.pooled is None else torch.zeros_like(cond.pooled))


def special_ids(tokenizer) -> tuple[int, int, int]:
    """BOS, EOS, padding."""
    return tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id


def weigh(hidden: Tensor, weights: Tensor) -> Tensor:
    """A1111's emphasis: hidden (B, R*77, D) times weights (B, R, 77) per token, then each chunk's mean as it was before.

    A chunk whose weights are all 1 keeps its bits. The mean is restored within what the weights can explain (see `restoring`).
    """
    batch, chunks, length = weights.shape
    states = hidden.float().reshape(batch, chunks, length, -1)
    weights = weights.to(hidden.device)
    weighted = states * weights.unsqueeze(-1)
    restored = weighted * restoring(states, weighted, weights)[..., None, None]
    changed = (weights != 1).any(-1)[..., None, None]  # (B, R, 1, 1)
    return torch.where(changed, restored, states).reshape(hidden.shape).to(hidden.dtype)


def restoring(states: Tensor, weighted: Tensor, weights: Tensor) -> Tensor:
    """The factor (B, R) that gives each chunk its mean back: mean before / mean after.

    That quotient is noise where a mean is nearly zero (a final layer norm that was hardly trained), and can even flip the sign of all.
    Where the tokens' means have one sign it lies between 1 / largest and 1 / smallest weight, so it is kept there; without a mean it is 1.
    """
    before, after = states.mean((2, 3)), weighted.mean((2, 3))
    low, high = 1 / weights.amax(-1).clamp(min=1), 1 / weights.amin(-1).clamp(min=0.1, max=1)
    factor = torch.where(after == 0, 1.0, before / after).clamp(low, high)
    return torch.where(before.abs() > 1e-3 * states.square().mean((2, 3)).sqrt(), factor, 1.0)

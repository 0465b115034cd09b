"""CLIP text encoders: chunks of 75 tokens, each with its own BOS and EOS, and the choice of the layer that is read."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHUNK = 75


def chunk_ids(ids: Sequence[int], repeats: int, bos: int, eos: int, pad: int) -> list[list[int]]:
    """`repeats` rows of 77 ids: BOS, up to 75 tokens, EOS, padding. Ids beyond repeats * 75 are left out."""
    rows = []
    for start in range(0, repeats * CHUNK, CHUNK):
        body = list(ids[start : start + CHUNK])
        rows.append([bos, *body, eos, *[pad] * (CHUNK - len(body))])
    return rows


def repeats_for(longest: int) -> int:
    """Chunks that a prompt of `longest` tokens needs, at least one."""
    return max(1, -(-longest // CHUNK))


def token_ids(tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt without BOS, EOS and padding."""
    return tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids


def tokenize(tokenizer, prompts: Sequence[str], repeats: int) -> tuple[Tensor, tuple[int, ...]]:
    """(B, repeats, 77) int64 ids, and per prompt the number of tokens that did not fit."""
    all_ids = [token_ids(tokenizer, prompt) for prompt in prompts]
    rows = [chunk_ids(ids, repeats, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) for ids in all_ids]
    return torch.tensor(rows, dtype=torch.int64), tuple(max(0, len(ids) - repeats * CHUNK) for ids in all_ids)


def encode_chunks(text_encoder: nn.Module, ids: Tensor, clip_skip: int = 0) -> Tensor:
    """ids (B, R, 77) -> (B, R * 77, D): the hidden states `clip_skip` layers before the last, through the final layer norm."""
    batch, chunks, length = ids.shape
    flat = ids.reshape(batch * chunks, length)
    if clip_skip == 0:
        hidden = text_encoder(flat).last_hidden_state
    else:
        states = text_encoder(flat, output_hidden_states=True).hidden_states
        hidden = body(text_encoder).final_layer_norm(states[-1 - clip_skip])
    return hidden.reshape(batch, chunks * length, -1)


def states_of(text_encoder: nn.Module, ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """ids (B, R, 77) -> (hidden states (B * R, 77, D) before and after every layer, the last one through the final norm (B, R, 77, D))."""
    out = text_encoder(ids.flatten(0, 1), output_hidden_states=True)
    return out.hidden_states, out.last_hidden_state.unflatten(0, ids.shape[:2])


def body(text_encoder: nn.Module) -> nn.Module:
    """The transformer itself: transformers 5 has it flat in CLIPTextModel, below `text_model` elsewhere."""
    return getattr(text_encoder, "text_model", text_encoder)


def layers_of(text_encoder: nn.Module) -> int:
    """Number of transformer layers."""
    return text_encoder.config.num_hidden_layers

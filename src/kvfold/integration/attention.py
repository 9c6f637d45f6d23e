"""The attention function a model runs while kvfold is attached: codes and exact tokens separately, joined by lse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfold import ops
from kvfold.cache.view import CacheView
from kvfold.codecs.base import attend
from kvfold.errors import InputError

_QUERIES = 1024


def codes_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query [B, H, Q, D]`; `key` is a `CacheView`, or a dense tensor from a layer that stays exact.

    `attention_mask` is what `sdpa_mask` makes: bool `[B, 1, Q, T]`, or None for plain causal attention.

    Returns:
        `[B, Q, H, D]` in the query's dtype, and None for the weights, which are never whole.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, CacheView):
        if dropout:
            raise InputError("attention without dropout on codes", f"dropout {dropout}", "call model.eval() first")
        out = _attend_view(query, key, attention_mask, scale, softcap)
    elif softcap is not None:
        out = ops.attend_exact(query, key, value, _mask(attention_mask, query, key.shape[2], slice(None)), scale, softcap)[0]
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _attend_view(query: Tensor, view: CacheView, attention_mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Queries in chunks, so that masks `[Q, T]` and their combinations stay small beside the cache."""
    queries = query.shape[2]
    parts = []
    for start in range(0, queries, _QUERIES):
        rows = slice(start, min(start + _QUERIES, queries))
        mask = None if queries == 1 and attention_mask is None else _mask(attention_mask, query, view.length, rows)
        boundaries = None if view.boundaries is None else view.boundaries[rows, None]
        parts.append(_attend_rows(query[:, :, rows], view, mask, boundaries, scale, softcap))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _attend_rows(
    query: Tensor, view: CacheView, mask: Tensor | None, boundaries: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """`mask` bool `[B or 1, 1, Q, T]`, None for a single query that sees all; `boundaries [Q, 1]` or None: see `CacheView`."""
    slots = None if boundaries is None else torch.arange(view.length, device=query.device)
    exact = None
    if view.keys.shape[2]:
        exact_mask = None
        if mask is not None:
            exact_mask = mask[..., view.exact_start :]
            if slots is not None and boundaries is not None:
                exact_mask = exact_mask & (slots[view.exact_start :] >= boundaries)
            exact_mask = torch.cat((mask[..., : view.sinks], exact_mask), -1)
        exact = ops.Exact(view.keys, view.values, exact_mask)
        if not view.pieces:
            return ops.attend_exact(query, *exact, scale, softcap)[0]
    parts = []
    for piece in view.pieces:
        chosen = slice(piece.start, piece.stop)
        piece_mask = None if mask is None else mask[..., chosen]
        if piece_mask is not None and slots is not None and boundaries is not None:
            piece_mask = piece_mask & (slots[chosen] < boundaries)
        keys, values = (piece.key_codec, piece.keys), (piece.value_codec, piece.values)
        too = exact if piece is view.pieces[-1] else None  # in one call with the newest coded tokens
        parts.append(attend(query, keys, values, piece.rotation, piece_mask, scale, softcap, too))
    return ops.merge(parts)[0]


def _mask(attention_mask: Tensor | None, query: Tensor, length: int, rows: slice) -> Tensor:
    """A bool mask `[B or 1, 1, Q, T]` of the queries `rows`, True where a query may look."""
    if attention_mask is None:
        slots = torch.arange(length, device=query.device)
        newest = slots[length - query.shape[2] :][rows]
        return (slots <= newest[:, None])[None, None]
    mask = attention_mask[:, :, rows, :length]
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if bool((mask[~allowed] > -1e4).any()):
        raise InputError("a mask of 0 and minus infinity", "an attention bias", "use a model without attention biases")
    return allowed

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
        out = _attend_exact(query, key, value, _mask(attention_mask, query, key.shape[2]), scale, softcap)[0]
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _attend_view(query: Tensor, view: CacheView, attention_mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    queries = query.shape[2]
    mask = None if queries == 1 and attention_mask is None else _mask(attention_mask, query, view.length)
    slots = torch.arange(view.length, device=query.device)
    as_codes = None if view.boundaries is None else slots < view.boundaries[:, None]  # [Q, T]
    parts = []
    for piece in view.pieces:
        chosen = slice(piece.start, piece.stop)
        piece_mask = None if mask is None else mask[..., chosen]
        if as_codes is not None:
            piece_mask = as_codes[:, chosen] if piece_mask is None else piece_mask & as_codes[:, chosen]
        keys, values = (view.key_codec, piece.keys), (view.value_codec, piece.values)
        parts.append(attend(query, keys, values, piece.rotation, piece_mask, scale, softcap))
    exact_mask = mask
    if exact_mask is not None:
        if as_codes is not None:
            exact_mask = exact_mask & ~(as_codes & (slots >= view.sinks))
        exact_mask = torch.cat((exact_mask[..., : view.sinks], exact_mask[..., view.exact_start :]), -1)
    if view.keys.shape[2]:
        parts.append(_attend_exact(query, view.keys, view.values, exact_mask, scale, softcap))
    return ops.merge(parts)[0]


def _attend_exact(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    read = lambda start, stop: (keys[:, :, start:stop], values[:, :, start:stop])  # noqa: E731
    return ops.attend_tiles(query, read, keys.shape[2], mask, scale, softcap)


def _mask(attention_mask: Tensor | None, query: Tensor, length: int) -> Tensor:
    """A bool mask `[B or 1, 1, Q, T]`, True where a query may look."""
    if attention_mask is None:
        queries = query.shape[2]
        slots = torch.arange(length, device=query.device)
        return (slots <= slots[length - queries :, None])[None, None]
    mask = attention_mask[..., :length]
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if bool((mask[~allowed] > -1e4).any()):
        raise InputError("a mask of 0 and minus infinity", "an attention bias", "use a model without attention biases")
    return allowed

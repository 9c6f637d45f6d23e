"""The attention function a model runs while kvfold is attached: codes and exact tokens separately, joined by lse."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfold import ops
from kvfold.cache.view import CacheView
from kvfold.errors import InputError

_QUERIES = 8192  # of a call
_MASKED_QUERIES = 1024  # of one with a mask


def codes_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **given: Any,
) -> Tensor | None:
    """transformers' bool mask `[B, 1, Q, T]`, or None for plain causal attention: behind earlier tokens too, where transformers
    makes a mask, since PyTorch's causal flag is for queries that begin at the first key."""
    newest = isinstance(q_offset, int) and q_offset + q_length == kv_length and not given.get("kv_offset")
    if allow_is_causal_skip and newest and local_size is None and _no_padding(attention_mask, kv_length):
        return None
    from transformers.masking_utils import sdpa_mask  # takes seconds to import; whoever has a model has it already

    given |= {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "attention_mask": attention_mask}
    return sdpa_mask(**given, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip)


def _no_padding(attention_mask: Tensor | None, length: int) -> bool:
    return attention_mask is None or (attention_mask.shape[-1] == length and bool(attention_mask.all()))


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

    `attention_mask` is what `codes_mask` makes: bool `[B, 1, Q, T]`, or None for plain causal attention.

    Returns:
        `[B, Q, H, D]` in the query's dtype, and None for the weights, which are never whole.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, CacheView):
        if dropout:
            raise InputError("attention without dropout on codes", f"dropout {dropout}", "call model.eval() first")
        out = _attend_view(query, key, attention_mask, scale, softcap)
    elif softcap is not None or (attention_mask is None and 1 < query.shape[2] < key.shape[2]):  # not PyTorch's causal
        if attention_mask is None:
            ends = _ends(key.shape[2], query)
            mask: ops.Mask = ops.Spans.of(torch.zeros_like(ends), ends)
        else:
            mask = _mask(attention_mask, key.shape[2], slice(None))
        out = ops.attend_exact(query, key, value, mask, scale, softcap)[0]
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _attend_view(query: Tensor, view: CacheView, attention_mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Queries in chunks, so that what is made of them, and of masks `[Q, T]`, stays small beside the cache."""
    queries = query.shape[2]
    if queries == 1 and attention_mask is None:
        return _attend(query, view, _Masks([None] * len(view.pieces), None), scale, softcap)
    parts, chunk = [], _QUERIES if attention_mask is None else _MASKED_QUERIES
    for start in range(0, queries, chunk):
        rows = slice(start, min(start + chunk, queries))
        boundaries = None if view.boundaries is None else view.boundaries[rows]
        if attention_mask is None:
            masks = _causal(view, _ends(view.length, query)[rows], boundaries)
        else:
            masks = _masked(view, _mask(attention_mask, view.length, rows), boundaries)
        parts.append(_attend(query[:, :, rows], view, masks, scale, softcap))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class _Masks(NamedTuple):
    """Of some queries: of each coded piece, and of the exact tokens; None where they see all."""

    pieces: list[ops.Mask | None]
    exact: ops.Mask | None


def _ends(length: int, query: Tensor) -> Tensor:
    """First slot behind each query's own, int64 `[Q]`: the queries are the newest of `length` tokens."""
    return torch.arange(length - query.shape[2], length, device=query.device) + 1


def _causal(view: CacheView, ends: Tensor, boundaries: Tensor | None) -> _Masks:
    """Of queries that see all slots below `ends [Q]`, those below `boundaries [Q]` as codes (None: see `CacheView`)."""
    zero, shift = torch.zeros_like(ends), view.sinks - view.exact_start
    starts = zero + view.exact_start if boundaries is None else boundaries
    exact = ops.Spans.of(zero, ends.clamp_max(view.sinks), starts + shift, ends + shift)
    if boundaries is None:
        return _Masks([None] * len(view.pieces), exact)
    return _Masks([ops.Spans.of(zero, boundaries - piece.start) for piece in view.pieces], exact)


def _masked(view: CacheView, mask: Tensor, boundaries: Tensor | None) -> _Masks:
    """Of queries that see what a bool `mask [B or 1, 1, Q, T]` of all slots says."""
    tail = mask[..., view.exact_start :]
    pieces = [mask[..., piece.start : piece.stop] for piece in view.pieces]
    if boundaries is not None:
        coded = torch.arange(view.length, device=mask.device) < boundaries[:, None]
        tail = tail & ~coded[:, view.exact_start :]
        pieces = [seen & coded[:, piece.start : piece.stop] for seen, piece in zip(pieces, view.pieces, strict=True)]
    return _Masks(list(pieces), torch.cat((mask[..., : view.sinks], tail), -1))


def _attend(query: Tensor, view: CacheView, masks: _Masks, scale: float, softcap: float | None) -> Tensor:
    exact = ops.Exact(view.keys, view.values, masks.exact) if view.keys.shape[2] else None
    if not view.pieces:
        assert exact is not None
        return ops.attend_exact(query, *exact, scale, softcap)[0]
    parts = []
    for piece, mask in zip(view.pieces, masks.pieces, strict=True):
        too = exact if piece is view.pieces[-1] else None  # in one call with the newest coded tokens
        parts.append(piece.reader.attend(query, mask, scale, softcap, too))
    return ops.merge(parts)[0]


def _mask(attention_mask: Tensor, length: int, rows: slice) -> Tensor:
    """A bool mask `[B or 1, 1, Q, T]` of the queries `rows`, True where a query may look."""
    mask = attention_mask[:, :, rows, :length]
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if bool((mask[~allowed] > -1e4).any()):
        raise InputError("a mask of 0 and minus infinity", "an attention bias", "use a model without attention biases")
    return allowed

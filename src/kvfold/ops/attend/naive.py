"""Attention over a set of keys that is never held whole: tiles, running maximum and sum (online softmax, float32).

`attend_tiles` reads dense keys and values tile by tile from a callback, so it serves every codec and exact tokens;
`attend` is residual-VQ's fused op as plain PyTorch: it decodes (and rotates) one tile at a time. Both return
`(out, lse)` so that disjoint segments can be merged. Cost: every code is decoded once per block of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.ops.attend.spans import Mask, mask_of
from kvfold.ops.decode.naive import decode
from kvfold.ops.merge import merge
from kvfold.ops.rope import rotate
from kvfold.packing import unpack, unpack_scale

_KEY_TILE = 512
_QUERY_TILE = 256


class Coded(NamedTuple):
    """One side's residual codes as plain tensors.

    packed uint8 `[B, G, T, bytes]` (stage-major codes) · scale `[B, G, T, 1]`, float16 or uint8 of `packing.pack_scale` ·
    codebooks `[M, C, d]` · book int64 `[S, G, P]` · channels int64 `[P, d]`, the channel each group entry came from · bits of
    one code · center float32 `[G, D]` of keys that were coded around it, after RoPE; None if they were not.
    """

    packed: Tensor
    scale: Tensor
    codebooks: Tensor
    book: Tensor
    channels: Tensor
    bits: int
    center: Tensor | None = None


class Rotation(NamedTuple):
    """How pre-RoPE keys are rotated when read: positions `[B, T]`, inv_freq float32 `[n]`, factor, pair layout."""

    positions: Tensor
    inv_freq: Tensor
    factor: float
    interleaved: bool

    def slice(self, start: int, stop: int) -> Rotation:
        """Of tokens `start..stop-1`."""
        return self._replace(positions=self.positions[:, start:stop])


@dataclass(eq=False)
class Past:
    """Coded keys and values, and how the keys are rotated (None if the codes hold rotated keys), that queries come to again and
    again; `ready` is what a backend keeps of them from one time to the next."""

    key: Coded
    value: Coded
    rotation: Rotation | None = None
    ready: Any = field(default=None, repr=False)


class Exact(NamedTuple):
    """Tokens attended exactly beside coded ones: keys (rotated) and values `[B, G, E, D]`, and their mask as in `attend`."""

    keys: Tensor
    values: Tensor
    mask: Mask | None


def rotated_center(center: Tensor, rotation: Rotation) -> Tensor:
    """`center [G, D]` at every position, float32 `[B or 1, G, T, D]`."""
    return rotate(center[None, :, None].expand(len(rotation.positions), -1, rotation.positions.shape[1], -1), *rotation)


def attend(
    query: Tensor,
    key: Coded,
    value: Coded,
    rotation: Rotation | None,
    mask: Mask | None,
    softmax_scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of rotated queries over residual codes.

    Args:
        query: `[B, H, Q, D]`, after RoPE.
        key, value: codes of `T` tokens, `G` heads; `H` is a multiple of `G`.
        rotation: for keys coded before RoPE; None if the codes hold rotated keys. If `key` has a center, it alone is rotated,
            and added to what is decoded.
        mask: bool `[B or 1, 1, Q, T]`, True where a query may look, or spans of keys; None means everywhere.
        softmax_scale: multiplies `q . k`.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2), None for no cap.

    Returns:
        out float32 `[B, H, Q, D]` and lse float32 `[B, H, Q]`, natural log; 0 and -inf for a query that sees no key.
    """

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys = decode_tile(key, start, stop)
        if rotation is not None:
            tile = rotation.slice(start, stop)
            keys = rotate(keys, *tile) if key.center is None else keys + rotated_center(key.center, tile)
        return keys, decode_tile(value, start, stop)

    return attend_tiles(query, read, key.packed.shape[2], mask, softmax_scale, softcap)


def attend_exact(
    query: Tensor, keys: Tensor, values: Tensor, mask: Mask | None, softmax_scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `attend`, over exact `keys [B, G, T, D]` (rotated) and `values [B, G, T, D]`."""

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return keys[:, :, start:stop], values[:, :, start:stop]

    return attend_tiles(query, read, keys.shape[2], mask, softmax_scale, softcap)


def attend_both(
    attend: Callable,
    attend_exact: Callable,
    query: Tensor,
    past: Past,
    mask: Mask | None,
    exact: Exact | None,
    softmax_scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` and `attend_exact`, joined: over coded tokens and exact ones, if any. One call where a backend has it."""
    coded = attend(query, past.key, past.value, past.rotation, mask, softmax_scale, softcap)
    if exact is None:
        return coded
    return merge([coded, attend_exact(query, exact.keys, exact.values, exact.mask, softmax_scale, softcap)])


def decode_tile(coded: Coded, start: int, stop: int) -> Tensor:
    """Tokens `start..stop-1` of one side as float32 `[B, G, T, D]`."""
    packed, scale = coded.packed[:, :, start:stop], coded.scale[:, :, start:stop]
    stages, groups = coded.book.shape[0], coded.book.shape[2]
    codes = unpack(packed, coded.bits, stages * groups).unflatten(-1, (stages, groups))
    grouped = decode(codes, coded.codebooks, coded.book).flatten(-2)
    return grouped.index_select(-1, coded.channels.flatten().argsort()) * unpack_scale(scale)


def attend_tiles(
    query: Tensor,
    read: Callable[[int, int], tuple[Tensor, Tensor]],
    length: int,
    mask: Mask | None,
    softmax_scale: float,
    softcap: float | None = None,
    block: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attention over `length` keys that `read(start, stop)` returns as dense `(keys, values) [B, G, stop - start, D]`.

    `start` is a multiple of `block`, for codes that can be cut there only. Other arguments and results as in `attend`. Blocks
    of queries that a tile is masked for are skipped.
    """
    batch, heads, queries, _ = query.shape
    out: Tensor | None = None
    lse = torch.full((batch, heads, queries), -torch.inf, device=query.device)
    tile = max(_KEY_TILE // block, 1) * block
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        tile_mask = mask_of(mask, start, stop)
        blocks = _query_blocks(queries, tile_mask)
        if not blocks:
            continue
        keys, values = (t.float() for t in read(start, stop))
        if out is None:
            out = torch.zeros(batch, heads, queries, values.shape[-1], device=query.device)
        for first, last in blocks:
            part_mask = None if tile_mask is None else tile_mask[:, :, first:last]
            part = _attend_dense(query[:, :, first:last].float(), keys, values, part_mask, softmax_scale, softcap)
            _accumulate(out[:, :, first:last], lse[:, :, first:last], *part)
    if out is None:  # nothing was read; the values' dim is that of an empty tile
        out = torch.zeros(batch, heads, queries, read(0, 0)[1].shape[-1], device=query.device)
    return out, lse


def _query_blocks(queries: int, mask: Tensor | None) -> list[tuple[int, int]]:
    """Blocks of queries of which at least one sees a key of the tile."""
    blocks = [(q, min(q + _QUERY_TILE, queries)) for q in range(0, queries, _QUERY_TILE)]
    return blocks if mask is None else [(a, b) for a, b in blocks if bool(mask[:, :, a:b].any())]


def _attend_dense(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, softmax_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, -1, dim)  # query heads of one KV head share its keys
    scores = (grouped @ keys.transpose(-1, -2)).view(batch, heads, queries, -1) * softmax_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    mixed = (weights.view(batch, kv_heads, -1, weights.shape[-1]) @ values).view(batch, heads, queries, -1)
    return mixed / total.clamp_min(torch.finfo(torch.float32).tiny), (top + total.log()).squeeze(-1)


def _accumulate(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a tile's result into the running one, in place (the two-part case of `merge`)."""
    share = torch.sigmoid(part_lse - lse).nan_to_num(0.0)  # exp(part_lse) / (exp(lse) + exp(part_lse))
    out.lerp_(part, share[..., None])
    lse.copy_(torch.logaddexp(lse, part_lse))

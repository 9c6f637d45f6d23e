"""Attention of a decode step over codes that lie in pages, as a serving engine keeps them.

The definition: every row's codes are gathered through its block table and attended like any others. On a CPU that is one C++ op
for all rows (csrc/attend_pages.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvfold.ops.attend.naive import Coded, Rotation


def attend_pages(
    attend: Callable,
    query: Tensor,
    key: Coded,
    value: Coded,
    table: Tensor,
    lengths: Sequence[int],
    rotation: Rotation | None,
    softmax_scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of rows of one query each, every row over its own pages.

    Args:
        attend: the op that attends to what was gathered, as `naive.attend`.
        query: `[R, H, D]`, after RoPE.
        key, value: codes of all pages: `packed [N, G, block, bytes]` and `scale [N, G, block, 1]`, a token's fields together.
        table: integers `[R, n]`, pages of each row in order; what lies behind a row's last page is not looked at.
        lengths: tokens of each row, 0 for a row that is not there.
        rotation: of positions 0 to the longest row's end, `[1, T]`; None for keys that are read as they are.

    Returns:
        float32 `[R, H, D]`; zeros for a row that is not there.
    """
    out = torch.zeros(len(query), query.shape[1], value.channels.numel(), device=query.device)
    for rows in alike(lengths):
        ends = [lengths[row] for row in rows]
        own = [_gathered(side, table[rows], max(ends)) for side in (key, value)]
        slot = torch.arange(max(ends), device=query.device)
        mask = (slot < torch.tensor(ends, device=query.device)[:, None])[:, None, None]
        turn = None if rotation is None else rotation.slice(0, max(ends))
        mixed = attend(query[rows][:, :, None], *own, turn, None if bool(mask.all()) else mask, softmax_scale, softcap)[0]
        out[rows] = mixed[:, :, 0]
    return out


def _gathered(side: Coded, table: Tensor, length: int) -> Coded:
    """The codes of rows whose pages `table [R, n]` lists, `[R, G, length, ...]`; behind a row's own end they are another's."""
    pages = table[:, : -(-length // side.packed.shape[2])].long().clamp(0, len(side.packed) - 1)
    packed, scale = (field[pages].transpose(1, 2).flatten(2, 3)[:, :, :length] for field in (side.packed, side.scale))
    return side._replace(packed=packed, scale=scale)


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Rows that are there, in groups whose longest is at most a quarter longer than the shortest: a group costs its longest
    for each."""
    groups: list[list[int]] = []
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: lengths[row]):
        if groups and 4 * lengths[row] <= 5 * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups

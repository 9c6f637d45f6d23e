"""Residual nearest-codeword search in plain PyTorch, float32: the definition the other backends must match.

Stage `s` takes the residual `r` of the stages before, picks `argmin_j ||r - C[j]||^2` and subtracts the codeword.
`||r||^2` is the same for every `j`, so the search maximizes `r . C[j] - ||C[j]||^2 / 2`. Ties go to the lowest index.
With `beam > 1` the best `beam` partial codes are kept after every stage, ordered by squared error, then by (rank of the
parent, codeword index); Babenko & Lempitsky, CVPR 2014, section 3. Cost: 2 * C * d multiply-adds a stage and beam.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.packing import pack_scale, unpack_scale

_CONSTANT = 1024  # a vector so many times larger than its spread would leave float16 if divided by it
# Scores of one block of rows stay in a CPU's second-level cache; the result does not depend on it.
_BLOCK_SCORES = 1 << 18


def encode(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int = 1) -> Tensor:
    """Codes of scaled vectors.

    Args:
        vectors: float `[B, G, T, P, d]`.
        codebooks: float `[M, C, d]`.
        book: integers `[S, G, P]`, which of the `M` codebooks stage `s` of head `g`, group `p` uses.
        beam: partial codes kept after each stage; 1 is greedy.

    Returns:
        int32 `[B, G, T, S, P]`.
    """
    batch, heads, tokens, groups, _ = vectors.shape
    stages = book.shape[0]
    codes = torch.empty(batch, heads, tokens, stages, groups, dtype=torch.int32, device=vectors.device)
    columns = book.reshape(stages, -1)  # one column of books per (head, group); equal columns are searched together
    kinds, which = torch.unique(columns, dim=1, return_inverse=True)
    which = which.view(heads, groups)
    for kind in range(kinds.shape[1]):
        heads_of, groups_of = (which == kind).nonzero(as_tuple=True)
        chosen = vectors[:, heads_of, :, groups_of].float()  # [pairs, B, T, d]
        tables = codebooks.float()[kinds[:, kind]]
        found = encode_rows(chosen.reshape(-1, chosen.shape[-1]), tables, beam)
        codes[:, heads_of, :, :, groups_of] = found.view(*chosen.shape[:-1], stages)
    return codes


def scaled_groups(x: Tensor, channels: Tensor, weights: Tensor | None, scale_bits: int) -> tuple[Tensor, Tensor]:
    """What the search sees of vectors, and their scales as stored.

    The scale is the standard deviation over the channels (N - 1 in the divisor); the largest magnitude for a vector that is
    constant but for rounding, 0 for one of zeros.

    Args:
        x: float `[B, G, T, D]`.
        channels: integers `[P, d]`, which channels are a group.
        weights: float `[G, P, d, d]` that groups are multiplied by from the right; None for none.
        scale_bits: 16, or 8 for `packing.pack_scale`.

    Returns:
        float32 `[B, G, T, P, d]`, and float16 or uint8 `[B, G, T, 1]`.
    """
    x = x.float()
    spread, peak = x.std(-1, keepdim=True), x.abs().amax(-1, keepdim=True)
    scale = torch.where(spread * _CONSTANT < peak, peak, spread)
    scale = pack_scale(scale) if scale_bits == 8 else scale.clamp_max(torch.finfo(torch.float16).max).half()
    divisor = unpack_scale(scale)
    vectors = (x / torch.where(divisor > 0, divisor, 1.0))[..., channels]
    return vectors if weights is None else torch.einsum("bgtpd,gpde->bgtpe", vectors, weights.float()), scale


def encode_rows(rows: Tensor, tables: Tensor, beam: int) -> Tensor:
    """Codes int32 `[N, S]` of float32 `rows [N, d]` under one book a stage, `tables [S, C, d]`."""
    step = _greedy if beam == 1 else _beam
    stages = [(table, _scoring(table)) for table in tables]
    blocks = rows.split(_block_rows(tables.shape[1] * beam))
    return torch.cat([step(part, stages, beam) for part in blocks])


def _block_rows(scores: int) -> int:
    return max(64, _BLOCK_SCORES // scores)


def _scoring(table: Tensor) -> Tensor:
    """`[d + 1, C]`: codewords as columns, and minus half their squared length to go with a 1 behind the vector."""
    return torch.cat((table, (table * table).sum(1, keepdim=True) * -0.5), 1).T.contiguous()


def _closeness(rows: Tensor, scoring: Tensor) -> Tensor:
    """`r . C[j] - ||C[j]||^2 / 2` for all rows and codewords, `[N, C]`."""
    if len(rows) == 1:  # a matrix-vector product may round equal columns differently, which would break ties at random
        return _closeness(rows.expand(2, -1), scoring)[:1]
    return torch.nn.functional.pad(rows, (0, 1), value=1.0) @ scoring


def _greedy(rows: Tensor, stages: list[tuple[Tensor, Tensor]], _: int) -> Tensor:
    residual, codes = rows, []
    for table, scoring in stages:
        index = _closeness(residual, scoring).max(1).indices
        residual = residual - table[index]
        codes.append(index.to(torch.int32))
    return torch.stack(codes, 1)


def _beam(rows: Tensor, stages: list[tuple[Tensor, Tensor]], beam: int) -> Tensor:
    count, dim = rows.shape
    residual = rows[:, None]  # [N, width, d]
    codes = torch.empty(count, 1, 0, dtype=torch.int32, device=rows.device)
    for table, scoring in stages:
        width, size = residual.shape[1], len(table)
        flat = residual.reshape(-1, dim)
        error = (flat * flat).sum(1, keepdim=True) - 2 * _closeness(flat, scoring)
        kept = _lowest(error.view(count, width * size), min(beam, width * size))
        parent, index = kept // size, kept % size
        residual = residual.gather(1, parent[..., None].expand(-1, -1, dim)) - table[index]
        codes = torch.cat((codes.gather(1, parent[..., None].expand(-1, -1, codes.shape[-1])), index[..., None].int()), -1)
    return codes[:, 0]


def _lowest(error: Tensor, count: int) -> Tensor:
    """Columns of the `count` lowest errors of each row, ascending, ties by column: float bits order like integers."""
    bits = error.contiguous().view(torch.int32).long()
    order = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    key = (order << 32) + torch.arange(error.shape[1], device=error.device)
    return key.topk(count, largest=False, sorted=True).values & 0xFFFFFFFF

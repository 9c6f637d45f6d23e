"""The definitions written out, slow and in float64: what the ops are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.ops import Coded
from kvfold.packing import unpack


def residual_codes(rows: Tensor, tables: Tensor, beam: int = 1) -> Tensor:
    """Codes `[N, S]` of `rows [N, d]` under `tables [S, C, d]`: hypotheses ordered by error, parent's rank, codeword."""
    found = []
    for row in rows.double():
        kept: list[tuple[list[int], Tensor]] = [([], row)]
        for table in tables.double():
            errors = torch.stack([(residual - table).square().sum(1) for _, residual in kept])
            best = sorted((error, i) for i, error in enumerate(errors.flatten().tolist()))[:beam]
            parents = [(kept[i // len(table)], i % len(table)) for _, i in best]
            kept = [([*codes, j], residual - table[j]) for (codes, residual), j in parents]
        found.append(kept[0][0])
    return torch.tensor(found, dtype=torch.int32).view(len(rows), len(tables))


def decoded(coded: Coded) -> Tensor:
    """Vectors `[B, G, T, D]` of one side's codes."""
    stages, heads, groups = coded.book.shape
    codes = unpack(coded.packed, coded.bits, stages * groups).unflatten(-1, (stages, groups)).long()
    out = torch.zeros(*codes.shape[:3], coded.channels.numel(), dtype=torch.float64)
    for stage in range(stages):
        for head in range(heads):
            for group in range(groups):
                table = coded.codebooks[coded.book[stage, head, group]].double()
                out[:, head, :, coded.channels[group]] += table[codes[:, head, :, stage, group]]
    return out * coded.scale.double()


def rotated(x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float, interleaved: bool) -> Tensor:
    """RoPE as multiplication by `factor * exp(i * angle)`."""
    n = len(inv_freq)
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    out = x.double().clone()
    angle = positions[:, None, :, None].double() * inv_freq.double()
    turned = torch.complex(out[..., first], out[..., second]) * torch.polar(torch.full_like(angle, factor), angle)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp; a query that sees nothing gets 0 and -inf."""
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(repeats, 1) for t in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ values, torch.logsumexp(scores, -1)

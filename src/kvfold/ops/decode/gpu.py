"""Codes back to vectors in Triton, the vectors of `naive.decode` bit for bit.

Bound by memory: a program reads the codes of a block of group vectors and writes `4 d` bytes for each, both in the order they
lie in; codewords come from the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.ops.interpreter import interpreted


def decode(codes: Tensor, codebooks: Tensor, book: Tensor) -> Tensor:
    """As `naive.decode`.

    A code that names no codeword is read as the nearest that does, without an error: telling would mean to wait for the GPU.
    """
    batch, heads, tokens, stages, groups = codes.shape
    size, dim = codebooks.shape[1:]
    if book.shape != (stages, heads, groups):
        raise ValueError(f"shape of codes {tuple(codes.shape)}, book {tuple(book.shape)}")
    vectors = torch.empty((batch, heads, tokens, groups, dim), dtype=torch.float32, device=codes.device)
    if not vectors.numel():
        return vectors
    padded = triton.next_power_of_2(dim)
    rows = max(1, (1 << 16 if interpreted() else 2048) // padded)
    grid = (batch * heads * triton.cdiv(tokens * groups, rows),)
    with torch.cuda.device_of(codes):
        _decode[grid](
            codes, codebooks.contiguous(), book.contiguous(), vectors,
            heads, tokens, groups, stages, size, dim, *codes.stride(), ROWS=rows, DIM=padded,
        )  # fmt: skip
    return vectors


@triton.jit
def _decode(
    codes, table, book, vectors,
    heads, tokens, groups, stages, size, dim, by_batch, by_head, by_token, by_stage, by_group,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tokens * groups, ROWS)
    pair = program // blocks
    row = program % blocks * ROWS + tl.arange(0, ROWS)  # (token, group) of one head
    here = row < tokens * groups
    token, group, channel = row // groups, row % groups, tl.arange(0, DIM)
    start = codes + (pair // heads) * by_batch + (pair % heads) * by_head + token * by_token + group * by_group
    inside = here[:, None] & (channel < dim)[None, :]
    total = tl.zeros([ROWS, DIM], tl.float32)
    for stage in range(0, stages):
        which = tl.load(book + (stage * heads + pair % heads) * groups + group, mask=here, other=0).to(tl.int64)
        code = tl.load(start + stage * by_stage, mask=here, other=0).to(tl.int64)
        word = which * size + tl.minimum(tl.maximum(code, 0), size - 1)
        total += tl.load(table + word[:, None] * dim + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    place = (pair * tokens * groups + row)[:, None] * dim + channel[None, :]
    tl.store(vectors + place, total, mask=inside)

"""Residual nearest-codeword search in Triton: one kernel runs all stages of a block of vectors, the codes of `naive.encode`.

Residuals, scores and hypotheses stay in registers; codebooks come from the caches chunk by chunk. So memory hardly matters:
greedy search is bound by its products, `2 C d` operations a stage and vector, and by finding the best of `C` scores, a beam by
selection, which passes over the scores of a chunk once for each hypothesis that is kept.

Codewords in float16 meet residuals split into two float16 numbers, which keep 22 of 24 bits: two products on tensor cores,
added in float32. Codewords of other types are multiplied as `tf32x3`: both factors are split into two of 11 bits, and three of
their four products are added, at six times the cost. One product alone picks other codewords for some vectors. As with the
CPU's op, two codewords whose distances differ by less than float32 resolves may be taken one for the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.errors import InputError
from kvfold.ops.interpreter import interpreted
from kvfold.packing import pack

_WIDEST_BEAM, _LARGEST_GROUP = 16, 1024
# An order of no float that a search meets, and what is larger than every key.
_ABSENT = tl.constexpr(0x7FFFFFFF << 32)
_TAKEN = tl.constexpr((1 << 63) - 1)


def encode(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int = 1) -> Tensor:
    """As `naive.encode`, for a beam of up to 16; `InputError` for a wider one."""
    return _search(vectors, codebooks, book, beam, torch.int32)


def encode_packed(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int, bits: int) -> Tensor:
    """`packing.pack(encode(...).flatten(-2), bits)`, uint8 `[B, G, T, n]`; whole bytes leave the kernel as they are stored."""
    whole = {8: torch.uint8, 16: torch.int16}.get(bits)
    codes = _search(vectors, codebooks, book, beam, whole or torch.int32).flatten(-2)
    return pack(codes, bits) if whole is None else codes.view(torch.uint8)


def code(
    x: Tensor,
    codebooks: Tensor,
    book: Tensor,
    channels: Tensor,
    weights: Tensor | None,
    bits: int,
    beam: int = 1,
    scale_bits: int = 16,
) -> tuple[Tensor, Tensor]:
    """As `code.code`, in two kernels; a product with `weights` between them is PyTorch's."""
    vectors, scale = scaled_groups(x, channels, scale_bits)
    if weights is not None:
        vectors = torch.einsum("bgtpd,gpde->bgtpe", vectors, weights.float())
    return encode_packed(vectors, codebooks, book, beam, bits), scale


def scaled_groups(x: Tensor, channels: Tensor, scale_bits: int) -> tuple[Tensor, Tensor]:
    """As `code.scaled_groups` of `x [B, G, T, D]`, sums rounded in another order; one pass over the vectors."""
    batch, heads, tokens, width = x.shape
    vectors = torch.empty((batch, heads, tokens, *channels.shape), dtype=torch.float32, device=x.device)
    scale = torch.empty((batch, heads, tokens, 1), dtype=torch.uint8 if scale_bits == 8 else torch.float16, device=x.device)
    if not scale.numel():
        return vectors, scale
    padded = triton.next_power_of_2(width)
    rows = max(1, (1 << 16 if interpreted() else 4096) // padded)
    with torch.cuda.device_of(x):
        _scaled[(batch * heads * triton.cdiv(tokens, rows),)](
            x, channels.contiguous(), vectors, scale, heads, tokens, *x.stride(), WIDTH=width, ROWS=rows, PADDED=padded
        )
    return vectors, scale


def encode_statistics(rows: Tensor, tables: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy codes and what a moving average of codebooks needs, in one pass.

    Sums are added atomically, in any order: unlike codes and counts they are not the same to the last bit every time.

    Args:
        rows: float `[N, d]`.
        tables: float `[S, C, d]`.
        mask: bool `[N]`, False for rows that are coded but do not count; None counts all.

    Returns:
        `(codes, counts, sums, squared_error)`: int32 `[N, S]`; float32 `[S, C]`, `[S, C, d]` and a scalar.
    """
    if mask is not None and mask.shape != rows.shape[:1]:
        raise ValueError(f"shape of rows {tuple(rows.shape)}, mask {tuple(mask.shape)}")
    stages = len(tables)
    counts, sums = (rows.new_zeros(shape, dtype=torch.float32) for shape in (tables.shape[:2], tables.shape))
    error = rows.new_zeros((), dtype=torch.float32)
    counted = None if mask is None else mask.contiguous()
    book = torch.arange(stages, device=rows.device)[:, None, None]
    codes = _search(rows[None, None, :, None], tables, book, 1, torch.int32, (counted, counts, sums, error))
    return codes.view(-1, stages), counts, sums, error


def _search(
    vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int, dtype: torch.dtype, statistics: tuple = (None,) * 4
) -> Tensor:
    batch, heads, tokens, groups, dim = vectors.shape
    if not 1 <= beam <= _WIDEST_BEAM:
        fix = "take a narrower beam, or the backend naive"
        raise InputError(f"a beam of 1 to {_WIDEST_BEAM} on a GPU", str(beam), fix)
    if dim > _LARGEST_GROUP:
        fix = "take smaller groups, or the backend naive"
        raise InputError(f"groups of at most {_LARGEST_GROUP} channels on a GPU", str(dim), fix)
    if book.shape[1:] != (heads, groups) or codebooks.shape[2] != dim:
        raise ValueError(
            f"shape of vectors {tuple(vectors.shape)}, codebooks {tuple(codebooks.shape)}, book {tuple(book.shape)}"
        )
    stages, size = len(book), codebooks.shape[1]
    codes = torch.empty((batch, heads, tokens, stages, groups), dtype=dtype, device=vectors.device)
    if not codes.numel():
        return codes
    table = (codebooks if codebooks.dtype == torch.float16 else codebooks.float()).contiguous()
    half = table.float().square().sum(-1) * 0.5
    given = (vectors, table, half, book.contiguous(), codes)
    shape = (heads, tokens, groups, stages, *vectors.stride())
    tiles = _tiles(tokens, size, dim, beam)
    grid = (batch * heads * groups * triton.cdiv(tokens, tiles["ROWS"]),)
    with torch.cuda.device_of(vectors):
        if beam == 1:
            _greedy[grid](*given, *statistics, *shape, **tiles)
        else:
            places = {"BEAM": beam, "WIDTH": triton.next_power_of_2(beam), "STAGES": triton.next_power_of_2(stages)}
            _beam[grid](*given, *shape, **tiles, **places)
    return codes


def _tiles(tokens: int, size: int, dim: int, beam: int) -> dict[str, int]:
    """Vectors of a program, codewords of a chunk and padded channels, powers of 2; a product takes at least 16 of each."""
    width, padded = triton.next_power_of_2(beam), max(16, triton.next_power_of_2(dim))
    if interpreted():  # every step costs the same there, so there should be few; 2^20 numbers are the most of a tensor
        flat = min(4096, (1 << 20) // padded)
        chunk = (1 << 20) // max(16, min(flat, width * triton.next_power_of_2(tokens)))
    else:  # 64 is what the matrix unit takes of four warps; the rest is what their registers hold, up to 128 channels
        flat, chunk = 64 if padded <= 256 else 16, min(64, 2048 // padded) if beam == 1 else min(256, 8192 // padded)
    return {
        "ROWS": max(1, 16 // width, min(flat // width, triton.next_power_of_2(tokens))),
        "CHUNK": max(16, min(chunk, triton.next_power_of_2(size))),
        "DIM": padded,
        "SIZE": size,
        "REAL": dim,
        "num_warps": 4 if padded <= 128 else 8,
        "num_stages": 3 if padded <= 128 else 2,
    }


@triton.jit
def _scaled(
    x, channels, vectors, scale, heads, tokens, by_batch, by_head, by_token, by_channel,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Vectors of `ROWS` tokens of a head, over their scale as stored and in the order of groups (`code.scaled_groups`)."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(tokens, ROWS)
    pair, token = program // blocks, program % blocks * ROWS + tl.arange(0, ROWS)
    entry = tl.arange(0, PADDED)
    real, here = (entry < WIDTH)[None, :], token < tokens
    there = here[:, None] & real
    channel = tl.load(channels + entry, mask=entry < WIDTH, other=0)
    start = x + (pair // heads) * by_batch + (pair % heads) * by_head + token * by_token
    given = tl.load(start[:, None] + channel[None, :] * by_channel, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(given, 1) / WIDTH
    away = tl.where(real, given - mean[:, None], 0.0)
    spread = tl.sqrt(tl.sum(away * away, 1) / (WIDTH - 1))
    peak = tl.max(tl.abs(given), 1)
    spread = tl.where(spread * 1024 < peak, peak, spread)  # constant but for rounding
    if scale.dtype.element_ty == tl.uint8:  # packing.pack_scale
        bits = tl.minimum(spread, 61440.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        stored = (bits + 64) >> 7
        tl.store(scale + pair * tokens + token, stored.to(tl.uint8), mask=here)
        by = (stored << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        half = tl.minimum(spread, 65504.0).to(tl.float16)
        tl.store(scale + pair * tokens + token, half, mask=here)
        by = half.to(tl.float32)
    by = tl.where(by > 0, by, 1.0)
    tl.store(vectors + (pair * tokens + token)[:, None] * WIDTH + entry[None, :], given / by[:, None], mask=there)


@triton.jit
def _place(heads, tokens, groups, ROWS: tl.constexpr):
    """What a program works on: `(batch, head)`, tokens, group. Groups of a token are neighbours in memory, and run together."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tokens, ROWS)
    token = (program // groups) % blocks * ROWS + tl.arange(0, ROWS)
    return program // groups // blocks, token, program % groups


@triton.jit
def _load(
    vectors, pair, token, group, heads, tokens, by_batch, by_head, by_token, by_group, by_channel,
    DIM: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Vectors `[ROWS, DIM]` as float32, zeros behind the last token and channel."""
    channel = tl.arange(0, DIM).to(tl.int64)
    start = vectors + (pair // heads) * by_batch + (pair % heads) * by_head + group * by_group
    inside = (token < tokens)[:, None] & (channel < REAL)[None, :]
    return tl.load(start + token[:, None] * by_token + channel[None, :] * by_channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _closeness(residual, words, half, start, CHUNK: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, REAL: tl.constexpr):
    """`r . C[j] - ||C[j]||^2 / 2` for the codewords of a chunk; minus infinity behind the last."""
    column = start + tl.arange(0, CHUNK)
    channel = tl.arange(0, DIM)
    at = words + column[None, :] * REAL + channel[:, None]
    if SIZE % CHUNK == 0 and REAL == DIM:
        chunk, length = tl.load(at), tl.load(half + column)
    else:
        chunk = tl.load(at, mask=(channel < REAL)[:, None] & (column < SIZE)[None, :], other=0.0)
        length = tl.load(half + column, mask=column < SIZE, other=float("inf"))
    if words.dtype.element_ty == tl.float16:
        coarse = tl.minimum(tl.maximum(residual, -65504.0), 65504.0).to(tl.float16)  # what is larger is far from all codewords
        score = tl.dot((residual - coarse.to(tl.float32)).to(tl.float16), chunk)
        score = tl.dot(coarse, chunk, score)
    else:
        score = tl.dot(residual, chunk, input_precision="tf32x3")
    return score - length[None, :]


@triton.jit
def _greedy(
    vectors, table, half, book, codes, mask, counts, sums, error,
    heads, tokens, groups, stages, by_batch, by_head, by_token, by_group, by_channel,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    pair, token, group = _place(heads, tokens, groups, ROWS)
    residual = _load(vectors, pair, token, group, heads, tokens, by_batch, by_head, by_token, by_group, by_channel, DIM, REAL)
    channel = tl.arange(0, DIM)
    here = token < tokens
    counted = here
    if mask is not None:
        counted = here & (tl.load(mask + token, mask=here, other=0) != 0)
    for stage in range(0, stages):
        start = tl.load(book + (stage * heads + pair % heads) * groups + group).to(tl.int64) * SIZE
        best = tl.full([ROWS], float("-inf"), tl.float32)
        index = tl.zeros([ROWS], tl.int32)
        for first in range(0, SIZE, CHUNK):
            score = _closeness(residual, table + start * REAL, half + start, first, CHUNK, DIM, SIZE, REAL)
            top = tl.max(score, 1)
            column = first + tl.arange(0, CHUNK)
            lowest = tl.min(tl.where(score == top[:, None], column[None, :], SIZE - 1), 1)
            better = top > best  # an equal one of a later chunk is not
            index = tl.where(better, lowest, index)
            best = tl.where(better, top, best)
        tl.store(codes + ((pair * tokens + token) * stages + stage) * groups + group, index, mask=here)
        word = index[:, None] * REAL + channel[None, :]  # of one codebook: far below 2^31
        real = (channel < REAL)[None, :]
        if counts is not None:
            row = stage * SIZE
            tl.atomic_add(counts + row + index, tl.full([ROWS], 1.0, tl.float32), mask=counted, sem="relaxed")
            tl.atomic_add(sums + row.to(tl.int64) * REAL + word, residual, mask=counted[:, None] & real, sem="relaxed")
        residual -= tl.load(table + start * REAL + word, mask=real, other=0.0).to(tl.float32)
    if error is not None:
        left = tl.where(counted[:, None], residual * residual, 0.0)
        tl.atomic_add(error, tl.sum(tl.sum(left, 1), 0), sem="relaxed")


@triton.jit
def _beam(
    vectors, table, half, book, codes,
    heads, tokens, groups, stages, by_batch, by_head, by_token, by_group, by_channel,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, REAL: tl.constexpr,
    BEAM: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`BEAM` hypotheses in `WIDTH` places, those not there with the order `_ABSENT`."""
    pair, token, group = _place(heads, tokens, groups, ROWS)
    given = _load(vectors, pair, token, group, heads, tokens, by_batch, by_head, by_token, by_group, by_channel, DIM, REAL)
    channel, level = tl.arange(0, DIM), tl.arange(0, STAGES)
    rank = tl.arange(0, WIDTH).to(tl.int64)
    here = token < tokens
    residual = tl.broadcast_to(given[:, None, :], [ROWS, WIDTH, DIM])
    alive = tl.broadcast_to((rank < 1)[None, :], [ROWS, WIDTH])
    history = tl.zeros([ROWS, WIDTH, STAGES], tl.int32)
    for stage in range(0, stages):
        start = tl.load(book + (stage * heads + pair % heads) * groups + group).to(tl.int64) * SIZE
        flat = tl.reshape(residual, [ROWS * WIDTH, DIM])
        squares = tl.where(tl.reshape(alive, [ROWS * WIDTH]), tl.sum(flat * flat, 1), float("inf"))
        # Places behind the beam hold what is never the worst, so nothing replaces it.
        free = tl.where(rank < BEAM, _ABSENT, -_TAKEN) + rank
        best = tl.broadcast_to(free[None, :], [ROWS, WIDTH])
        for first in range(0, SIZE, CHUNK):
            score = _closeness(flat, table + start * REAL, half + start, first, CHUNK, DIM, SIZE, REAL)
            # As three axes from here on: a reshape of what is found in two would move all errors in every round.
            errors = tl.reshape(squares[:, None] - 2 * score, [ROWS, WIDTH, CHUNK])
            index = first + tl.arange(0, CHUNK)[None, None, :]
            for _ in range(BEAM):  # the next best of the chunk, if it is one of the best so far
                least = tl.min(errors, 2)
                found = tl.min(tl.where(errors == least[:, :, None], index, SIZE - 1), 2)
                keys = _keys(least, rank[None, :] * SIZE + found)
                key, worst = tl.min(keys, 1), tl.max(best, 1)
                replaced = (best == worst[:, None]) & (key < worst)[:, None]
                best = tl.where(replaced, key[:, None], best)
                taken = tl.where(keys == key[:, None], found, -1)
                errors = tl.where(index == taken[:, :, None], float("inf"), errors)
        best = _ascending(tl.where((rank < BEAM)[None, :], best, _ABSENT + rank[None, :]), WIDTH)
        alive = best < _ABSENT
        column = (best & 0xFFFFFFFF).to(tl.int32)
        history = tl.where((level == stage)[None, None, :], column[:, :, None], history)
        parents = tl.broadcast_to((column // SIZE)[:, :, None], [ROWS, WIDTH, DIM])
        residual = tl.gather(residual, parents, 1)
        word = (column % SIZE)[:, :, None] * REAL + channel[None, None, :]
        residual -= tl.load(table + start * REAL + word, mask=(channel < REAL)[None, None, :], other=0.0).to(tl.float32)
    parent = tl.zeros([ROWS], tl.int32)  # of the best at the end; its codes are read from the last to the first
    for back in range(0, stages):
        stage = stages - 1 - back
        taken = (rank[None, :] == parent[:, None])[:, :, None] & (level == stage)[None, None, :]
        column = tl.sum(tl.sum(tl.where(taken, history, 0), 2), 1)
        tl.store(codes + ((pair * tokens + token) * stages + stage) * groups + group, column % SIZE, mask=here)
        parent = column // SIZE


@triton.jit
def _keys(errors, column):
    """Integers that order as (error, column): float bits order like integers. An infinite error is no candidate."""
    bits = errors.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits).to(tl.int64)
    return tl.where(errors < float("inf"), (order << 32) + column, _TAKEN)


@triton.jit
def _ascending(best, WIDTH: tl.constexpr):
    """Rows sorted: the rank of a key is how many are below it."""
    place = tl.sum((best[:, None, :] < best[:, :, None]).to(tl.int32), 2)
    at = place[:, :, None] == tl.arange(0, WIDTH)[None, None, :]
    return tl.sum(tl.where(at, best[:, :, None], 0), 1)

"""A decode step's attention on residual codes in Triton: few query rows in half precision, two passes over the keys.

The first pass writes the logits of every key, the second mixes the values by their softmax. Each reads the codewords of one
side only, which therefore stay in the first-level cache (8 x 256 codewords of 32 channels in float16 are 128 KiB).

Keys after RoPE are scored from a table of `q . codeword`, where that too stays in the cache. Other keys are summed up and
multiplied on tensor cores. With keys before RoPE, the queries are turned back to the first position `n` of a tile of keys, and
the keys by their distance `e` from it; neighbouring tokens have the same distances in every tile, so these stay in registers:

    q . R(n + e) k = sum_c k[c] (a'[c] cos(e f[c]) + b'[c] sin(e f[c])),
    a' = a cos(n f) + b sin(n f),   b' = b cos(n f) - a sin(n f)

with `a` the query and `b` the query with every pair turned by 90 degrees, as in `gpu.py`. A rotated center is scored likewise,
with `k` the center, in a pass of its own.

Sums of codewords, cosines, sines, tables and both factors of every product are float16, sums of products and the softmax
float32: outputs differ from float32's by less than 1.5e-3 over few keys, 3e-4 over many (root mean squares).

What bounds it: an instruction gathers 8 codewords of 64 bytes, and two at a time meet in the same banks every other time, so a
side takes 1.8 times what its `2 S D` bytes a key take at the full speed of the cache; a table of four rows a third of that.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.ops.attend import gpu_cuda
from kvfold.ops.attend.gpu_parts import MOST_SPLITS, decoded, mask_strides, scale_of, sincos
from kvfold.ops.attend.naive import Coded, Rotation
from kvfold.ops.interpreter import interpreted

_MOST_ROWS = 16  # query rows of a KV head
_LOOKED_UP = 1024  # keys of a tile that is looked up, one a thread
_PROGRAMS = 16  # a multiprocessor, if there are that many tiles
_TABLE_BYTES = 1 << 17  # of the tables of a KV head, so that they stay in the first-level cache
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # a stage's codes of all groups


def takes(query: Tensor, key: Coded, value: Coded) -> bool:
    """Whether these shapes are served: half precision, up to 16 rows of a KV head, codes of a byte, powers of 2."""
    rows = query.shape[1] // key.packed.shape[1] * query.shape[2]
    return query.dtype != torch.float32 and rows <= _MOST_ROWS and _regular(key) and _regular(value)


def _regular(coded: Coded) -> bool:
    groups, dim = coded.channels.shape
    packed = coded.packed
    return (
        coded.bits == 8
        and coded.codebooks.dtype == torch.float16
        and groups in _WORDS
        and dim & (dim - 1) == 0
        and groups * dim >= 16  # what a product on tensor cores takes
        and all(step % groups == 0 for step in (*packed.stride()[:3], packed.storage_offset()))
        and packed.stride(3) == 1
    )


def partial(
    query: Tensor,
    key: Coded,
    value: Coded,
    rotation: Rotation | None,
    mask: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    processors: int,
) -> tuple[Tensor, Tensor]:
    """Attention over each split of the keys, for shapes that `takes` admits; arguments as in `naive.attend`.

    Returns:
        Outputs float32 `[splits, B * G, rows, D]`, channels in the order of the values' groups; lse `[splits, B * G, rows]`.
    """
    batch, heads, queries, width = query.shape
    kv_heads, tokens = key.packed.shape[1:3]
    pairs, rows = batch * kv_heads, heads // kv_heads * queries
    stages, _, groups = key.book.shape
    size, tall = key.codebooks.shape[1], triton.next_power_of_2(rows)
    made: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    turning, frequency = torch.empty(3, pairs, rows, width, **made), torch.empty(width, **made)
    inv_freq, rotary = (None, 0) if rotation is None else (rotation.inv_freq, len(rotation.inv_freq))
    factor, interleaved = (1.0, False) if rotation is None else (rotation.factor, rotation.interleaved)
    _queries[(pairs,)](
        *(query.contiguous(), key.channels, inv_freq, turning, frequency),
        *(rows, rotary, factor, interleaved, width, tall),
    )
    logits = torch.empty(pairs, tokens, tall, **made)
    look, seen = mask_strides(mask)
    finish = (rows, tokens, queries, look, *seen, softmax_scale, softcap)
    positions = None if rotation is None else rotation.positions
    places = (positions, 0 if positions is None or len(positions) == 1 else positions.stride(0))
    sizes = (stages, groups, key.channels.shape[1], size)
    center = None if key.center is None else key.center[:, key.channels.flatten()].half()
    tile = 512 if interpreted() else 64 if width <= 128 else 32

    def scores(kind: str, more: bool) -> None:
        count, each = _splits(pairs, tokens, tile, processors)
        arguments = (turning, frequency, *places, center, logits, *_arguments(key), kv_heads, each, *finish)
        _scores[(count, pairs)](*arguments, kind, more, *sizes, max(16, tall), tall, tile, num_warps=4, num_stages=1)

    if key.center is not None:
        scores("center", False)
    turned = rotation is not None and key.center is None
    looked_up = not turned and 2 * stages * groups * size * tall <= _TABLE_BYTES
    tables = None
    if looked_up:
        tables = torch.empty(pairs, stages * groups, size, tall, dtype=torch.float16, device=query.device)
        *codes, codebooks, book = _arguments(key)
        _tables[(pairs, stages * groups)](
            *(turning, codebooks, book, tables, kv_heads, rows, groups, *sizes[2:]),
            *(max(16, triton.next_power_of_2(size)), max(8, tall), tall),
        )
    if (turned or looked_up) and gpu_cuda.takes(key, value, turned, rows):
        prepared = (turning, frequency, tables, logits, key, value, rotation, mask, softmax_scale, softcap)
        return gpu_cuda.partial(*prepared, queries, processors)

    if turned:
        scores("turned", False)
    elif tables is not None:
        wide = max(32, min(_LOOKED_UP, triton.next_power_of_2(triton.cdiv(tokens * pairs, processors))))
        count, each = _splits(pairs, tokens, wide, processors)
        arguments = (tables, logits, *codes, kv_heads, each, *finish, key.center is not None)
        _look_up[(count, pairs)](*arguments, stages, groups, size, tall, wide, num_warps=wide // 32, num_stages=1)
    else:
        scores("plain", key.center is not None)

    tile = 512 if interpreted() else 32
    count, each = _splits(pairs, tokens, tile, processors)
    sizes = (len(value.book), *value.channels.shape, value.codebooks.shape[1])
    out, lse = torch.empty(count, pairs, rows, value.channels.numel(), **made), torch.empty(count, pairs, rows, **made)
    arguments = (logits, out, lse, *_arguments(value), kv_heads, each, rows, tokens)
    _mix[(count, pairs)](*arguments, *sizes, max(16, tall), tall, tile, max(tile, 128), num_warps=4, num_stages=1)
    return out, lse


def _splits(pairs: int, tokens: int, tile: int, processors: int) -> tuple[int, int]:
    """Splits of the keys and tokens of each, whole tiles, so that every multiprocessor has work several times over."""
    tiles = triton.cdiv(tokens, tile)
    each = triton.cdiv(tiles, max(1, min(_PROGRAMS * processors // pairs, MOST_SPLITS)))
    return triton.cdiv(tiles, each), each * tile


def _arguments(coded: Coded) -> tuple:
    words, scale = coded.packed.view(_WORDS[coded.channels.shape[0]]), coded.scale
    return (words, *words.stride()[:3], scale, *scale.stride()[:3], coded.codebooks.contiguous(), coded.book.contiguous())


@triton.jit
def _finished(score, mask, place, there, softmax_scale, softcap):
    """Logits: scores scaled, capped, and minus infinity where the mask says no."""
    score *= softmax_scale
    if softcap is not None:
        score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)  # tanh
    if mask is not None:
        score = tl.where(tl.load(mask + place, mask=there, other=0) != 0, score, float("-inf"))
    return score


@triton.jit
def _queries(
    query, channels, inv_freq, turning, frequency, rows, turned, factor,
    INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Queries in the order of the keys' groups; with RoPE also times its factor, and that with pairs turned by 90 degrees."""
    pair = tl.program_id(0).to(tl.int64)
    at, row = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    channel = tl.load(channels + at).to(tl.int32)
    known = (row < rows)[:, None]
    source = query + (pair * rows + row)[:, None] * WIDTH
    target = turning + (pair * rows + row)[:, None] * WIDTH + at[None, :]
    plain = tl.load(source + channel[None, :], mask=known, other=0).to(tl.float32)
    tl.store(target, plain, mask=known)
    if inv_freq is not None:
        if INTERLEAVED:
            first, mate, angle = channel % 2 == 0, channel ^ 1, channel // 2
        else:
            first, angle = channel < turned, channel % turned
            mate = tl.where(first, channel + turned, channel - turned)
        turns = channel < 2 * turned
        away = tl.load(source + mate[None, :], mask=known & turns[None, :], other=0).to(tl.float32)
        plane = tl.num_programs(0) * rows * WIDTH
        tl.store(target + plane, tl.where(turns[None, :], plain * factor, plain), mask=known)
        tl.store(target + 2 * plane, tl.where(first[None, :], away, -away) * factor, mask=known)
        tl.store(frequency + at, tl.load(inv_freq + angle, mask=turns, other=0).to(tl.float32))


@triton.jit
def _scores(
    turning, frequency, positions, by_batch, center, logits,
    words, k_b, k_g, k_t, k_scale, ks_b, ks_g, ks_t, codebooks, book, heads, each,
    rows, tokens, queries, mask, mask_b, mask_q, mask_t, softmax_scale, softcap,
    KIND: tl.constexpr, MORE: tl.constexpr,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr, TALL: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Logits of one split of the keys: of "plain" keys, of "turned" ones (before RoPE), or what the "center" adds to them."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    channel, row = tl.arange(0, GROUPS * DIM), tl.arange(0, WIDE)
    known = row < rows
    at = turning + (pair * rows + row)[:, None] * (GROUPS * DIM) + channel[None, :]
    if KIND == "plain":
        query = tl.load(at, mask=known[:, None], other=0.0).to(tl.float16)
    else:
        plane = tl.arange(0, 2)
        of_both = at[:, :, None] + (tl.num_programs(1) * rows * (GROUPS * DIM) * (1 + plane))[None, None, :]
        both = tl.load(of_both, mask=known[:, None, None], other=0.0)  # a and b
        turn = tl.load(frequency + channel)
        before = tl.full([TOKENS], -1, tl.int32)
        cos = tl.zeros([TOKENS, GROUPS * DIM], tl.float16)
        sin = tl.zeros([TOKENS, GROUPS * DIM], tl.float16)
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, tokens)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < last
        far = token.to(tl.int64)
        if KIND != "plain":
            place = positions + batch * by_batch
            origin = tl.load(place + start)
            away = (tl.load(place + far, mask=inside, other=0) - origin).to(tl.int32)
            away = tl.where(inside, away, before)  # whatever was there serves
            if tl.max((away != before).to(tl.int32), 0) != 0:
                sine, cosine = sincos(away[:, None].to(tl.float32) * turn[None, :])
                cos, sin = cosine.to(tl.float16), sine.to(tl.float16)
                before = away
            sine, cosine = sincos(origin.to(tl.float32) * turn)
            with_a = tl.where(plane[None, :] == 0, cosine[:, None], sine[:, None])[None, :, :]
            with_b = tl.where(plane[None, :] == 0, -sine[:, None], cosine[:, None])[None, :, :]
            a_here = tl.sum(both * with_a, 2).to(tl.float16)  # once for all warps, being a sum over an axis
            b_here = tl.sum(both * with_b, 2).to(tl.float16)
        if KIND == "center":
            keys = tl.load(center + head * (GROUPS * DIM) + channel[None, :] + tl.zeros([TOKENS, 1], tl.int32))
        else:
            keys = decoded(
                words + batch * k_b + head * k_g + far * k_t, codebooks, book, heads, head, inside,
                STAGES, GROUPS, DIM, SIZE, TOKENS,
            )  # fmt: skip
        if KIND == "plain":
            score = tl.dot(query, tl.trans(keys))
        else:
            score = tl.dot(a_here, tl.trans(keys * cos)) + tl.dot(b_here, tl.trans(keys * sin))
        target = logits + (pair * tokens + far)[None, :] * TALL + row[:, None]
        there = known[:, None] & inside[None, :]
        if KIND != "center":
            score *= scale_of(k_scale + batch * ks_b + head * ks_g + far * ks_t, inside)[None, :]
            if MORE:
                score += tl.load(target, mask=there, other=0.0)
            seen = (row % queries).to(tl.int64)[:, None] * mask_q + far[None, :] * mask_t
            score = _finished(score, mask, batch * mask_b + seen, there, softmax_scale, softcap)
        tl.store(target, score, mask=there)


@triton.jit
def _tables(
    turning, codebooks, book, tables, heads, rows, groups, DIM: tl.constexpr, SIZE: tl.constexpr,
    WORDS: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """`q . codeword` of one stage and group, `[SIZE, TALL]`: rows of one codeword lie side by side."""
    pair, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane, word, row = tl.arange(0, DIM), tl.arange(0, WORDS), tl.arange(0, WIDE)
    table = tl.load(book + (number // groups * heads + pair % heads) * groups + number % groups)
    channel = number % groups * DIM + lane
    at = turning + (pair * rows + row)[None, :] * (groups * DIM) + channel[:, None]
    q = tl.load(at, mask=(row < rows)[None, :], other=0.0)
    there = (word < SIZE)[:, None]
    words = tl.load(codebooks + (table * SIZE + word)[:, None] * DIM + lane[None, :], mask=there, other=0.0)
    if DIM >= 16:  # noqa: SIM108
        made = tl.dot(words, q.to(tl.float16))
    else:  # too short for tensor cores
        made = tl.sum(words.to(tl.float32)[:, :, None] * q[None, :, :], 1)
    target = ((pair * tl.num_programs(1) + number) * SIZE + word)[:, None] * TALL + row[None, :]
    tl.store(tables + target, made.to(tl.float16), mask=there & (row < TALL)[None, :])


@triton.jit
def _look_up(
    tables, logits, words, k_b, k_g, k_t, k_scale, ks_b, ks_g, ks_t, heads, each,
    rows, tokens, queries, mask, mask_b, mask_q, mask_t, softmax_scale, softcap, MORE: tl.constexpr,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, TALL: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Logits of one split of keys after RoPE: sums of table entries."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    row = tl.arange(0, TALL)
    table = tables + pair * (STAGES * GROUPS * SIZE * TALL)
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, tokens)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < last
        far = token.to(tl.int64)
        codes = words + batch * k_b + head * k_g + far * k_t
        score = tl.zeros([TOKENS, TALL], tl.float32)
        for stage in range(STAGES):
            word = tl.load(codes + stage, mask=inside, other=0)
            for group in tl.static_range(GROUPS):
                code = tl.minimum(((word >> (8 * group)) & 255).to(tl.int32), SIZE - 1)
                entry = ((stage * GROUPS + group) * SIZE + code) * TALL
                score += tl.load(table + entry[:, None] + row[None, :]).to(tl.float32)
        score *= scale_of(k_scale + batch * ks_b + head * ks_g + far * ks_t, inside)[:, None]
        target = logits + (pair * tokens + far)[:, None] * TALL + row[None, :]
        there = inside[:, None] & (row < rows)[None, :]
        if MORE:
            score += tl.load(target, mask=there, other=0.0)
        place = (row % queries).to(tl.int64)[None, :] * mask_q + far[:, None] * mask_t
        score = _finished(score, mask, batch * mask_b + place, there, softmax_scale, softcap)
        tl.store(target, score, mask=there)


@triton.jit
def _mix(
    logits, out, lse, words, v_b, v_g, v_t, v_scale, vs_b, vs_g, vs_t, codebooks, book, heads, each, rows, tokens,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, TALL: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values of one split, mixed by the softmax of their logits."""
    pair, split = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    row, lane = tl.arange(0, ROWS), tl.arange(0, GROUPS * DIM)
    known = row < rows
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, tokens)
    highest = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        far = token.to(tl.int64)
        there = known[:, None] & (token < last)[None, :]
        logit = tl.load(logits + (pair * tokens + far)[None, :] * TALL + row[:, None], mask=there, other=float("-inf"))
        highest = tl.maximum(highest, logit)
        largest = tl.maximum(largest, scale_of(v_scale + batch * vs_b + head * vs_g + far * vs_t, token < last))
    top = tl.max(highest, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    # The scales go with the shares, relative to the largest: whatever their size, float16 holds the products.
    unit = tl.max(largest, 0)
    unit = tl.where(unit > 0, unit, 1.0)
    weights = tl.zeros([ROWS, TOKENS], tl.float32)
    mixed = tl.zeros([ROWS, GROUPS * DIM], tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < last
        far = token.to(tl.int64)
        there = known[:, None] & inside[None, :]
        logit = tl.load(logits + (pair * tokens + far)[None, :] * TALL + row[:, None], mask=there, other=float("-inf"))
        share = tl.exp(logit - base[:, None])
        weights += share
        scale = scale_of(v_scale + batch * vs_b + head * vs_g + far * vs_t, inside) / unit
        values = decoded(
            words + batch * v_b + head * v_g + far * v_t, codebooks, book, heads, head, inside,
            STAGES, GROUPS, DIM, SIZE, TOKENS,
        )  # fmt: skip
        mixed = tl.dot((share * scale[None, :]).to(tl.float16), values, mixed)
    weight = tl.sum(weights, 1)
    target = (split * tl.num_programs(1) + pair) * rows + row
    seen = weight > 0
    weight = tl.where(seen, weight, 1.0)
    tl.store(out + target[:, None] * (GROUPS * DIM) + lane[None, :], mixed * (unit / weight)[:, None], mask=known[:, None])
    tl.store(lse + target, tl.where(seen, top + tl.log(weight), float("-inf")), mask=known)

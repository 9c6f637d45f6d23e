"""Attention on residual codes in Triton, for GPUs: split over keys (flash-decoding), codes decoded on chip.

Scores need no rotated key. For a key `k` before RoPE at position `n`, pairs turned by `n f`, the score of a query is

    q . R(n) k = sum_c k[c] (a[c] cos(n f[c]) + b[c] sin(n f[c]))

with `a` the query (times RoPE's factor) and `b` the query with every pair turned by 90 degrees: two products of matrices,
whichever channels share a group. Sines and cosines are made once for all heads. A rotated center adds the same sum over its
own channels. A few queries over keys after RoPE score from a table, `q . codeword` for every codeword, and decode no key.

Steps of few rows in half precision go their own way, `gpu_step.py`. What bounds it: decoding, once for every block of rows, by
reading the codewords of a token, `2 S D` bytes of a float16 table that stays in the first-level cache. Products run on tensor
cores (float16, or three products in TF32 for float32 queries). Nothing is asked of the device on the way, so calls may
be captured in a CUDA graph. A code that names no codeword cannot be told without asking; it reads the last codeword.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.ops.attend import gpu_step
from kvfold.ops.attend.gpu_parts import MOST_SPLITS, mask_strides, scale_of
from kvfold.ops.attend.naive import Coded, Rotation
from kvfold.ops.attend.spans import Mask, Spans, mask_of
from kvfold.ops.interpreter import interpreted

_TABLE_ROWS = 16  # query rows of a KV head at most that score from tables
_TABLE_SIZE = 1024  # codewords at most, likewise
_LEAST = 16  # of a dimension of a product on tensor cores
_PROGRAMS = 4  # a multiprocessor, at least, before keys are split no further
_MASKED_QUERIES = 1024  # of which a mask is made in place of spans


class _Side(NamedTuple):
    """One side's codes as the kernels take them; channels in the order of groups, each padded to `width`."""

    coded: Coded
    codebooks: Tensor  # float16 or float32, contiguous
    groups: int  # padded to a power of 2
    width: int  # of a group, likewise

    @property
    def padded(self) -> int:
        return self.groups * self.width

    @classmethod
    def of(cls, coded: Coded) -> _Side:
        groups, dim = coded.channels.shape
        codebooks = coded.codebooks if coded.codebooks.dtype in (torch.float16, torch.float32) else coded.codebooks.half()
        wide = triton.next_power_of_2(dim)
        tall = triton.next_power_of_2(groups)
        return cls(coded, codebooks.contiguous(), tall, max(wide, _LEAST // tall))

    def gather(self, x: Tensor) -> Tensor:
        """Channels of `x [..., D]` in this order, `[..., padded]`; zeros where there is no channel."""
        groups, dim = self.coded.channels.shape
        chosen = x[..., self.coded.channels]  # [..., P, d]
        return torch.nn.functional.pad(chosen, (0, self.width - dim, 0, self.groups - groups)).flatten(-2)

    def arguments(self) -> tuple:
        coded = self.coded
        packed, scale = coded.packed, coded.scale
        return (
            packed,
            *packed.stride(),
            scale.view(torch.float16) if scale.dtype != torch.uint8 else scale,
            *scale.stride()[:3],
            self.codebooks,
            coded.book.to(torch.int32).contiguous(),
        )

    def sizes(self) -> tuple[int, ...]:
        stages, _, groups = self.coded.book.shape
        return (stages, groups, self.coded.channels.shape[1], self.codebooks.shape[1], self.coded.bits, self.groups, self.width)


@triton.jit
def _code(row, stride, index, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, inside):
    """Code number `index` of packed rows that start at `row`: three bytes hold any code of up to 16 bits."""
    if BITS == 8:
        return tl.load(row + index * stride, mask=inside, other=0).to(tl.int32)
    start = index * BITS
    byte = start // 8
    word = tl.load(row + byte * stride, mask=inside, other=0).to(tl.int32)
    for more in tl.static_range(1, 3):
        there = inside & (byte + more < ROW_BYTES)
        word |= tl.load(row + (byte + more) * stride, mask=there, other=0).to(tl.int32) << (8 * more)
    return (word >> (start % 8)) & ((1 << BITS) - 1)


@triton.jit
def _decoded(
    rows, stride, codebooks, book, heads, head, inside,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Sums of codewords of tokens whose packed rows start at `rows [TOKENS]`: `[TOKENS, PADDED_GROUPS * WIDTH]` float32."""
    ROW_BYTES: tl.constexpr = (STAGES * GROUPS * BITS + 7) // 8
    group = tl.arange(0, PADDED_GROUPS)
    lane = tl.arange(0, WIDTH)
    there = inside[:, None] & (group < GROUPS)[None, :]
    read = there[:, :, None] & (lane < DIM)[None, None, :]
    total = tl.zeros([TOKENS, PADDED_GROUPS, WIDTH], tl.float32)
    for stage in range(STAGES):
        table = tl.load(book + (stage * heads + head) * GROUPS + group, mask=group < GROUPS, other=0).to(tl.int64)
        code = _code(rows[:, None], stride, stage * GROUPS + group[None, :], BITS, ROW_BYTES, there)
        word = (table[None, :] * SIZE + tl.minimum(code, SIZE - 1)) * DIM
        total += tl.load(codebooks + word[:, :, None] + lane[None, None, :], mask=read, other=0).to(tl.float32)
    return tl.reshape(total, [TOKENS, PADDED_GROUPS * WIDTH])


@triton.jit
def _turn(row, angles, pair_of, inside):
    """Cosines and sines of tokens whose rows start at `row [TOKENS]`, for channels of the pairs `pair_of`."""
    where = row[:, None] + pair_of[None, :]
    cos = tl.load(where, mask=inside[:, None], other=0.0).to(tl.float32)
    sin = tl.load(where + angles, mask=inside[:, None], other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _attend(
    q_cos, q_sin, center_cos, center_sin, tables, out, lse,
    k_packed, k_b, k_g, k_t, k_byte, k_scale, ks_b, ks_g, ks_t, k_books, k_book,
    v_packed, v_b, v_g, v_t, v_byte, v_scale, vs_b, vs_g, vs_t, v_books, v_book,
    turns, turns_b, angles, column, mask, mask_b, mask_q, mask_t,
    heads, rows, queries, tokens, tokens_of_split, softmax_scale, softcap,
    K_STAGES: tl.constexpr, K_GROUPS: tl.constexpr, K_DIM: tl.constexpr, K_SIZE: tl.constexpr, K_BITS: tl.constexpr,
    K_PADDED: tl.constexpr, K_WIDTH: tl.constexpr,
    V_STAGES: tl.constexpr, V_GROUPS: tl.constexpr, V_DIM: tl.constexpr, V_SIZE: tl.constexpr, V_BITS: tl.constexpr,
    V_PADDED: tl.constexpr, V_WIDTH: tl.constexpr,
    ROTATED: tl.constexpr, CENTERED: tl.constexpr, TABLES: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A block of `ROWS` query rows (query heads of a KV head, times queries) over one split of the keys."""
    pair = tl.program_id(0)
    split = tl.program_id(2)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    at = pair.to(tl.int64) * rows + row
    channel = tl.arange(0, K_PADDED * K_WIDTH)
    q_offsets = at[:, None] * (K_PADDED * K_WIDTH) + channel[None, :]
    a = tl.load(q_cos + q_offsets, mask=known[:, None], other=0.0)
    if ROTATED or CENTERED:
        pair_of = tl.load(column + channel)
    if ROTATED:
        b = tl.load(q_sin + q_offsets, mask=known[:, None], other=0.0)
    if CENTERED:
        a_center = tl.load(center_cos + q_offsets, mask=known[:, None], other=0.0)
        b_center = tl.load(center_sin + q_offsets, mask=known[:, None], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, V_PADDED * V_WIDTH], tl.float32)
    K_BYTES: tl.constexpr = (K_STAGES * K_GROUPS * K_BITS + 7) // 8
    first = split * tokens_of_split
    last = tl.minimum(first + tokens_of_split, tokens)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < last
        far = token.to(tl.int64)
        k_rows = k_packed + batch * k_b + head * k_g + far * k_t
        if TABLES:  # [pair, stage, group, codeword, row]: rows of one codeword lie side by side
            scores = tl.zeros([ROWS, TOKENS], tl.float32)
            for number in range(K_STAGES * K_GROUPS):
                index = number + tl.zeros([TOKENS], tl.int32)
                code = tl.minimum(_code(k_rows, k_byte, index, K_BITS, K_BYTES, inside), K_SIZE - 1)
                word = (pair.to(tl.int64) * (K_STAGES * K_GROUPS) + index) * K_SIZE + code
                there = known[:, None] & inside[None, :]
                scores += tl.load(tables + word[None, :] * rows + row[:, None], mask=there, other=0.0)
        else:
            keys = _decoded(
                k_rows, k_byte, k_books, k_book, heads, head, inside,
                K_STAGES, K_GROUPS, K_DIM, K_SIZE, K_BITS, K_PADDED, K_WIDTH, TOKENS,
            )  # fmt: skip
            if ROTATED:
                cos, sin = _turn(turns + batch * turns_b + far * (2 * angles), angles, pair_of, inside)
                scores = tl.dot(a, tl.trans((keys * cos).to(a.dtype)), input_precision="tf32x3")
                scores += tl.dot(b, tl.trans((keys * sin).to(a.dtype)), input_precision="tf32x3")
            else:
                scores = tl.dot(a, tl.trans(keys.to(a.dtype)), input_precision="tf32x3")
        scores *= scale_of(k_scale + batch * ks_b + head * ks_g + far * ks_t, inside)[None, :]
        if CENTERED:
            cos, sin = _turn(turns + batch * turns_b + far * (2 * angles), angles, pair_of, inside)
            scores += tl.dot(a_center, tl.trans(cos.to(a.dtype)), input_precision="tf32x3")
            scores += tl.dot(b_center, tl.trans(sin.to(a.dtype)), input_precision="tf32x3")
        scores *= softmax_scale
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
        seen = inside[None, :] & known[:, None]
        if MASKED:
            query = (row % queries).to(tl.int64)
            look = mask + batch * mask_b + query[:, None] * mask_q + far[None, :] * mask_t
            seen = seen & (tl.load(look, mask=seen, other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp(top - base)
        share = tl.exp(scores - base[:, None])
        top = higher
        weight = weight * kept + tl.sum(share, 1)
        values = _decoded(
            v_packed + batch * v_b + head * v_g + far * v_t, v_byte, v_books, v_book, heads, head, inside,
            V_STAGES, V_GROUPS, V_DIM, V_SIZE, V_BITS, V_PADDED, V_WIDTH, TOKENS,
        )  # fmt: skip
        # The scales go with the shares, relative to the largest: whatever their size, float16 holds the products.
        scale = scale_of(v_scale + batch * vs_b + head * vs_g + far * vs_t, inside)
        largest = tl.max(scale, 0)
        share *= (scale / tl.where(largest > 0, largest, 1.0))[None, :]
        part = tl.dot(share.to(a.dtype), values.to(a.dtype), input_precision="tf32x3")
        mixed = mixed * kept[:, None] + part * largest
    target = split.to(tl.int64) * tl.num_programs(0) * rows + at
    lanes = tl.arange(0, V_PADDED * V_WIDTH)
    seen_any = weight > 0
    weight = tl.where(seen_any, weight, 1.0)
    tl.store(out + target[:, None] * (V_PADDED * V_WIDTH) + lanes[None, :], mixed / weight[:, None], mask=known[:, None])
    tl.store(lse + target, tl.where(seen_any, top + tl.log(weight), float("-inf")), mask=known)


@triton.jit
def _join(
    parts, lses, out, lse, channels, rows, splits, groups, dim,
    SPLITS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row's outputs over all splits, weighted by their log-sum-exp (`ops/merge.py`), channels back in their places."""
    row = tl.program_id(0).to(tl.int64)
    split, lane = tl.arange(0, SPLITS), tl.arange(0, PADDED * WIDTH)
    at = split.to(tl.int64) * rows + row
    part_lse = tl.load(lses + at, mask=split < splits, other=float("-inf"))
    top = tl.max(part_lse, 0)
    share = tl.exp(part_lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(share, 0)
    seen_any = total != 0  # NaN stays
    total = tl.where(seen_any, total, 1.0)
    part = tl.load(parts + at[:, None] * (PADDED * WIDTH) + lane[None, :], mask=(split < splits)[:, None], other=0.0)
    mixed = tl.sum(part * share[:, None], 0)
    group, entry = lane // WIDTH, lane % WIDTH
    real = (group < groups) & (entry < dim)
    channel = tl.load(channels + group * dim + entry, mask=real, other=0)
    tl.store(out + row * (groups * dim) + channel, mixed / total, mask=real)
    tl.store(lse + row, tl.where(seen_any, top + tl.log(total), float("-inf")))


def attend(
    query: Tensor,
    key: Coded,
    value: Coded,
    rotation: Rotation | None,
    mask: Mask | None,
    softmax_scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive.attend`, except that a code that names no codeword reads the last one."""
    batch, heads, queries, _ = query.shape
    if isinstance(mask, Spans) and queries > _MASKED_QUERIES:
        chunks = [slice(start, start + _MASKED_QUERIES) for start in range(0, queries, _MASKED_QUERIES)]
        seen = [Spans(mask.bounds[rows]) for rows in chunks]
        given = key, value, rotation
        done = [attend(query[:, :, rows], *given, own, softmax_scale, softcap) for rows, own in zip(chunks, seen, strict=True)]
        return torch.cat([out for out, _ in done], 2), torch.cat([lse for _, lse in done], 2)
    kv_heads, tokens = key.packed.shape[1:3]
    rows = heads // kv_heads * queries
    mask = mask_of(mask, 0, tokens)
    made: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    if not (tokens and rows):
        out = torch.zeros(batch, heads, queries, value.channels.numel(), **made)
        return out, torch.full((batch, heads, queries), -torch.inf, **made)
    if gpu_step.takes(query, key, value):
        most = processors(query.device)
        parts, lses = gpu_step.partial(query, key, value, rotation, mask, softmax_scale, softcap, most)
    else:
        parts, lses = _partial(query, key, value, rotation, mask, softmax_scale, softcap)
    out = torch.empty(batch, heads, queries, value.channels.numel(), **made)
    lse = torch.empty(batch, heads, queries, **made)
    splits, padded = parts.shape[0], triton.next_power_of_2(value.channels.shape[0])
    places = (splits, *value.channels.shape, triton.next_power_of_2(splits), padded, parts.shape[-1] // padded)
    _join[(lse.numel(),)](parts, lses, out, lse, value.channels.contiguous(), lse.numel(), *places)
    return out, lse


def _partial(
    query: Tensor,
    key: Coded,
    value: Coded,
    rotation: Rotation | None,
    mask: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Outputs `[splits, B * G, rows, padded channels of the values]` and their lse, for any shape."""
    batch, heads, queries, _ = query.shape
    kv_heads, tokens = key.packed.shape[1:3]
    rows = heads // kv_heads * queries
    made: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    keys, values = _Side.of(key), _Side.of(value)
    rotated = rotation is not None and key.center is None
    centered = rotation is not None and key.center is not None
    tabled = not rotated and rows <= _TABLE_ROWS and key.codebooks.shape[1] <= _TABLE_SIZE
    by_head = query.float().reshape(batch, kv_heads, rows, -1)  # rows: query heads of the KV head, queries of each
    factors = torch.float32 if query.dtype == torch.float32 else torch.float16  # of products
    nothing = by_head  # what a kernel that was told so never reads
    turns = column = a = b = nothing
    if rotation is not None:
        turns, column = _turns(rotation, keys, factors)
        a, b = _turned_queries(by_head, rotation)
    plain = keys.gather(a if rotated else by_head).to(factors)
    away = keys.gather(b).to(factors) if rotated else nothing
    center = [nothing, nothing]
    if centered:
        assert key.center is not None
        center = [keys.gather(x * key.center[:, None]).to(factors) for x in (a, b)]
    look, seen = mask_strides(mask)
    tile, block, warps = _blocks(rows, max(keys.padded, values.padded), factors == torch.float16)
    row_blocks = triton.cdiv(rows, block)
    splits, each = _splits(batch * kv_heads * row_blocks, tokens, tile, query.device)
    width = values.padded
    parts = torch.empty(splits, batch * kv_heads, rows, width, **made)
    lses = torch.empty(splits, batch * kv_heads, rows, **made)
    _attend[(batch * kv_heads, row_blocks, splits)](
        *(plain, away, *center, _tables(by_head, key) if tabled else nothing, parts, lses),
        *keys.arguments(),
        *values.arguments(),
        *(turns, turns.stride(0) if len(turns) > 1 else 0, turns.shape[-1], column),
        *(nothing if look is None else look, *seen),
        *(kv_heads, rows, queries, tokens, each, softmax_scale, softcap or 0.0),
        *keys.sizes(),
        *values.sizes(),
        *(rotated, centered, tabled, mask is not None, softcap is not None),
        *(block, tile),
        num_warps=warps,
    )
    return parts, lses


def _turns(rotation: Rotation, keys: _Side, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B or 1, T, 2, n + 1]` of every pair, the last of no angle; and the pair of each channel, that last
    for one that is not rotated."""
    positions, inv_freq, _, interleaved = rotation
    pairs, dim = len(inv_freq), keys.coded.channels.numel()
    still = torch.nn.functional.pad(inv_freq.float(), (0, 1))
    angle = positions[..., None].float() * still
    channel = torch.arange(dim, device=positions.device)
    pair = channel // 2 if interleaved else channel % max(pairs, 1)
    pair = torch.where(channel < 2 * pairs, pair, pairs)
    column = keys.gather(pair.to(torch.int32))
    return torch.stack((angle.cos(), angle.sin()), -2).to(dtype), column


def _turned_queries(query: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """What cosines and what sines multiply in the score of `query [..., D]` and a key before RoPE."""
    pairs, interleaved = len(rotation.inv_freq), rotation.interleaved
    turning, still = query[..., : 2 * pairs] * rotation.factor, query[..., 2 * pairs :]
    axis = -1 if interleaved else -2
    shape = (pairs, 2) if interleaved else (2, pairs)
    first, second = turning.unflatten(-1, shape).unbind(axis)
    away = torch.stack((second, -first), axis).flatten(-2)
    return torch.cat((turning, still), -1), torch.cat((away, torch.zeros_like(still)), -1)


def _tables(query: Tensor, key: Coded) -> Tensor:
    """`query . codeword` for every codeword: float32 `[B, G, S, P, C, rows]` of queries `[B, G, rows, D]`."""
    codewords = key.codebooks.float()[key.book]  # [S, G, P, C, d]
    return torch.einsum("sgpcd,bgrpd->bgspcr", codewords, query[..., key.channels]).contiguous()


def _blocks(rows: int, width: int, half: bool) -> tuple[int, int, int]:
    """Tokens of a tile, query rows of a program, warps."""
    if interpreted():  # where a program costs whatever its size
        return 512, max(_LEAST, min(1024, triton.next_power_of_2(rows))), 4
    if half and width <= 128 and rows > 64:
        return 64, 128, 8
    block = max(_LEAST, min(64 if width <= 128 else 32, triton.next_power_of_2(rows)))
    return 32, block, 4 if width <= 128 else 8


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return 1 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def _splits(blocks: int, tokens: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Splits of the keys and tokens of each, whole tiles, so that every multiprocessor has work."""
    tiles = triton.cdiv(tokens, tile)
    wanted = min(max(1, _PROGRAMS * processors(device) // blocks), triton.cdiv(tiles, 2), MOST_SPLITS)
    each = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, each), each * tile

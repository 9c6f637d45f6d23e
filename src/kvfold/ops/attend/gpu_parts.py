"""What the GPU kernels of attention share: masks, scales, angles, and sums of codewords of codes of a byte."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_SPLITS = 128  # of the keys: a program of `gpu._join` holds a row's outputs over all of them


def mask_strides(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """A mask `[B or 1, 1, Q, T]` as bytes, and its strides over batch (0 if all share it), queries and keys."""
    if mask is None:
        return None, (0, 0, 0)
    look = mask.view(torch.uint8)
    return look, (look.stride(0) if len(look) > 1 else 0, look.stride(2), look.stride(3))


@triton.jit
def sincos(angle):
    """Sine and cosine of float32 angles to 4e-7, up to 10^5 turns; a library's need memory for angles that large."""
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    x = angle - turns * 6.28125 - turns * 1.9350051879882812e-3 - turns * 3.0199159819545e-7  # 2 pi in three parts
    y = x * x
    sine = y * (-2.475201736e-8 + y * 1.369688965e-10)  # least squares on Chebyshev nodes
    sine = 9.999999995e-1 + y * (-1.666666611e-1 + y * (8.333323671e-3 + y * (-1.984064687e-4 + y * 2.753824311e-6 + y * sine)))
    cosine = y * (2.062062024e-9 - y * 9.774655066e-12)
    cosine = 4.166666415e-2 + y * (-1.388886744e-3 + y * (2.480069041e-5 - y * 2.753697595e-7 + y * cosine))
    return x * sine, 1.0 + y * (-0.5 + y * cosine)


@triton.jit
def scale_of(pointer, inside):
    """Scales of tokens as float32; a byte is the upper half of a float16's (packing.pack_scale)."""
    value = tl.load(pointer, mask=inside, other=0)
    if pointer.dtype.element_ty == tl.uint8:
        value = (value.to(tl.int16) << 7).to(tl.float16, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _sum_of(
    words, codebooks, book, heads, head, inside, first,
    COUNT: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Sums of the codewords of `COUNT` stages, float16 `[TOKENS, GROUPS, DIM]`.

    Stages are an axis, which a thread holds whole, so that all are read at once and the sum is laid out for a product once.
    """
    stage, group, lane = first + tl.arange(0, COUNT), tl.arange(0, GROUPS), tl.arange(0, DIM)
    table = tl.load(book + (stage[None, :] * heads + head) * GROUPS + group[:, None]).to(tl.int32)
    word = tl.load(words[:, None] + stage[None, :], mask=inside[:, None], other=0, cache_modifier=".cg")
    code = ((word[:, None, :] >> (8 * group)[None, :, None].to(word.dtype)) & 255).to(tl.int32)
    start = (table[None, :, :] * SIZE + tl.minimum(code, SIZE - 1)) * DIM
    return tl.sum(tl.load(codebooks + start[:, :, :, None] + lane[None, None, None, :]), 2)


@triton.jit
def decoded(
    words, codebooks, book, heads, head, inside,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Sums of codewords of tokens, float16 `[TOKENS, GROUPS * DIM]`."""
    total = tl.zeros([TOKENS, GROUPS, DIM], tl.float16)
    for first in range(0, STAGES // 8 * 8, 8):
        total += _sum_of(words, codebooks, book, heads, head, inside, first, 8, GROUPS, DIM, SIZE)
    if STAGES & 4:
        total += _sum_of(words, codebooks, book, heads, head, inside, STAGES // 8 * 8, 4, GROUPS, DIM, SIZE)
    if STAGES & 2:
        total += _sum_of(words, codebooks, book, heads, head, inside, STAGES // 4 * 4, 2, GROUPS, DIM, SIZE)
    if STAGES & 1:
        total += _sum_of(words, codebooks, book, heads, head, inside, STAGES - 1, 1, GROUPS, DIM, SIZE)
    return tl.reshape(total, [TOKENS, GROUPS * DIM])

"""From vectors to what is stored of them, residual VQ's whole encoding: scale, groups, weights of the search, search, packing.

On a CPU that is one C++ op (csrc/code.cpp), whose sums are rounded in another order: a decode step has few vectors, and calling
a dozen operations for them takes longer than they do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.packing import pack, pack_scale, unpack_scale

_CONSTANT = 1024  # a vector so many times larger than its spread would leave float16 if divided by it


def code(
    encode: Callable,
    x: Tensor,
    codebooks: Tensor,
    book: Tensor,
    channels: Tensor,
    weights: Tensor | None,
    bits: int,
    beam: int,
    scale_bits: int,
) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of vectors.

    Args:
        encode: the search, as `naive.encode`.
        x: `[B, G, T, D]`.
        codebooks, book: of the search, as in `naive.encode`.
        channels: integers `[P, d]`, the channel that each entry of a group is.
        weights: `[G, P, d, d]`, what vectors are multiplied by for the search; None if they are not.
        bits: of a code.
        scale_bits: 16, or 8 of `packing.pack_scale`.

    Returns:
        uint8 `[B, G, T, bytes]`, and `[B, G, T, 1]` of float16 or uint8.
    """
    vectors, scale = scaled_groups(x, channels, scale_bits)
    if weights is not None:
        vectors = torch.einsum("bgtpd,gpde->bgtpe", vectors, weights.float())
    return pack(encode(vectors, codebooks, book, beam).flatten(-2), bits), scale


def scaled_groups(x: Tensor, channels: Tensor, scale_bits: int) -> tuple[Tensor, Tensor]:
    """What codebooks see of `x [..., D]`: float32 group vectors `[..., P, d]`, and the scales `[..., 1]` as stored.

    A scale is the standard deviation over the channels (N - 1 in the divisor, as the paper's code); the largest magnitude for a
    vector that is constant but for rounding, 0 for one of zeros.
    """
    x = x.float()
    spread, peak = x.std(-1, keepdim=True), x.abs().amax(-1, keepdim=True)
    scale = torch.where(spread * _CONSTANT < peak, peak, spread)
    scale = pack_scale(scale) if scale_bits == 8 else scale.clamp_max(torch.finfo(torch.float16).max).half()
    by = unpack_scale(scale)
    return (x / torch.where(by > 0, by, 1.0))[..., channels], scale

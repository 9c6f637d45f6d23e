"""Packing of scales into a byte, and of codes of 1 to 16 bits into bytes, least significant bit first, without gaps.

A code of `bits` bits starts at bit `i * bits` of its vector's row, so it lies in at most three bytes. Rows are padded
to whole bytes: 32 codes of 11 bits take 44 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 61440.0  # the largest finite float16 with three bits of mantissa


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers `codes [..., n]` (0 <= code < 2**bits) into uint8 `[..., packed_bytes(n, bits)]`."""
    _check_bits(bits)
    if bits == 8:
        return codes.to(torch.uint8)
    count = codes.shape[-1]
    first, shift = _layout(count, bits, codes.device)
    wide = codes.to(torch.int32) << shift
    rows = torch.zeros(*codes.shape[:-1], packed_bytes(count, bits) + 2, dtype=torch.int32, device=codes.device)
    for byte in range(3):  # codes never overlap in a bit, so adding is or-ing
        rows.index_add_(-1, first + byte, (wide >> (8 * byte)) & 255)
    return rows[..., :-2].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: uint8 `[..., packed_bytes(count, bits)]` to int32 codes `[..., count]`."""
    _check_bits(bits)
    if bits == 8:
        return packed.to(torch.int32)
    first, shift = _layout(count, bits, packed.device)
    rows = torch.nn.functional.pad(packed, (0, 2)).to(torch.int32)
    wide = rows[..., first] | (rows[..., first + 1] << 8) | (rows[..., first + 2] << 16)
    return (wide >> shift) & ((1 << bits) - 1)


def pack_scale(scale: Tensor) -> Tensor:
    """Scales of at least 0 as uint8: exponent and first three bits of the mantissa of a float16, rounded to the nearest.

    Between 6.1e-5 and 61440, the range's end, the error is at most 1/16 of the scale; below 3.8e-6 it is stored as 0.
    """
    bits = scale.clamp_max(_LARGEST).half().view(torch.int16).int()
    return ((bits + 64) >> 7).to(torch.uint8)


def unpack_scale(scale: Tensor) -> Tensor:
    """Scales as float32, from uint8 of `pack_scale` or from a float16."""
    if scale.dtype != torch.uint8:
        return scale.float()
    return (scale.to(torch.int16) << 7).view(torch.float16).float()


def _layout(count: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    start = torch.arange(count, device=device) * bits
    return start // 8, (start % 8).to(torch.int32)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"codes have 1 to 16 bits, not {bits}")

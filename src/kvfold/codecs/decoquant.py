"""DecoQuant: split a chunk into a large factor without outliers and a small one that holds them (Liu et al., arXiv
2405.12591).

A chunk of `block` tokens of a head, `[t, D]`, is read as a matrix of rows of `n` channels and split by its singular values,
which is a matrix product operator of two tensors:

    X [t D / n, n] = U S V',   T_L = sqrt(t D / n) U,   T_S = S V' / sqrt(t D / n),   X = T_L T_S.

The columns of `T_L` all have a mean square of 1, whatever the size of the channels they come from: outliers are in `T_S`, `n
x n` elements, which stay exact. `T_L` has as many elements as the chunk; a token's `D` of them become integers

    s = max |T_L| / (2^(b-1) - 1),   q = round(T_L / s),   x ~ s q T_S.

Stored: `b` bits an element, `s` of a token and `T_S` of a chunk in float16, the latter striped over the chunk's tokens:

    bits per element = b + 16 / D + 16 n^2 / (t D).

Nothing is calibrated; keys are coded after RoPE. A chunk is coded when it is full.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import Codec
from kvfold.codes import Codes, stripe, unstripe
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack

_REACH = torch.finfo(torch.float16).max
_BLOCKS = [1 << i for i in range(1, 10)]  # attention reads tiles of 512 tokens


class DecoQuantCodec(Codec):
    """`bits` of 2 to 8 an element of the large factor, `inner` columns, chunks of `block` tokens."""

    kind = "decoquant"

    def __init__(self, head_dim: int, bits: int = 4, inner: int = 8, block: int = 128) -> None:
        super().__init__(head_dim)
        if not 2 <= bits <= 8:
            raise InputError("bits from 2 to 8", str(bits), "choose one in that range")
        if block not in _BLOCKS:
            raise InputError("a block that is a power of 2 from 2 to 512", str(block), "choose one of these")
        if inner < 2 or head_dim % inner or inner * inner > block * head_dim:
            wanted = f"inner of at least 2 that divides the head dim {head_dim}, its square at most {block * head_dim}"
            raise InputError(wanted, str(inner), "choose another, or a larger block")
        self.bits, self.inner, self.block = bits, inner, block

    def _encode(self, x: Tensor) -> Codes:
        large, small = split(x.clamp(-_REACH, _REACH).unflatten(2, (-1, self.block)), self.inner)
        large = large.flatten(2, 3)  # [B, G, T, D]
        top = (1 << (self.bits - 1)) - 1
        scale = (large.abs().amax(-1, keepdim=True) / top).half()
        whole = torch.where(scale > 0, scale.float(), 1.0)
        codes = (large / whole).round().clamp(-top, top) + top
        return Codes({"codes": pack(codes, self.bits), "scale": scale, "factor": stripe(small, self.block)})

    def decode(self, codes: Codes) -> Tensor:
        top = (1 << (self.bits - 1)) - 1
        large = (unpack(codes.fields["codes"], self.bits, self.head_dim) - top) * codes.fields["scale"].float()
        small = unstripe(codes.fields["factor"], self.block, torch.float16, (self.inner, self.inner))
        return join(large.unflatten(2, (-1, self.block)), small).flatten(2, 3)

    @property
    def bits_per_element(self) -> float:
        factor = -(-2 * self.inner * self.inner // self.block)
        return 8 * (packed_bytes(self.head_dim, self.bits) + 2 + factor) / self.head_dim

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "inner": self.inner, "block": self.block}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings)


def split(x: Tensor, inner: int) -> tuple[Tensor, Tensor]:
    """The factors of chunks `x [..., t, D]`: a large one, float32 of `x`'s shape, and a small one, float16 `[..., n, n]`."""
    rows = x.flatten(-2).unflatten(-1, (-1, inner))
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    left = torch.where((values > 1e-4 * values[..., :1])[..., None, :], left, 0.0)  # what counts for nothing costs no precision
    size = math.sqrt(rows.shape[-2])
    small = (values[..., None] * right / size).clamp(-_REACH, _REACH).half()
    return (left * size).reshape(x.shape), small


def join(large: Tensor, small: Tensor) -> Tensor:
    """The product of the factors, in the shape of the large one, float32."""
    rows = large.flatten(-2).unflatten(-1, (-1, small.shape[-1]))
    return (rows @ small.float()).reshape(large.shape)

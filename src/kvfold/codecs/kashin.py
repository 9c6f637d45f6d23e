"""Kashin quantization: a vector as the sum of two flat ones, in two bases (Merkulov et al., arXiv 2404.09737, section 3).

    x ~ u + Q' v      with max |u_i| and max |v_i| both of the order ||x|| / sqrt(D), whatever x is

`Q` is a fixed random rotation. The greedy algorithm takes, of `x` and `Q x`, the one with the larger sum of magnitudes,
subtracts its mean magnitude times its signs and adds that to `u`, or to `v`; then it goes on with what is left, which shrinks
geometrically. The entries of `u` and `v` gather round few peaks, so `2^bits` centres `+-c` serve all entries of one vector's
`u`, and as many those of its `v`: the least-squares centres of their magnitudes (k-means in one dimension).

What the rounding of `u` misses, `v` can take up: then the factors are coded again, each as what the other's codes leave,
`refine` times in turn (ours; 0 is the paper's).

Stored: `bits` a channel for each factor, and `2^(bits - 1)` float16 centres for each:

    bits per element = 2 bits + 16 * 2^bits / D

A score is `<q, u> + <Q q, v>`: the query is rotated once (`basis = [I; Q]`), keys are only looked up. Nothing is calibrated.
Keys are coded after RoPE.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import Codec
from kvfold.codecs.levels import normal_levels
from kvfold.codecs.transform import rotation
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack

_LLOYD_STEPS = 6
_REACH = torch.finfo(torch.float16).max


class KashinCodec(Codec):
    """`bits` of 1 or 2 a channel for each of the two factors; `steps` of decomposition, `refine` rounds of coding again."""

    kind = "kashin"

    def __init__(self, head_dim: int, bits: int = 2, steps: int = 8, refine: int = 4) -> None:
        super().__init__(head_dim)
        if bits not in (1, 2):
            raise InputError("bits of 1 or 2 for each factor", str(bits), "choose one of these")
        if steps < 1 or refine < 0:
            raise InputError("at least 1 step and 0 refinements", f"{steps} and {refine}", "raise them")
        self.bits, self.steps, self.refine = bits, steps, refine

    def _encode(self, x: Tensor) -> Codes:
        x = x.clamp(-_REACH, _REACH)
        rotated = rotation(self.head_dim).to(x.device)
        first, second = (quantize(factor, self.bits) for factor in decompose(x, rotated, self.steps))
        for _ in range(self.refine):
            second = quantize((x - dequantize(*first)) @ rotated.T, self.bits)
            first = quantize(x - dequantize(*second) @ rotated, self.bits)
        codes, centres = (torch.cat(pair, -1) for pair in zip(first, second, strict=True))
        return Codes({"codes": pack(codes, self.bits), "scale": centres})

    def latent(self, codes: Codes) -> Tensor:
        integers = unpack(codes.fields["codes"], self.bits, 2 * self.head_dim).unflatten(-1, (2, -1))
        return dequantize(integers, codes.fields["scale"].unflatten(-1, (2, -1))).flatten(-2)

    @property
    def basis(self) -> Tensor:
        return torch.cat((torch.eye(self.head_dim), rotation(self.head_dim)))

    @property
    def bits_per_element(self) -> float:
        return 8 * (packed_bytes(2 * self.head_dim, self.bits) + 2 * (1 << self.bits)) / self.head_dim

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "steps": self.steps, "refine": self.refine}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings)


def decompose(x: Tensor, rotated: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Flat factors `u, v`, as `x [..., D]`, with `x` near `u + v @ rotated`; `rotated [D, D]` is orthogonal."""
    u, v, left = torch.zeros_like(x), torch.zeros_like(x), x
    for _ in range(steps):
        turned = left @ rotated.T
        plain, other = left.abs().mean(-1, keepdim=True), turned.abs().mean(-1, keepdim=True)
        here = torch.where(plain >= other, plain * left.sign(), 0.0)
        there = torch.where(plain >= other, 0.0, other * turned.sign())
        u, v, left = u + here, v + there, left - here - there @ rotated
    return u, v


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int32 of `x [..., D]` among `-c .. c`, ascending, and the float16 centres `c [..., 2^(bits - 1)]`, ascending.

    The centres are those of least squared error that Lloyd's iteration finds from the normal distribution's.
    """
    half = 1 << (bits - 1)
    sizes = x.abs()
    centres = sizes.square().mean(-1, keepdim=True).sqrt() * normal_levels(bits)[half:].to(x.device)
    for _ in range(_LLOYD_STEPS):
        chosen = torch.nn.functional.one_hot(_nearest(sizes, centres), half).to(x.dtype)
        count = chosen.sum(-2)
        means = (sizes[..., None, :] @ chosen)[..., 0, :] / count.clamp_min(1)
        centres = torch.where(count > 0, means, centres)
    stored = centres.clamp_max(_REACH).half()
    nearest = _nearest(sizes, stored.float())
    return torch.where(x < 0, half - 1 - nearest, half + nearest).to(torch.int32), stored


def dequantize(codes: Tensor, centres: Tensor) -> Tensor:
    """The centres that `quantize` chose, float32 `[..., D]`."""
    positive = centres.float()
    return torch.cat((-positive.flip(-1), positive), -1).gather(-1, codes.long())


def _nearest(sizes: Tensor, centres: Tensor) -> Tensor:
    middles = (centres[..., 1:] + centres[..., :-1]) / 2
    return (sizes[..., None] > middles[..., None, :]).sum(-1)

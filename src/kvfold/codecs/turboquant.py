"""TurboQuant: rotate, then quantize every coordinate by one table (Zandieh et al., arXiv 2504.19874, algorithm 1).

    n = ||x||,   y = R x / n * sqrt(D),   j_i = argmin_j |y_i - c_j|,   x ~ n / sqrt(D) * R' c[j]

`R` is a fixed random rotation (signs, then a Hadamard matrix; for a `D` that is no power of two, the Q of a random matrix), the
same for all layers and heads. After it the coordinates of any vector look like draws from a normal distribution, so one table
of `2^bits` levels, Lloyd and Max's for the normal distribution, serves all, and nothing is calibrated. Stored: `bits` a
coordinate, packed, and a float16 norm:

    bits per element = bits + 16 / D.

Keys are coded after RoPE. The paper's variant for unbiased inner products (one bit of the residual's random projection) and its
mixed widths for outlier channels are not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import Codec
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack

_SEED = 0  # of the rotation; it is part of the method, not of a calibration


class TurboQuantCodec(Codec):
    """`bits` of 1 to 8 a coordinate."""

    kind = "turboquant"

    def __init__(self, head_dim: int, bits: int = 2) -> None:
        super().__init__(head_dim)
        if not 1 <= bits <= 8:
            raise InputError("bits from 1 to 8", str(bits), "choose one in that range")
        self.bits = bits

    def _encode(self, x: Tensor) -> Codes:
        norm = x.norm(dim=-1, keepdim=True).clamp_max(torch.finfo(torch.float16).max).half()
        whole = norm.float()
        unit = x / torch.where(whole > 0, whole, 1.0) * math.sqrt(self.head_dim)
        middles = (levels := normal_levels(self.bits).to(x.device))[1:] + levels[:-1]
        codes = torch.bucketize((unit @ rotation(self.head_dim).to(x.device).T).contiguous(), middles / 2)
        return Codes({"codes": pack(codes, self.bits), "scale": norm})

    def decode(self, codes: Codes) -> Tensor:
        packed, norm = codes.fields["codes"], codes.fields["scale"].float()
        values = normal_levels(self.bits).to(packed.device)[unpack(packed, self.bits, self.head_dim).long()]
        return values @ rotation(self.head_dim).to(packed.device) * (norm / math.sqrt(self.head_dim))

    @property
    def bits_per_element(self) -> float:
        return (8 * packed_bytes(self.head_dim, self.bits) + 16) / self.head_dim

    def fit(
        self,
        x: Tensor,
        generator: torch.Generator,
        progress: Callable[[], None] = lambda: None,
        sensitivity: Tensor | None = None,
    ) -> None:
        progress()

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings)


@cache
def rotation(dim: int) -> Tensor:
    """Orthogonal float32 `[D, D]`."""
    generator = torch.Generator().manual_seed(_SEED)
    if dim & (dim - 1):
        return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0].float()
    signs = 2.0 * torch.randint(2, (dim,), generator=generator) - 1
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * signs / math.sqrt(dim)


@cache
def normal_levels(bits: int) -> Tensor:
    """The `2^bits` levels with the least squared error for a standard normal variable, ascending (Lloyd 1982, Max 1960)."""
    count = 1 << bits
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(20_000):
        edges = torch.cat((-infinity, (levels[1:] + levels[:-1]) / 2, infinity))
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        centres = (density[:-1] - density[1:]) / normal.cdf(edges).diff()
        if float((centres - levels).abs().max()) < 1e-9:
            break
        levels = centres
    return ((levels - levels.flip(0)) / 2).float()

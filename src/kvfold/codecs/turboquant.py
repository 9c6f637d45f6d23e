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
from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import NO_FACTS, Codec, Facts
from kvfold.codecs.levels import normal_levels
from kvfold.codecs.transform import rotation
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack


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

    def latent(self, codes: Codes) -> Tensor:
        packed, norm = codes.fields["codes"], codes.fields["scale"].float()
        values = normal_levels(self.bits).to(packed.device)[unpack(packed, self.bits, self.head_dim).long()]
        return values * (norm / math.sqrt(self.head_dim))

    @property
    def basis(self) -> Tensor:
        return rotation(self.head_dim)

    @property
    def bits_per_element(self) -> float:
        return (8 * packed_bytes(self.head_dim, self.bits) + 16) / self.head_dim

    def fit(
        self,
        x: Tensor,
        generator: torch.Generator,
        progress: Callable[[], None] = lambda: None,
        facts: Facts = NO_FACTS,
    ) -> None:
        progress()

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings)

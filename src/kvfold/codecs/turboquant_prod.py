"""TurboQuant for inner products: its codes, and the signs of what they leave (Zandieh et al., arXiv 2504.19874, algorithm 2).

Levels of least squared error shrink a vector, so inner products with it come out too small (by 36 % at 1 bit, 12 % at 2). Of
`b` bits a coordinate, `b - 1` go to TurboQuant's levels and one to a QJL sketch of the residual:

    r = k - k_levels,   g = ||r||,   b = sign(S r)        read   <q, k> ~ <q, k_levels> + g / (D gain) <S q, b>

which is unbiased over the draw of the projection `S`. Both terms are products with a fixed basis, `[R; S]`.

    bits per element = bits + 32 / D

Keys only: values meet no query, and take all `b` bits in TurboQuant's levels. Keys are coded after RoPE.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import Codec
from kvfold.codecs.qjl import QjlCodec
from kvfold.codecs.turboquant import TurboQuantCodec
from kvfold.codes import Codes
from kvfold.errors import InputError


class TurboQuantProdCodec(Codec):
    """`bits` of 2 to 9 a coordinate, one of them a sign of the residual's projection; `seed` of that projection."""

    kind = "turboquant-prod"

    def __init__(self, head_dim: int, bits: int = 3, seed: int = 0) -> None:
        super().__init__(head_dim)
        if not 2 <= bits <= 9:
            raise InputError("bits from 2 to 9", str(bits), "choose one in that range")
        self.bits, self.seed = bits, seed
        self._levels = TurboQuantCodec(head_dim, bits - 1)
        self._signs = QjlCodec(head_dim, sketch=1, outliers=0, seed=seed)

    def _encode(self, x: Tensor) -> Codes:
        levels = self._levels.encode(x)
        signs = self._signs.encode(x - self._levels.decode(levels))
        return Codes({name: torch.cat((tensor, signs.fields[name]), -1) for name, tensor in levels.fields.items()})

    def latent(self, codes: Codes) -> Tensor:
        packed, scale = codes.fields["codes"], codes.fields["scale"]
        last = packed.shape[-1] - -(-self.head_dim // 8)
        levels = self._levels.latent(Codes({"codes": packed[..., :last], "scale": scale[..., :1]}))
        signs = self._signs.latent(Codes({"codes": packed[..., last:], "scale": scale[..., 1:]}))
        return torch.cat((levels, signs), -1)

    @property
    def basis(self) -> Tensor:
        return torch.cat((self._levels.basis, self._signs.basis))

    @property
    def bits_per_element(self) -> float:
        return self._levels.bits_per_element + self._signs.bits_per_element

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "seed": self.seed}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings)

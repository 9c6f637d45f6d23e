"""QJL: keys as the signs of random projections (Zandieh, Daliri, Han, arXiv 2406.03482, sections 3 and 4).

    stored   b = sign(S k)  (m bits),   n = ||k||        read   <q, k> ~ n / (m g) * <S q, b>,   g = E|<s, k / n>|

`S` has `m` random rows `s`, the same for all keys, heads and layers: `m / D` independent rotations times `sqrt(D)`, one below
the other, which does better than independent normal rows (`projection=gaussian`). Over the draw of `S` the estimate is
unbiased for every `q` and `k`. Only the key is rounded to signs. The estimate is linear in the query, so attention projects a
query once (`basis`) and never decodes a key.

A few channels of keys are much larger than the others and would set the noise of all. So in every block of `group` tokens the
`outliers` channels of largest norm are sketched apart, by the first rows of `S`, with a norm of their own, and each sketch is
asked for its own channels only:

    <q, k> ~ n_i / (m_i g) <S q, b_i> + sum over outlier channels c of q_c (n_o / (m_o g) <S_c, b_o> - n_i / (m_i g) <S_c, b_i>)

The sum's bracket is a number a channel and key that does not depend on the query, so this too is a product with a basis,
`[S; I]`: the query is projected once and of a key only its outlier channels are decoded.

Stored: `m_i + m_o` signs, two float16 norms, and a byte an outlier channel of a block, striped over its tokens. Values are
coded by KIVI's integers, as in the paper. Nothing is calibrated. Keys are coded after RoPE.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import Codec
from kvfold.codecs.transform import haar
from kvfold.codes import Codes, stripe, unstripe
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack

PROJECTIONS = ("orthogonal", "gaussian")
_FIRST_SEED = 2406  # apart from the seeds of `rotation`: a sketch of what a rotation left must not know that rotation


class QjlCodec(Codec):
    """`sketch` signs an element; `outliers` channels a block of `group` tokens apart, in `outlier_sketch` signs an element."""

    kind = "qjl"

    def __init__(
        self,
        head_dim: int,
        sketch: int = 2,
        outliers: int = 8,
        outlier_sketch: int = 2,
        group: int = 32,
        projection: str = "orthogonal",
        seed: int = 0,
    ) -> None:
        super().__init__(head_dim)
        if sketch < 1:
            raise InputError("a sketch of at least 1 sign an element", str(sketch), "raise it")
        if not 0 <= outliers < min(head_dim, 257):
            raise InputError(f"outliers from 0 to {min(head_dim, 257) - 1}", str(outliers), "choose a number in that range")
        if outliers and (group < 2 or not 1 <= outlier_sketch <= sketch):
            got = f"a group of {group} and a sketch of {outlier_sketch}"
            fix = f"use a group of 2 or more and an outlier_sketch from 1 to {sketch}"
            raise InputError("a block of tokens and a sketch for outlier channels no longer than the others'", got, fix)
        if outliers and head_dim > 256:
            raise InputError("a head dim of at most 256 with outliers", str(head_dim), "set outliers=0")
        if projection not in PROJECTIONS:
            raise InputError(f"projection among {', '.join(PROJECTIONS)}", repr(projection), "choose one of these")
        self.sketch, self.outliers, self.outlier_sketch, self.group = sketch, outliers, outlier_sketch, group
        self.projection, self.seed = projection, seed
        self.block = group if outliers else 1
        self._rows = [n * head_dim for n in ((sketch, outlier_sketch) if outliers else (sketch,))]  # signs a sketch

    @property
    def _matrix(self) -> Tensor:
        return projection_matrix(self.head_dim, self.sketch, self.projection, self.seed)

    def _encode(self, x: Tensor) -> Codes:
        x = x.contiguous()
        fields, parts = {}, [x]
        if self.outliers:
            energy = x.unflatten(2, (-1, self.group)).square().sum(3)
            channels = energy.argsort(dim=-1, descending=True, stable=True)[..., : self.outliers]
            apart = torch.zeros_like(energy, dtype=torch.bool).scatter(-1, channels, True).repeat_interleave(self.group, 2)
            fields["channels"] = stripe(channels.to(torch.uint8), self.group)
            parts = [x.masked_fill(apart, 0), x.masked_fill(~apart, 0)]
        matrix = self._matrix.to(x.device)
        signs = [part @ matrix[:rows].T >= 0 for part, rows in zip(parts, self._rows, strict=True)]
        return Codes(
            {"codes": pack(torch.cat(signs, -1), 1), "scale": torch.cat([norms(part) for part in parts], -1), **fields}
        )

    def latent(self, codes: Codes) -> Tensor:
        packed, scale = codes.fields["codes"], codes.fields["scale"].float()
        signs = (unpack(packed, 1, sum(self._rows)) * 2 - 1).float().split(self._rows, -1)
        gain = sign_gain(self.head_dim, self.projection)
        parts = [sign * (n / (rows * gain)) for sign, n, rows in zip(signs, scale.split(1, -1), self._rows, strict=True)]
        if not self.outliers:
            return parts[0]
        channels = unstripe(codes.fields["channels"], self.group, torch.uint8, (self.outliers,)).long()
        columns = self._matrix.to(packed.device).T[channels].mT  # [B, G, N, rows, outliers]
        inlier, outlier = (part.unflatten(2, (-1, self.group)) @ columns[..., : part.shape[-1], :] for part in parts)
        where = channels[..., None, :].expand_as(inlier)
        apart = inlier.new_zeros(*inlier.shape[:-1], self.head_dim).scatter(-1, where, outlier - inlier).flatten(2, 3)
        return torch.cat((parts[0], apart), -1)

    @property
    def basis(self) -> Tensor:
        return torch.cat((self._matrix, torch.eye(self.head_dim))) if self.outliers else self._matrix

    @property
    def bits_per_element(self) -> float:
        channels = -(-self.outliers // self.block)
        return 8 * (packed_bytes(sum(self._rows), 1) + 2 * len(self._rows) + channels) / self.head_dim

    def settings(self) -> dict[str, Any]:
        names = ("sketch", "outliers", "outlier_sketch", "group", "projection", "seed")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings)


@cache
def projection_matrix(dim: int, times: int, projection: str = "orthogonal", seed: int = 0) -> Tensor:
    """The random rows, float32 `[times * dim, dim]`: independent rotations times `sqrt(dim)`, or independent normal numbers."""
    generator = torch.Generator().manual_seed(_FIRST_SEED + seed)
    if projection == "gaussian":
        return torch.randn(times * dim, dim, generator=generator)
    return torch.cat([haar(dim, generator) for _ in range(times)]) * math.sqrt(dim)


def sign_gain(dim: int, projection: str = "orthogonal") -> float:
    """`E|<s, e>|` for a row `s` and a unit vector `e`: `sqrt(2 / pi)` for normal rows.

    A row of a rotation is uniform on the sphere, which makes it larger by about `1 / (4 dim)`.
    """
    if projection == "gaussian":
        return math.sqrt(2 / math.pi)
    return math.sqrt(dim / math.pi) * math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2))


def norms(x: Tensor) -> Tensor:
    """Euclidean norms over the last axis, float16 `[..., 1]`, at most the largest that there is."""
    return x.norm(dim=-1, keepdim=True).clamp_max(torch.finfo(torch.float16).max).half()

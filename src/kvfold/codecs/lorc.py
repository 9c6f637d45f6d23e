"""LoRC: the weights of keys and values are cut to a low rank, and what is cached is the narrow middle (arXiv 2410.03111).

A head's key is `k = W x`, `x` the layer's input (a bias is a column of `W` whose input is 1). With `W = U S V'` and `U_r` the
first `r` columns of `U`, the rank-`r` weights `W_r = U_r S_r V_r'` are the nearest to `W` (Eckart and Young), and

    c = S_r V_r' x = U_r' k,      k ~ W_r x = U_r c

so the latent `c [r]` is cached and made from the key itself. Values are the same; their `U_r` moves behind the attention's sum,
where the paper folds it into the output projection. Keys are coded before RoPE, which does not commute with `U_r`: they are
rebuilt and rotated when read.

Layers differ in rank. An error in a layer is amplified by those after it, by at most their condition numbers `kappa` (largest
over smallest singular value), so with `L_l = sum_(j >= l) log kappa(W_k^j) + log kappa(W_v^j)`

    r_l = r_max - (r_max - r_min) (max L - L_l) / (max L - min L)

where `r_max` is what makes the mean rank the one asked for. That this map is the paper's to the letter is not verified.
Stored: `c` in float16, or in integers of `bits` bits between minimum and maximum of every `GROUP` latents (beyond the paper):

    bits per element = 16 r / D,   or (bits r + 32 ceil(r / GROUP)) / D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import NO_FACTS, Codec, Facts
from kvfold.codecs.kivi import dequantize, quantize
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack

GROUP = 16  # latents that share a minimum and a maximum; neighbours have singular values of one size


class LorcCodec(Codec):
    """`rank` of the head dim's channels, each head in a basis of its own; latents of `bits` 1 to 8, or 16 for float16.

    After `fit`, `settle` gives it the rank of its layer.

    Attributes:
        condition: log of the condition number of the weights, of all heads together; 0 until fitted.
    """

    kind = "lorc"
    wants = frozenset({"projection"})

    def __init__(self, head_dim: int, rank: int, bits: int = 16, pre_rope: bool = False) -> None:
        super().__init__(head_dim)
        if not 1 <= rank <= head_dim:
            raise InputError(f"a rank from 1 to the head dim {head_dim}", str(rank), "choose one in that range")
        if bits != 16 and not 1 <= bits <= 8:
            raise InputError("bits from 1 to 8, or 16", str(bits), "choose one of these")
        self.rank, self.bits, self.pre_rope = rank, bits, pre_rope
        self.condition = 0.0
        self._rows = torch.empty(0, head_dim, head_dim)  # `U'`, float32 `[G, D, D]` when fitted and `[G, rank, D]` at rest

    def _encode(self, x: Tensor) -> Codes:
        exact = x.double() @ self.basis.to(x.device).double().mT  # so that a token's codes do not hang on those beside it
        latent = exact.float()
        if self.bits == 16:
            reach = torch.finfo(torch.float16).max
            return Codes({"codes": latent.clamp(-reach, reach).half()})
        padded = torch.arange(GROUP * self._groups, device=x.device).clamp_max(self.rank - 1)  # repeats change no extreme
        codes, scale = quantize(latent[..., padded].unflatten(-1, (-1, GROUP)), self.bits)
        return Codes({"codes": pack(codes.flatten(3)[..., : self.rank], self.bits), "scale": scale.flatten(3)})

    def latent(self, codes: Codes) -> Tensor:
        stored = codes.fields["codes"]
        if self.bits == 16:
            return stored.float()
        scale = codes.fields["scale"].unflatten(-1, (-1, 2)).repeat_interleave(GROUP, 3)[..., : self.rank, :]
        return dequantize(unpack(stored, self.bits, self.rank)[..., None], scale)[..., 0]

    @property
    def basis(self) -> Tensor:
        if not len(self._rows):
            raise InputError("a fitted codec", "one without a basis", "call fit, or kvfold.calibrate, first")
        return self._rows[:, : self.rank]

    @property
    def _groups(self) -> int:
        return -(-self.rank // GROUP)

    @property
    def bits_per_element(self) -> float:
        if self.bits == 16:
            return 16 * self.rank / self.head_dim
        return 8 * (packed_bytes(self.rank, self.bits) + 4 * self._groups) / self.head_dim

    def fit(
        self, x: Tensor, generator: torch.Generator, progress: Callable[[], None] = lambda: None, facts: Facts = NO_FACTS
    ) -> None:
        """Take the basis from `facts.projection`; without a model, samples `x` take its place (their principal components)."""
        weights = x.mT if facts.projection is None else facts.projection
        self._rows = directions(weights)[0]
        whole = torch.linalg.svdvals(weights.double().flatten(0, 1))
        self.condition = float((whole.max() / whole.min().clamp_min(1e-6 * whole.max() + 1e-300)).clamp_min(1).log())
        progress()

    def with_rank(self, rank: int) -> Self:
        """The fitted codec cut to another rank."""
        made = type(self)(self.head_dim, rank, self.bits, self.pre_rope)
        made._rows, made.condition = self._rows, self.condition
        return made

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "bits": self.bits, "pre_rope": self.pre_rope}

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self._rows[:, : self.rank].contiguous()}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        codec = cls(head_dim, **settings)
        rows = tensors.get("basis", codec._rows)
        if rows.ndim != 3 or rows.shape[2] != head_dim or (len(rows) and rows.shape[1] != codec.rank):
            found = str(tuple(rows.shape))
            raise InputError(f"a basis [G, {codec.rank}, {head_dim}]", found, "the codec file is damaged: calibrate again")
        codec._rows = rows
        return codec


def directions(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors of `weights [G, D, N]` as rows, float32 `[G, D, D]`, and singular values `[G, D]`, descending."""
    gram = weights.double() @ weights.double().mT
    values, vectors = torch.linalg.eigh(gram)
    rows = vectors.mT.flip(1)
    largest = rows.gather(2, rows.abs().argmax(2, keepdim=True))
    return (rows * largest.sign()).float().contiguous(), values.flip(1).clamp_min(0).sqrt()  # a sign that no library chooses


def ranks(conditions: Sequence[float], mean: float, least: float, head_dim: int) -> list[int]:
    """Rank of every layer from the log condition numbers of its weights, keys' and values' together, by the map above.

    Args:
        mean, least: shares of the head dim; the mean is met to a rank. Where no rank above the head dim could meet it, `least`
            gives way and `r_max` is the head dim.
    """
    cumulative = torch.tensor(conditions, dtype=torch.float64).flip(0).cumsum(0).flip(0)
    reach = cumulative.max() - cumulative.min()
    fall = (cumulative.max() - cumulative) / reach if reach > 0 else torch.zeros_like(cumulative)
    middle = float(fall.mean())
    high = min(1.0, (mean - least * middle) / (1 - middle))
    low = (mean - high * (1 - middle)) / middle if middle > 0 else high
    exact = (high - (high - low) * fall) * head_dim
    floor = (exact + 1e-9).floor()
    missing = round(mean * head_dim * len(exact)) - int(floor.sum())  # go to the layers that lost most by rounding
    order = (exact - floor).argsort(descending=True, stable=True)[: max(0, missing)]
    floor[order] += 1
    return [int(rank) for rank in floor.clamp(1, head_dim)]


def rank_of(share: float, head_dim: int) -> int:
    """The rank before layers are told apart."""
    return max(1, math.floor(share * head_dim + 0.5))


Sides = tuple[list[Codec | None], list[Codec | None]]


def settle(keys: Sequence[Codec | None], values: Sequence[Codec | None], settings: dict[str, Any]) -> Sides:
    """Fitted codecs of all layers, each at the rank of its layer."""
    coded = [(k, v) for k, v in zip(keys, values, strict=True) if isinstance(k, LorcCodec) and isinstance(v, LorcCodec)]
    if not coded:
        return list(keys), list(values)
    found = iter(
        ranks([k.condition + v.condition for k, v in coded], settings["rank"], settings["least"], coded[0][0].head_dim)
    )
    made: Sides = ([], [])
    for key, value in zip(keys, values, strict=True):
        rank = next(found) if key is not None else 0
        for side, codec in zip(made, (key, value), strict=True):
            side.append(codec.with_rank(rank) if isinstance(codec, LorcCodec) else codec)
    return made

"""LoRC: the weights of keys and values are cut to a low rank, and what is cached is the narrow middle (arXiv 2410.03111).

The keys of a token are `k = W x`, `x` the layer's input (a bias is a column of `W` whose input is 1). With `W = U S V'` and
`U_r` the first `r` columns of `U`, the rank-`r` weights `W_r = U_r S_r V_r'` are the nearest to `W` (Eckart and Young), and

    c = S_r V_r' x = U_r' k,      k ~ W_r x = U_r c

so the latent `c [r]` is cached and made from the key itself. `W` is that of all KV heads together, whose latent is cut into a
piece a head to be stored, or of each head alone. Values are the same. Keys are coded before RoPE, which does not commute with
`U_r`: they are rebuilt and rotated when read.

Layers differ in rank. An error in a layer is amplified by those after it, by at most their condition numbers `kappa` (largest
over smallest singular value), so with `L_l = sum_(j >= l) log kappa(W_k^j) + log kappa(W_v^j)`

    r_l = r_max - (r_max - r_min) (max L - L_l) / (max L - min L)

is the rank a head, where `r_max` is what makes the mean the one asked for. That this map is the paper's to the letter is not
verified.

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
    """Low-rank codes of one side. After `fit`, `settle` gives it the rank of its layer.

    Args:
        rank: latents a head stores, 1 to the head dim.
        bits: of a latent, 1 to 8, or 16 for float16.
        latent: "joint" for one of all heads, "own" for one of each.
        basis_of: "weights", or "samples" for the principal components of what is coded.

    Attributes:
        condition: log of the condition number of the weights, of all heads together; 0 until fitted.
    """

    kind = "lorc"

    def __init__(
        self,
        head_dim: int,
        rank: int,
        bits: int = 16,
        latent: str = "joint",
        basis_of: str = "weights",
        pre_rope: bool = False,
    ) -> None:
        super().__init__(head_dim)
        if not 1 <= rank <= head_dim:
            raise InputError(f"a rank from 1 to the head dim {head_dim}", str(rank), "choose one in that range")
        if bits != 16 and not 1 <= bits <= 8:
            raise InputError("bits from 1 to 8, or 16", str(bits), "choose one of these")
        self.rank, self.bits, self.pre_rope = rank, bits, pre_rope
        self.joint, self._basis_of = latent == "joint", basis_of
        self.wants = frozenset({"projection"} if basis_of == "weights" else ())
        self.condition = 0.0
        self._rows = torch.empty(0, 0, head_dim)  # `U'`, float32: `[1, R, G * D]` for a joint latent, `[G, R, D]` for own ones

    def _encode(self, x: Tensor) -> Codes:
        rows = self._cut(x.shape[1]).to(x.device)
        together = x.transpose(1, 2).flatten(2)[:, None] if self.joint else x  # [B, 1, T, G * D]
        latent = (together.double() @ rows.double().mT).float()  # so that a token's codes do not hang on those beside it
        if self.joint:
            latent = latent[:, 0].unflatten(2, (-1, self.rank)).transpose(1, 2)
        if self.bits == 16:
            reach = torch.finfo(torch.float16).max
            return Codes({"codes": latent.clamp(-reach, reach).half()})
        padded = torch.arange(GROUP * self._groups, device=x.device).clamp_max(self.rank - 1)  # repeats change no extreme
        codes, scale = quantize(latent[..., padded].unflatten(-1, (-1, GROUP)), self.bits)
        return Codes({"codes": pack(codes.flatten(3)[..., : self.rank], self.bits), "scale": scale.flatten(3)})

    def decode(self, codes: Codes) -> Tensor:
        latent = self.latent(codes)
        heads = latent.shape[1]
        rows = self._cut(heads).to(latent.device)
        if not self.joint:
            return latent @ rows
        return (latent.transpose(1, 2).flatten(2) @ rows[0]).unflatten(2, (heads, -1)).transpose(1, 2)

    def latent(self, codes: Codes) -> Tensor:
        """Float32 `[B, G, T, rank]`; of a joint latent, a head's piece."""
        stored = codes.fields["codes"]
        if self.bits == 16:
            return stored.float()
        scale = codes.fields["scale"].unflatten(-1, (-1, 2)).repeat_interleave(GROUP, 3)[..., : self.rank, :]
        return dequantize(unpack(stored, self.bits, self.rank)[..., None], scale)[..., 0]

    @property
    def basis(self) -> Tensor | None:
        return None if self.joint else self._cut(self._heads)

    @property
    def _heads(self) -> int:
        return self._rows.shape[2] // self.head_dim if self.joint else len(self._rows)

    def _cut(self, heads: int) -> Tensor:
        """The rows that are used, of vectors of `heads` heads."""
        if not len(self._rows):
            raise InputError("a fitted codec", "one without a basis", "call fit, or kvfold.calibrate, first")
        if heads != self._heads:
            raise InputError(f"{self._heads} KV heads", f"{heads}", "use the codec with the model it was calibrated for")
        return self._rows[:, : self.rank * (heads if self.joint else 1)]

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
        """Take the basis from `facts.projection`; without it, samples `x` take its place (their principal components)."""
        weights = x.mT if facts.projection is None else facts.projection
        whole = weights.flatten(0, 1)
        self._rows = directions(whole[None] if self.joint else weights)[0]
        values = torch.linalg.svdvals(whole.double())
        self.condition = float((values.max() / values.min().clamp_min(1e-6 * values.max() + 1e-300)).clamp_min(1).log())
        progress()

    def with_rank(self, rank: int) -> Self:
        """The fitted codec cut to another rank."""
        made = type(self)(self.head_dim, **{**self.settings(), "rank": rank})
        made._rows, made.condition = self._rows, self.condition
        return made

    def settings(self) -> dict[str, Any]:
        latent = "joint" if self.joint else "own"
        return {
            "rank": self.rank,
            "bits": self.bits,
            "latent": latent,
            "basis_of": self._basis_of,
            "pre_rope": self.pre_rope,
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self._cut(self._heads).contiguous() if len(self._rows) else self._rows}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        codec = cls(head_dim, **settings)
        rows = tensors.get("basis", codec._rows)
        heads = rows.shape[2] // head_dim if rows.ndim == 3 and codec.joint else 1
        if rows.ndim != 3 or rows.shape[2] != heads * head_dim or (len(rows) and rows.shape[1] != codec.rank * heads):
            found, fix = str(tuple(rows.shape)), "the codec file is damaged: calibrate again"
            raise InputError(f"a basis of {codec.rank} latents a head of {head_dim} channels", found, fix)
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


def settle_lorc(keys: Sequence[Codec | None], values: Sequence[Codec | None], settings: dict[str, Any]) -> Sides:
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

"""Lattice transform coding: decorrelate, then round to the lattice E8 (Lei et al., arXiv 2403.07320; the fixed-rate code as
in NestQuant, Savkin et al., arXiv 2502.09720, sections 3 and 4).

    z = A x,   g = ||x|| / sqrt(D),   n_p = E8 code of z_p / g at ratio q_p,   x ~ g A^-1 point(n)

`A` are, with `transform` "pca", a head's principal axes about zero, largest first, each block of 8 divided by its root mean
square; with "hadamard" a fixed random rotation, all blocks alike. A block is a point of a Voronoi code of E8 (`e8.py`) at one
of `scales` scales. Where an entropy coder would give axes of large variance more bits by itself, a code of fixed rate has to
be told: the ratios `q_p` of a head's blocks are those with the least squared error of all that come to `bits` an element;
blocks that are not worth a bit have `q_p = 1` and decode to zero. No mean is subtracted: that would save squared error, but
a token that receives much attention and is unlike all others (the first) would then be the hardest to tell.

Stored: the blocks' numbers, `ceil(log2(scales q_p^8))` bits each, packed; and `g` in a byte (or a float16). It is raised
where a block would lie outside of the largest region, so that none ever wraps around:

    bits per element = bits + scale_bits / D.

Decoded vectors are `g point(n)` times a matrix, so that attention on values, and on keys coded after RoPE, reads codes
without the transform.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs import e8
from kvfold.codecs.base import NO_FACTS, Codec, Facts
from kvfold.codecs.transform import rotation
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.packing import pack, pack_scale, packed_bytes, unpack, unpack_scale

TRANSFORMS = ("pca", "hadamard")
_REACH = torch.finfo(torch.float16).max
_THINNEST = 1e-3  # of the widest block's root mean square: what blocks that hardly vary in the samples are taken to have


class LatticeCodec(Codec):
    """`bits` an element for the blocks, shared out among them; `scales` to choose from in a block, 1 to 16.

    Attributes:
        ratio: int32 `[G, D / 8]`, `q` of every block; None before `fit`.
    """

    kind = "lattice"

    def __init__(
        self,
        head_dim: int,
        bits: float = 2.0,
        scales: int = 4,
        transform: str = "pca",
        scale_bits: int = 8,
        pre_rope: bool = False,
    ) -> None:
        super().__init__(head_dim)
        if head_dim % e8.DIM:
            raise InputError(f"a head dim that {e8.DIM} divides", str(head_dim), "use another codec with this model")
        if not 1 <= scales <= 16:
            raise InputError("scales from 1 to 16", str(scales), "choose one in that range")
        if transform not in TRANSFORMS:
            raise InputError(f"transform among {', '.join(TRANSFORMS)}", repr(transform), "choose one of these")
        if scale_bits not in (8, 16):
            raise InputError("scale_bits among 8, 16", str(scale_bits), "choose one of these")
        least, most = (e8.width(q, scales) / e8.DIM for q in (2, 16))
        if not least <= bits <= most:
            raise InputError(f"bits from {least:g} to {most:g} with {scales} scales", f"{bits:g}", "choose some in that range")
        self.bits, self.scales, self.transform, self.scale_bits, self.pre_rope = bits, scales, transform, scale_bits, pre_rope
        self.ratio: Tensor | None = None
        self._basis: Tensor | None = None

    @property
    def _budget(self) -> int:
        """Bits of a vector's numbers."""
        return int(self.bits * self.head_dim)

    def _learned(self, ratio: Tensor, basis: Tensor) -> None:
        self.ratio, self._basis = ratio, basis
        self._q = ratio.float()[:, None, :, None]  # [G, 1, P, 1]
        self._analysis = torch.linalg.inv(basis.double())
        self._block, self._shift = _layout(ratio.tolist(), self.scales, self._budget, ratio.device)

    def _encode(self, x: Tensor) -> Codes:
        x = x.clamp(-_REACH, _REACH)
        blocks = (x.double() @ self._analysis).float().unflatten(-1, (-1, e8.DIM))
        largest = e8.size(self.scales - 1, self._q, self.scales)
        needed = torch.where(self._q > 1, blocks.norm(dim=-1, keepdim=True) / largest, 0.0).amax(-2)
        gain = torch.maximum(x.norm(dim=-1, keepdim=True) / math.sqrt(self.head_dim), needed)
        stored = pack_scale(gain) if self.scale_bits == 8 else gain.clamp_max(_REACH).half()
        whole = unpack_scale(stored)
        unit = blocks / torch.where(whole > 0, whole, 1.0)[..., None]
        numbers = e8.quantize(unit, self._q, self.scales).squeeze(-1)
        bits = numbers.gather(-1, self._block.expand(*numbers.shape[:-1], -1)) >> self._shift & 1
        return Codes({"codes": pack(bits, 1), "scale": stored})

    def _numbers(self, codes: Codes) -> Tensor:
        """The blocks' numbers, int64 `[B, G, T, D / 8]`."""
        bits = unpack(codes.fields["codes"], 1, self._budget).long() << self._shift
        numbers = bits.new_zeros(*bits.shape[:-1], self.head_dim // e8.DIM)
        return numbers.scatter_add_(-1, self._block.expand_as(bits), bits)

    def decode(self, codes: Codes) -> Tensor:
        """In float64, so that a vector does not depend in its last bits on how many are decoded with it."""
        assert self._basis is not None
        return (self.latent(codes).double() @ self._basis.double()).float()

    def latent(self, codes: Codes) -> Tensor:
        points = e8.dequantize(self._numbers(codes)[..., None], self._q, self.scales).flatten(-2)
        return points * unpack_scale(codes.fields["scale"])

    @property
    def basis(self) -> Tensor | None:
        return None if self._basis is None else self._basis.float()

    @property
    def bits_per_element(self) -> float:
        return (8 * packed_bytes(self._budget, 1) + self.scale_bits) / self.head_dim

    def fit(
        self,
        x: Tensor,
        generator: torch.Generator,
        progress: Callable[[], None] = lambda: None,
        facts: Facts = NO_FACTS,
    ) -> None:
        heads, count, dim = x.shape
        if count < 2:
            raise InputError("samples of at least 2 tokens", str(count), "give more text")
        samples = x.double()
        axes = rotation(dim).to(x.device).double().expand(heads, dim, dim)
        if self.transform == "pca":
            axes = torch.linalg.eigh(samples.mT @ samples / count)[1].mT.flip(-2)  # rows, the largest first
        blocks = (samples @ axes.mT).square().mean(1).unflatten(-1, (-1, e8.DIM)).mean(-1)
        energy = samples.square().mean((1, 2))[:, None]  # mean square of the gain
        spread = torch.where(energy > 0, blocks / energy, 1.0).sqrt()
        spread = spread.maximum(_THINNEST * spread.amax(-1, keepdim=True)).repeat_interleave(e8.DIM, -1)
        basis = (axes * spread[..., None]).half()
        ratio = torch.tensor([_allocate(row, self._budget, self.scales) for row in blocks.tolist()], dtype=torch.int32)
        self._learned(ratio.to(x.device), basis.contiguous())
        progress()

    def entropy_bits(self, codes: Codes) -> float:
        """Bits an element that an ideal entropy coder would need for `codes [B, G, T, ...]`, side information included: tables
        of their own for every head and coordinate of the points, with the scale's choice, and for the gains' bytes.

        Coordinates of a point are all integers or all halves of odd ones, and their sum is even: the kind is told once, and
        the last one's parity not at all.
        """
        numbers = self._numbers(codes)[..., None]
        scale = e8.size(numbers % self.scales, self._q, self.scales) / self._q
        doubled = (2 * (e8.dequantize(numbers, self._q, self.scales) / scale - e8.OFFSET.to(numbers.device))).round().long()
        half = doubled[..., :1] % 2
        coordinates = torch.where(self._q > 1, torch.div(doubled - half, 2, rounding_mode="floor"), 0)
        coordinates[..., -1] = torch.div(coordinates[..., -1], 2, rounding_mode="floor")
        kind = torch.where(self._q > 1, 2 * (numbers % self.scales) + half, 0)  # [B, G, T, P, 1]
        bits = 0.0
        for head in range(numbers.shape[1]):
            bits += _entropy(codes.fields["scale"][:, head].flatten().float().tolist())
            for block in range(numbers.shape[3]):
                kinds = kind[:, head, :, block].flatten().tolist()
                bits += _entropy(kinds)
                for column in coordinates[:, head, :, block].flatten(0, 1).T.tolist():
                    bits += _entropy(list(zip(kinds, column, strict=True))) - _entropy(kinds)
        return bits / (numbers.shape[1] * self.head_dim)

    def settings(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "scales": self.scales,
            "transform": self.transform,
            "scale_bits": self.scale_bits,
            "pre_rope": self.pre_rope,
        }

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.ratio is None or self._basis is None else {"ratio": self.ratio, "basis": self._basis}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        codec = cls(head_dim, **settings)
        if tensors:
            codec._learned(tensors["ratio"], tensors["basis"])
        return codec


def _entropy(symbols: list[Any]) -> float:
    """Bits a symbol at the frequencies that occur."""
    count = len(symbols)
    return -sum(n / count * math.log2(n / count) for n in Counter(symbols).values())


def _layout(ratios: list[list[int]], scales: int, budget: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each bit of a vector comes from: block and place in the block's number, int64 `[G, 1, budget]` each.

    Bits that no block needs are those at place 63 of a number, which is 0.
    """
    places = [[(p, bit) for p, q in enumerate(row) for bit in range(e8.width(q, scales))] for row in ratios]
    full = torch.tensor([row + [(0, 63)] * (budget - len(row)) for row in places], device=device)
    return full[:, None, :, 0].contiguous(), full[:, None, :, 1].contiguous()


def _allocate(energies: list[float], budget: int, scales: int) -> list[int]:
    """Ratios of blocks with these mean squares that have the least expected squared error in at most `budget` bits."""
    errors = e8.error(scales)
    least = torch.zeros(budget + 1, dtype=torch.float64)  # by bits still free, of the blocks so far
    choices = []
    for energy in energies:
        options = []
        for q, error in errors.items():
            width = e8.width(q, scales)
            rest = torch.full_like(least, math.inf)
            rest[width:] = least[: max(0, budget + 1 - width)] + error * energy
            options.append(rest)
        least, choice = torch.stack(options).min(0)
        choices.append(choice.tolist())
    ratios, free = [], budget
    for choice in reversed(choices):
        ratios.append(e8.RATIOS[choice[free]])
        free -= e8.width(ratios[-1], scales)
    return ratios[::-1]

"""OPQ: one bit budget for the whole model, spent by formula (Hu et al., arXiv 2205.11141: one-shot pruning-quantization).

A method for weights, here of keys and values. A channel `d` of a head has a middle `m_d` and a mean magnitude `s_d` around it,
learned from samples; after

    u = (x - m_d) / s_d

all channels of a layer's side are taken for draws from one Laplace distribution of mean magnitude 1, and one codebook with two
parameters, the threshold below which an element is pruned to zero and the step of the levels beyond, serves them all
(`levels.laplace_levels`, in closed form). With `D(b)` its expected squared error at `b` bits, layer sides `i` get the widths
`b_i` of 1 to 8 with

    sum of z_i D(b_i) least   subject to   mean of b_i at most the budget,    z_i = sum over d of F_d s_d^2,

`F` the second moment of the loss's gradient (or 1). `D` is convex in `b`, so bits are given one by one to the side that gains
most, and the Lagrange multiplier is the gain of the last one. Widths are fixed when all layers are fitted (`settle_opq`).

Stored: `b_i` bits an element and nothing beside, since scales are learned. Keys are taken before RoPE. The paper's formulas
were not at hand; these are our derivation from its description.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import NO_FACTS, Codec, Facts
from kvfold.codecs.levels import laplace_distortion, laplace_levels, nearest_level
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack

WIDTHS = range(1, 9)
WEIGHTS = ("sensitivity", "none")


class OpqCodec(Codec):
    """`bits` of 1 to 8 an element; `side` "key" or "value".

    Args:
        weight: what squared errors are weighed by when widths are chosen, "sensitivity" or "none".
        tensors: what `tensors()` gave, None before `fit`.

    Attributes:
        energy: `z`, the weighted squared error if all is read as its channel's middle, up to a factor; 0 unless `fit` was
            called on this codec, for it is not saved.
    """

    kind = "opq"

    def __init__(
        self,
        head_dim: int,
        side: str,
        bits: int = 3,
        weight: str = "sensitivity",
        tensors: dict[str, Tensor] | None = None,
        energy: float = 0.0,
    ) -> None:
        super().__init__(head_dim)
        if bits not in WIDTHS:
            raise InputError("bits from 1 to 8", str(bits), "choose one in that range")
        if weight not in WEIGHTS:
            raise InputError(f"weight among {', '.join(WEIGHTS)}", repr(weight), "choose one of these")
        if side not in ("key", "value"):
            raise InputError("side among key, value", repr(side), "choose one of these")
        self.side, self.bits, self.weight, self.energy = side, bits, weight, energy
        self.pre_rope = side == "key"
        self.wants = frozenset({"sensitivity"} if weight == "sensitivity" else ())
        self._tensors = tensors or {}

    def with_bits(self, bits: int) -> OpqCodec:
        """The same statistics, another width."""
        return OpqCodec(self.head_dim, self.side, bits, self.weight, self._tensors, self.energy)

    def _encode(self, x: Tensor) -> Codes:
        middle, scale = self._tensors["middle"][:, None], self._tensors["scale"][:, None]
        u = (x - middle) / torch.where(scale > 0, scale, 1.0)
        return Codes({"codes": pack(nearest_level(u, laplace_levels(self.bits).to(x.device)), self.bits)})

    def decode(self, codes: Codes) -> Tensor:
        packed = codes.fields["codes"]
        u = laplace_levels(self.bits).to(packed.device)[unpack(packed, self.bits, self.head_dim).long()]
        return u * self._tensors["scale"][:, None] + self._tensors["middle"][:, None]

    @property
    def bits_per_element(self) -> float:
        return 8 * packed_bytes(self.head_dim, self.bits) / self.head_dim

    def fit(
        self, x: Tensor, generator: torch.Generator, progress: Callable[[], None] = lambda: None, facts: Facts = NO_FACTS
    ) -> None:
        if x.shape[1] < 2:
            raise InputError("at least 2 sample tokens", str(x.shape[1]), "give more text")
        x = x.float()
        middle = x.mean(1)
        scale = (x - middle[:, None]).abs().mean(1)
        felt = torch.ones_like(scale)
        if facts.sensitivity is not None and self.weight == "sensitivity":
            felt = facts.sensitivity.diagonal(dim1=1, dim2=2).to(scale.device)
        self._tensors = {"middle": middle.contiguous(), "scale": scale.contiguous()}
        self.energy = float((felt.double() * scale.double().square()).sum())
        progress()

    def settings(self) -> dict[str, Any]:
        return {"side": self.side, "bits": self.bits, "weight": self.weight}

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings, tensors=tensors)


def build_opq(side: str, head_dim: int, settings: dict[str, Any], layer: int) -> OpqCodec:
    """A codec of the whole bits of the budget; `settle_opq` gives it its own."""
    budget = settings["bits"]
    if not 1 <= budget <= 8:
        raise InputError("bits from 1 to 8, the mean over layers", f"{budget:g}", "choose a budget in that range")
    return OpqCodec(head_dim, side, int(budget), settings["weight"])


def settle_opq(
    keys: Sequence[Codec | None], values: Sequence[Codec | None], settings: dict[str, Any]
) -> tuple[list[Codec | None], list[Codec | None]]:
    """The fitted codecs with the widths that the budget `settings["bits"]` buys."""
    codecs = [codec for codec in (*keys, *values) if isinstance(codec, OpqCodec)]
    costs = [codecs[0].with_bits(bits).bits_per_element for bits in WIDTHS]
    widths = iter(allocate([codec.energy for codec in codecs], costs, settings["bits"]))

    def widened(side: Sequence[Codec | None]) -> list[Codec | None]:
        return [codec.with_bits(next(widths)) if isinstance(codec, OpqCodec) else codec for codec in side]

    return widened(keys), widened(values)


def allocate(energies: Sequence[float], costs: Sequence[float], budget: float) -> list[int]:
    """Widths of least expected error, `costs[b - 1]` bits per element each, whose mean cost is at most `budget`.

    Exact where every bit costs the same: the expected error is convex in the width.

    Raises:
        InputError: the budget does not buy 1 bit for all.
    """
    errors = [laplace_distortion(laplace_levels(bits)) for bits in WIDTHS]
    left = budget * len(energies) - costs[0] * len(energies) + 1e-9
    if left < 0:
        raise InputError(f"bits of at least {costs[0]:g}", f"{budget:g}", "raise bits")
    widths = [1] * len(energies)

    def gain(side: int) -> tuple[float, int]:
        bits = widths[side]
        return -energies[side] * (errors[bits - 1] - errors[bits]) / (costs[bits] - costs[bits - 1]), side

    queue = [gain(side) for side in range(len(energies))]
    heapq.heapify(queue)
    while queue:
        side = heapq.heappop(queue)[1]
        cost = costs[widths[side]] - costs[widths[side] - 1]
        if cost > left:
            continue
        left -= cost
        widths[side] += 1
        if widths[side] < WIDTHS[-1]:
            heapq.heappush(queue, gain(side))
    return widths
